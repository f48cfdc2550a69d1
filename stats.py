"""What a run makes of its cache: memory reserved, used and wasted, batch sizes, time."""

import json
import math
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from inputs import or_exit
from owners import Trace

REPORT = """
Requests           {requests}: {prompt_tokens:,} prompt tokens, {generated_tokens:,} generated
Time               {prefill_s:.1f} s prefill, {decode_s:.1f} s decode: {tokens_per_s:.0f} tokens/s
Manager            {manager_s:.3f} s in {steps} steps, {share:.2%} of it; {preemptions} preemptions
First token        after {first:.2f} s, 99% within {slow:.2f} s; then {each:.0f} ms a token
Max batch          {peak} in this run, {fits} would fit on average, naive fits {naive_fits}
Reserved           {gb[peak_reserved_bytes]:.3f} GB of {gb[budget_bytes]:.3f} GB at the peak
Used               {gb[peak_used_bytes]:.3f} GB
Fragmented         {fragmented_of_reserved:.2%} of reserved; mean {mean_fragmented_of_reserved:.2%}
Fragmented Memory: {gb[fragmented_bytes]:.2f} GB ({fragmented_of_budget:.2%})"""


TIERS = """
Blocks found       {shared:,.0f} in HBM ({hits:.1%}), {fetched:,.0f} in DRAM
Blocks moved       {up:.2f} GB fetched{link}; {spilled:,} to DRAM ({down:.2f} GB)
Blocks dropped     {dropped:,} for good
Later turns        {later}"""


