"""What a run makes of its cache: memory reserved, used and wasted, batch sizes, time."""

import json
import math
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from support.checkpoint import or_exit
from support.trace import Trace

REPORT = """
Requests           {requests}: {prompt_tokens:,} prompt tokens, {generated_tokens:,} generated
Arrivals           {came} in {came_s:.1f} s; {waited} waited at once at most; {idle_s:.1f} s idle
Time               {prefill_s:.1f} s prefill, {decode_s:.1f} s decode: {tokens_per_s:.0f} tokens/s
Manager            {manager_s:.3f} s in {steps} steps, {share:.2%} of it; {preemptions} preemptions
First token        after {first:.2f} s, 99% within {slow:.2f} s; then {each:.0f} ms a token
Max batch          {peak} at once, {fits} would fit on average, naive fits {naive_fits}
Reserved           {gb[peak_reserved_bytes]:.3f} GB of {gb[budget_bytes]:.3f} GB at the peak
Used               {gb[peak_used_bytes]:.3f} GB
Fragmented         {fragmented_of_reserved:.2%} of reserved; mean {mean_fragmented_of_reserved:.2%}
Fragmented Memory: {gb[fragmented_bytes]:.2f} GB ({fragmented_of_budget:.2%})"""

TIERS = """
Blocks found       {shared:,.0f} in HBM ({hits:.1%}), {fetched:,.0f} in DRAM
Blocks moved       {up:.2f} GB fetched; {spilled:,} spilled ({down:.2f} GB)
Blocks dropped     {dropped:,} for good
Later turns        {later}"""


# Of a step: when it was over, requests that run and wait, bytes reserved and used.
Sample = namedtuple("Sample", ["seconds", "running", "waiting", "reserved", "used"])