class Stats:
    """The budget of the KV cache and what a run makes of it, in bytes (1e9 to a GB) and seconds.

    reserved: no other request can have it. used: it holds a token of a request that still runs.
    fragmented: reserved - used. Sampled once a step, before anything is freed.
    """

    def __init__(self, args, params):
        head_dim, self.dtype = params["dim"] // params["n_heads"], getattr(torch, args.dtype)
        self.args, self.shape = args, (params["n_layers"], params["n_kv_heads"], head_dim)
        self.bytes_per_token = size = 2 * math.prod(self.shape) * self.dtype.itemsize
        free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else 0
        self.budget = int(1e9 * args.kv_gb if args.kv_gb is not None else 0.9 * free or 1.4e9)
        self.naive_fits = self.budget // (args.max_seq_len * size)
        self.samples = []  # (requests running, bytes reserved, bytes used) of each step
        self.seconds = {"prefill": 0.0, "decode": 0.0, "manager": 0.0}
        self.preemptions, self.tiers = 0, {}  # tiers: TieredCache.counts and more.
        self.start = None  # When the first step began.
        # request: seconds from then (llama3-tiered.py: from its arrival) to first and last token.
        self.times = {}
        fits = f"{self.budget // size:,} tokens or {self.naive_fits} rows of {args.max_seq_len:,}"
        print(f"KV cache: {self.budget / 1e9:.2f} GB, {size:,} bytes a token: {fits}.", flush=True)

    @contextmanager
    def clock(self, name):
        """Add the time that the `with` block takes to seconds[name]."""
        start = time.perf_counter()
        self.start = self.start or start
        yield
        self.seconds[name] += time.perf_counter() - start

    def sample(self, running, waiting, reserved, used):
        """Note how many requests run and wait in this step, slots reserved and used; show it."""
        size = self.bytes_per_token
        self.samples.append((running, round(reserved * size), used * size))
        if sys.stderr.isatty():
            done = self.args.n - running - waiting
            line = f"step {len(self.samples)}: {done} done, {running} running, {waiting} waiting"
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def mark(self, requests):
        """These requests have got a token each: note when."""
        now = time.perf_counter() - self.start
        for request in requests:
            first, _ = self.times.get(request, (now, None))
            self.times[request] = first, now

    def trace(self, tiers):
        """Write what sample() noted last, and the tiers (see owners.py), to --trace FILE."""
        running, reserved, used = self.samples[-1]
        step = {"seconds": round(time.perf_counter() - self.start, 4), "running": running}
        step |= {"reserved_bytes": reserved, "used_bytes": used}
        with or_exit(f"--trace {self.args.trace} cannot be written"):
            if len(self.samples) == 1:
                run = {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}
                run |= {"budget_bytes": self.budget, "bytes_per_token": self.bytes_per_token}
                self.trace_file = Trace(self.args.trace, run, tiers)
            self.trace_file.add(step, tiers)

    def report(self, texts, prompts, tokens, decode, stop):
        """Print the answers to `texts`, then the statistics; both go into --json FILE as well.

        tokens: each prompt and the answer behind it. decode: tokens to text, without those in stop.
        """
        answers = [both[len(prompt) :] for prompt, both in zip(prompts, tokens, strict=True)]
        times = [self.times.get(i, (None, None)) for i in range(len(prompts))]
        firsts = sorted(first for first, _ in times if first) or [0]
        per_token = [
            (last - first) / (len(answer) - 1) if len(answer) > 1 else None
            for (first, last), answer in zip(times, answers, strict=True)
        ]
        seconds = sum(self.seconds.values()) or 1
        samples = self.samples or [(0, 0, 0)]
        # Of the steps that reserve most, the one that uses most of it.
        _, reserved, used = max(samples, key=lambda sample: sample[1:])
        waste = [1 - u / r for _, r, u in samples if r] or [0]
        fits = self.budget * sum(n for n, _, _ in samples) // (sum(r for _, r, _ in samples) or 1)
        args, git = self.args, f'git -C "{Path(__file__).parent}" rev-parse --short HEAD'
        # fmt: off
        result = {
            "script": Path(sys.argv[0]).name, "model": args.model.resolve().name,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
            "dtype": args.dtype, "torch": torch.__version__,
            "commit": subprocess.getoutput(f"{git} 2>/dev/null"),
            "args": vars(args), "requests": len(prompts), "prompt_tokens": sum(map(len, prompts)),
            "generated_tokens": sum(map(len, answers)), "preemptions": self.preemptions,
            "kv": {
                "bytes_per_token": self.bytes_per_token, "budget_bytes": self.budget,
                "peak_reserved_bytes": reserved, "peak_used_bytes": used,
                "fragmented_bytes": reserved - used,
                "fragmented_of_reserved": (reserved - used) / (reserved or 1),
                "fragmented_of_budget": (reserved - used) / self.budget,
                "mean_fragmented_of_reserved": sum(waste) / len(waste),
            },
            "max_batch": {
                "peak": max(n for n, _, _ in samples), "fits": fits, "naive_fits": self.naive_fits,
            },
            "time": {
                **{f"{name}_s": value for name, value in self.seconds.items()},
                "tokens_per_s": sum(map(len, answers)) / seconds, "steps": len(self.samples),
                "first_token_s": [first for first, _ in times], "per_token_s": per_token,
            },
            **({"tiers": self.tiers} if self.tiers else {}),
            "responses": [
                {"prompt_tokens": len(prompt), "tokens": answer,
                 "text": decode([token for token in answer if token not in stop]).strip()}
                for prompt, answer in zip(prompts, answers, strict=True)
            ],
        }
        # fmt: on
        sys.stdout.reconfigure(errors="replace")  # Whatever the terminal can show.
        print(end="\r\033[K" if sys.stderr.isatty() else "", file=sys.stderr)
        for i, response in enumerate(result["responses"]):
            lines = [textwrap.fill(line, 100) for line in response["text"].splitlines()]
            print(f"\n[{i + 1}] {' '.join(texts[i].split())[:95]}\n", *lines, sep="\n")
        if tiers := self.tiers:
            down, up = (tiers[way] * tiers["block_bytes"] / 1e9 for way in ("spilled", "fetched"))
            waits = [wait for wait in tiers["later_first_token_s"] if wait]
            later = f"{median(waits):.2f} s to their first token (median)" if waits else "none"
            link = f", at most {args.link_gbs:g} GB/s (--link-gbs)" if args.link_gbs else ""
            hits = tiers["shared"] / (tiers["shared"] + tiers["fetched"] or 1)
            more = {"down": down, "up": up, "later": later}
            print(TIERS.format(**tiers, **more, link=link, hits=hits), end="")
        flat = {**result, **result["kv"], **result["max_batch"], **result["time"]}
        gb = {key: value / 1e9 for key, value in result["kv"].items()}
        more = {
            "share": self.seconds["manager"] / seconds, "first": median(firsts),
            "slow": firsts[math.ceil(0.99 * len(firsts)) - 1],
            "each": 1000 * median([each for each in per_token if each] or [0]),
        }  # fmt: skip
        print(REPORT.format(**flat, **more, gb=gb), flush=True)
        if args.json:
            with or_exit(f"--json {args.json} cannot be written"):
                Path(args.json).write_text(json.dumps(result, indent=1, default=str))