class Stats:
    """The budget of the KV cache and what a run makes of it, in bytes (1e9 to a GB) and seconds.

    reserved: no other request can have it. used: it holds a token of a request that still runs.
    fragmented: reserved - used. Sampled once a step, after the model and before anything is
    released: then a request's last token has been computed and its memory is still its own.
    """

    def __init__(self, args, params):
        head_dim, self.dtype = params["dim"] // params["n_heads"], getattr(torch, args.dtype)
        self.args, self.shape = args, (params["n_layers"], params["n_kv_heads"], head_dim)
        self.bytes_per_token = size = 2 * math.prod(self.shape) * self.dtype.itemsize
        free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else 0
        usual = 0.9 * free if args.device == "cuda" else 1.4e9
        self.budget = int(usual if args.kv_gb is None else 1e9 * args.kv_gb)
        self.room = self.budget // size  # Tokens.
        self.naive_fits = self.room // args.max_seq_len
        self.samples, self.n_computed = [], 0  # Tokens, those of prompts included.
        self.seconds = {"prefill": 0.0, "decode": 0.0, "manager": 0.0, "idle": 0.0}
        self.preemptions, self.start = 0, None  # When the loop began.
        fits = f"{self.room:,} tokens or {self.naive_fits} rows of {args.max_seq_len:,}"
        print(f"KV cache: {self.budget / 1e9:.2f} GB, {size:,} bytes a token: {fits}.", flush=True)

    @contextmanager
    def clock(self, name):
        """Add the time that the `with` block takes to seconds[name]."""
        start = time.perf_counter()
        self.start = self.start or start
        try:
            yield
        finally:  # Ctrl-C, too.
            self.seconds[name] += time.perf_counter() - start

    def sample(self, new, running, waiting, reserved, used):
        """Note of this step its tokens (a list for each request), how many requests run and wait,
        and the slots reserved and used; show the progress."""
        size, now = self.bytes_per_token, time.perf_counter()
        seconds = round(now - (self.start or now), 4)
        sample = Sample(seconds, running, waiting, round(reserved * size), round(used * size))
        self.samples.append(sample)
        self.n_computed += sum(map(len, new))
        if sys.stderr.isatty():
            line = f"step {len(self.samples)}: {self.n_computed:,} tokens computed, "
            line += f"{running} running, {waiting} waiting"
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def trace(self, tiers, waiting):
        """Write what sample() noted last, and the tiers (see trace.py), to --trace FILE."""
        last, places = self.samples[-1], [request.place[0] for request in waiting]
        step = {"seconds": last.seconds, "running": last.running, "waiting": places}
        step |= {"reserved_bytes": last.reserved, "used_bytes": last.used}
        with or_exit(f"--trace {self.args.trace} cannot be written"):
            if len(self.samples) == 1:
                run = {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}
                run |= {"budget_bytes": self.budget, "bytes_per_token": self.bytes_per_token}
                self.trace_file = Trace(self.args.trace, run, tiers)
            self.trace_file.add(step, tiers)

    def memory(self):
        """Bytes at the step where most is reserved, and of these the one where most is used."""
        *_, reserved, used = max(self.samples, key=lambda s: (s.reserved, s.used), default=(0, 0))
        waste = [1 - s.used / s.reserved for s in self.samples if s.reserved] or [0]
        return {
            "bytes_per_token": self.bytes_per_token, "budget_bytes": self.budget,
            "peak_reserved_bytes": reserved, "peak_used_bytes": used,
            "fragmented_bytes": reserved - used,
            "fragmented_of_reserved": (reserved - used) / (reserved or 1),
            "fragmented_of_budget": (reserved - used) / self.budget,
            "mean_fragmented_of_reserved": sum(waste) / len(waste),
        }  # fmt: skip

    def batches(self):
        """Requests at once: the most that there were; how many would fit at what one reserved on
        average; how many rows of max_seq_len."""
        peak = max([s.running for s in self.samples], default=0)
        reserved = sum(s.reserved for s in self.samples)
        fits = self.budget * sum(s.running for s in self.samples) // (reserved or 1)
        return {"peak": peak, "fits": fits, "naive_fits": self.naive_fits}

    def load(self, requests):
        """How many requests came, seconds from the first to the last, the most that waited; and of
        each step, when it was over, how many ran and waited."""
        came = [r.arrived for r in requests if r.arrived <= time.perf_counter()]
        steps = {name: [getattr(s, name) for s in self.samples] for name in Sample._fields[:3]}
        counts = {"came": len(came), "came_s": max(came, default=0) - min(came, default=0)}
        return {**counts, "waited": max(steps["waiting"], default=0), **steps}

    def times(self, requests):
        """Seconds, and each request's time to its first token and per token behind that."""
        per_token = []
        for request in requests:
            n = len(request.tokens) - len(request.prompt) - 1
            per_token.append((request.last_token - request.first_token) / n if n > 0 else None)
        generated = sum(len(request.tokens) - len(request.prompt) for request in requests)
        return {
            **{f"{name}_s": value for name, value in self.seconds.items()},
            "tokens_per_s": generated / (sum(self.seconds.values()) or 1),
            "steps": len(self.samples),
            "first_token_s": [request.first_token for request in requests],
            "per_token_s": per_token,
        }

    def report(self, requests, decode, stop, cache=None):
        """Print the answers, then the statistics; both go into --json FILE as well.

        decode: tokens to text, without those in stop. cache: one of several tiers, with counts.
        """
        args, responses = self.args, []
        for request in requests:
            answer = request.tokens[len(request.prompt) :]
            text = decode([token for token in answer if token not in stop]).strip()
            responses.append({"prompt_tokens": len(request.prompt), "tokens": answer, "text": text})
        git = f'git -C "{Path(__file__).parent}" rev-parse --short HEAD 2>/dev/null'
        result = {
            "script": Path(sys.argv[0]).name, "model": args.model.resolve().name,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
            "dtype": args.dtype, "torch": torch.__version__, "commit": subprocess.getoutput(git),
            "args": vars(args), "requests": len(requests),
            "prompt_tokens": sum(response["prompt_tokens"] for response in responses),
            "generated_tokens": sum(len(response["tokens"]) for response in responses),
            "preemptions": self.preemptions, "kv": self.memory(), "max_batch": self.batches(),
            "load": self.load(requests), "time": self.times(requests),
        }  # fmt: skip
        if cache:
            later = [request.first_token for request in requests if request.place[1] > 0]
            size = cache.block_size * self.bytes_per_token
            result["tiers"] = {"shared": 0, "fetched": 0, "spilled": 0, **cache.counts}
            result["tiers"] |= {"block_bytes": size, "later_first_token_s": later}
        if args.json:  # First: whoever reads what is printed may have seen enough.
            with or_exit(f"--json {args.json} cannot be written"):
                whole = {**result, "responses": responses}
                Path(args.json).write_text(json.dumps(whole, indent=1, default=str))
        self.show(result, requests, responses)

    def show(self, result, requests, responses):
        """Print the answers and the statistics."""
        sys.stdout.reconfigure(errors="replace")  # Whatever the terminal can show.
        print(end="\r\033[K" if sys.stderr.isatty() else "", file=sys.stderr)
        for i, (request, response) in enumerate(zip(requests, responses, strict=True), 1):
            lines = [textwrap.fill(line, 100) for line in response["text"].splitlines()]
            print(f"\n[{i}] {' '.join(request.text.split())[:95]}\n", *lines, sep="\n")
        if tiers := result.get("tiers"):
            down, up = (tiers[way] * tiers["block_bytes"] / 1e9 for way in ("spilled", "fetched"))
            waits = [wait for wait in tiers["later_first_token_s"] if wait]
            later = f"{median(waits):.2f} s to their first token (median)" if waits else "none"
            hits = tiers["shared"] / (tiers["shared"] + tiers["fetched"] or 1)
            print(TIERS.format(**tiers, down=down, up=up, later=later, hits=hits), end="")
        flat = {**result, **result["kv"], **result["max_batch"], **result["load"], **result["time"]}
        gb = {key: value / 1e9 for key, value in result["kv"].items()}
        firsts = sorted(first for first in flat["first_token_s"] if first) or [0]
        each = 1000 * median([each for each in flat["per_token_s"] if each] or [0])
        slow = firsts[math.ceil(0.99 * len(firsts)) - 1]
        share = flat["manager_s"] / (sum(self.seconds.values()) - flat["idle_s"] or 1)
        more = {"share": share, "first": median(firsts), "slow": slow, "each": each}
        print(REPORT.format(**flat, **more, gb=gb), flush=True)
