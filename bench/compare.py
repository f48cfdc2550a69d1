"""Everything beside everything: one table of all strategies on the same prompts and budget.

    pip install -r bench/requirements.txt
    python bench/compare.py                             everything: 13 minutes on two cores
    python bench/compare.py --only naive paged --requests 20 --json some.json
    python bench/plot.py compare                        draws the figures of the first again

naive       llama3-naive.py, as many requests at a time as there is room for
virtual     llama3-virtual.py
paged       llama3-paged.py
paged-max   the same with as many requests as can run at once
tiered      llama3-tiered.py in a seventh of the budget, with DRAM below it
window      llama3-tiered.py in the whole budget, with a sink of 16 tokens and a window of 240
retrieval   the same with a window of 64, and 176 tokens from DRAM
generate    transformers' generate(), seven requests of similar length at a time, which is faster
            than larger batches (bench/peers.py)

Each runs in a process of its own; what fails is a column that says so. The JSON file is written
after each run, and --only measures some columns of it again. Three rows are not from these runs.
`most at once` is the largest number of requests of which none waits for another's end: found by
running the script's loop with a model that chooses tokens without computing anything, so that all
answers are of full length (for generate: one padded batch, by its size). `perplexity / full` and
`same token as full` compare with full attention what the model makes of 2,048 tokens of Python's
manual, read in chunks of 16. `ms per step` is a run's time over its steps, prefill included; `ms
per token after it` the median of the requests' means; peak memory the process's resident set.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from pathlib import Path

import plot
import torch
from common import REPO, RESULTS, facts, load_script, save

from inputs import SMOLLM2, at_least, or_exit

HBM = 256  # Tokens of a request that window and retrieval keep there.
STRATEGIES = {  # Script, options
    "naive": ("llama3-naive", []),
    "virtual": ("llama3-virtual", []),
    "paged": ("llama3-paged", []),
    "paged-max": ("llama3-paged", []),
    "tiered": ("llama3-tiered", []),
    "window": ("llama3-tiered", ["--sink", 16, "--window", HBM - 16]),
    "retrieval": (
        "llama3-tiered",
        ["--sink", 16, "--window", 64, "--top-k", HBM - 16 - 64, "--dram-gb", 8],
    ),
    "generate": (None, []),
}
PROMPTS = json.loads((REPO / "sharegpt-filtered.json").read_text())
LOSSY = {"window": "sink + window", "retrieval": "retrieval"}  # bench/quality.py's names.


def options_for(name, args):
    """What the script of a strategy gets, but for the number of requests."""
    gb = args.kv_gb / 7 if name == "tiered" else args.kv_gb
    shared = ["--kv-gb", gb, "--max-new-tokens", args.max_new_tokens, "--model", args.model]
    return [str(option) for option in (*shared, *STRATEGIES[name][1])]


# --- The largest batch ----------------------------------------------------------------------------


class Search:
    """Runs a script with a model that computes nothing."""

    def __init__(self, args):
        script = load_script("llama3-paged")
        self.args = args
        script_args = script.parser.parse_args(["1", *options_for("paged", args)])
        (self.params, _), *self.others = script.load(script_args)

    def runs_at_once(self, name, n):
        """Whether none of n requests has to wait for another's end."""
        script = load_script(STRATEGIES[name][0])
        script.load = lambda args: ((self.params, None), *self.others)
        # The logits of rows that take part: token 100, which ends no answer.
        script.forward = lambda model, new, *_: torch.eye(101)[[100] * sum(map(bool, new))]
        silence = contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO()))
        with tempfile.NamedTemporaryFile() as file, silence:
            try:
                script.main([str(n), *options_for(name, self.args), "--json", file.name])
            except SystemExit:  # Refused.
                return False
            result = json.loads(Path(file.name).read_text())
        return result["max_batch"]["peak"] == n and not result["preemptions"]

    def most(self, name):
        """The largest number of requests that run at once."""
        few, many = 0, 1
        while self.runs_at_once(name, many):
            few, many = many, 2 * many
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if self.runs_at_once(name, middle) else (few, middle)
        return few


# --- transformers ---------------------------------------------------------------------------------


def generate(args, file):
    """Write a list of what a script would as JSON: one for each batch of generate().

    A batch's keys and values are tensors as wide as its longest prompt and answer.
    """
    from peers import export
    from transformers import LlamaForCausalLM, StoppingCriteria

    script = load_script("llama3-paged")
    script_args = script.parser.parse_args(["1000", *options_for("generate", args)])
    (params, _), encoding, chat = script.load(script_args)
    _, prompts = script.read_prompts(script_args, encoding, chat)
    stop = [chat["special_tokens"][name] for name in chat["stop"]]
    size = 4 * params["n_layers"] * params["n_kv_heads"] * params["dim"] // params["n_heads"]
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder), args.model)
        model = LlamaForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.bfloat16).eval()

    class Clock(StoppingCriteria):
        """Notes when each step ends, and stops nothing."""

        def __call__(self, ids, scores, **_):
            ends.append(time.perf_counter() - start)
            return torch.zeros(len(ids), dtype=torch.bool)

    results, ordered = [], sorted(prompts[: args.requests], key=len)
    for batch in (ordered[first : first + 7] for first in range(0, len(ordered), 7)):
        width, ends, start = max(map(len, batch)), [], time.perf_counter()
        out = model.generate(
            torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch]),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch]),
            max_new_tokens=args.max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=0,
            stopping_criteria=[Clock()],
        )  # fmt: skip
        made = [  # How many tokens each answer has.
            next((n for n, token in enumerate(answer, 1) if token in stop), len(answer))
            for answer in out[:, width:].tolist()
        ]
        reserved = len(batch) * (width + len(ends) - 1) * size
        live = [len(p) + n - 1 for p, n in zip(batch, made, strict=True) if n == len(ends)]
        results.append({
            "generated_tokens": sum(made), "max_batch": {"peak": len(batch)},
            "kv": {"peak_reserved_bytes": reserved, "peak_used_bytes": sum(live) * size},
            "time": {"prefill_s": 0, "decode_s": time.perf_counter() - start, "manager_s": 0,
                     "steps": len(ends), "first_token_s": [ends[0]] * len(batch),
                     "per_token_s": [(ends[n - 1] - ends[0]) / (n - 1) for n in made if n > 1]},
        })  # fmt: skip
    # As one batch, in the order in which they come.
    widths = accumulate(map(len, prompts), max)
    needs = (n * (width + args.max_new_tokens - 1) * size for n, width in enumerate(widths, 1))
    most = sum(need <= args.kv_gb * 1e9 for need in needs)
    file.write_text(json.dumps({"most_at_once": most, "batches": results}))


# --- Runs -----------------------------------------------------------------------------------------


def apart(function, *args):
    """What function(*args) returns, in a process of its own: this one must stay small.

    (A child counts as at least as large as its parent was when it began.)
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def run(command, file):
    """The JSON that a command writes to file, with its peak resident memory in bytes."""
    with tempfile.TemporaryFile() as err:
        command = [sys.executable, *map(str, command)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        err.seek(0)
        if status:
            lines = err.read().decode(errors="replace").strip().splitlines()
            return {"error": lines[-1][:150] if lines else f"ended with status {status}"}
    unit = 1 if sys.platform == "darwin" else 1024
    return {**json.loads(file.read_text()), "peak_memory_bytes": usage.ru_maxrss * unit}


def row_of(results):
    """The figures of runs, each of which began when the one before had ended."""
    first, each, seconds, manager = [], [], 0, 0
    for clock in (result["time"] for result in results):
        first += [seconds + wait for wait in clock["first_token_s"] if wait is not None]
        each += [wait for wait in clock["per_token_s"] if wait is not None]
        seconds += clock["prefill_s"] + clock["decode_s"] + clock["manager_s"]
        manager += clock["manager_s"]
    first.sort()
    peaks = (
        (kv["peak_reserved_bytes"], kv["peak_used_bytes"]) for kv in (r["kv"] for r in results)
    )
    reserved, used = max(peaks)
    return {
        "max_batch": max(result["max_batch"]["peak"] for result in results),
        "reserved_bytes": reserved, "used_bytes": used,
        "fragmented_of_reserved": 1 - used / reserved,
        "tokens_per_s": sum(result["generated_tokens"] for result in results) / seconds,
        "first_token_s": statistics.median(first),
        "first_token_99_s": first[math.ceil(0.99 * len(first)) - 1],
        "token_ms": 1000 * statistics.median(each),
        "step_ms": 1000 * seconds / sum(result["time"]["steps"] for result in results),
        "manager_share": manager / seconds,
    }  # fmt: skip


def quality(name, args, n=2048):
    """Perplexity relative to full attention, how often the greedy token is the same, HBM."""
    from quality import Bench, policies

    bench = Bench(["1", "--model", str(args.model)])
    tokens = bench.manual(n)
    after, nats, chosen, sizes = torch.tensor(tokens[1:]), [], [], []
    with torch.inference_mode():
        for policy in ({}, policies(HBM)[LOSSY[name]]):
            cache = bench.cache(n, 16, **policy)
            logits = torch.cat(list(bench.read(cache, tokens)))[:-1].cpu()
            nats.append(torch.nn.functional.cross_entropy(logits, after).item())
            chosen.append(logits.argmax(1))
            sizes.append(bench.hbm_bytes(cache))
    same = (chosen[0] == chosen[1]).float().mean().item()
    perplexity = math.exp(nats[1] - nats[0])
    size = {"full": sizes[0], "here": sizes[1]}
    return {"perplexity_of_full": perplexity, "same_token": same, "text_bytes": size}


def most_at_once(name, args):
    return Search(args).most(name)


def measure(name, args, folder):
    """A column of the table."""
    n, file, runs = args.requests, folder / "result.json", []
    if name == "generate":
        command = [__file__, "--generate", file, "--requests", n, *options_for(name, args)]
        runs.append(run(command, file))
        most, results = runs[0].get("most_at_once"), runs[0].get("batches")
    else:
        most = max(1, apart(most_at_once, name, args))
        n = most if name == "paged-max" else n
        for first in range(0, n, most if name == "naive" else n):
            size = min(most, n - first) if name == "naive" else n
            prompts = (PROMPTS * (n // len(PROMPTS) + 1))[first : first + size]
            (folder / "prompts.json").write_text(json.dumps(prompts))
            command = [REPO / f"{STRATEGIES[name][0]}.py", size, *options_for(name, args)]
            command += ["--prompts", folder / "prompts.json", "--json", file]
            runs.append(run(command, file))
        results = runs
    for error in (done["error"] for done in runs if "error" in done):
        return {"error": error}
    row = {"requests": n, "most_at_once": most, **row_of(results)}
    row["peak_memory_bytes"] = max(done["peak_memory_bytes"] for done in runs)
    if name == "generate":
        del row["manager_share"]  # It has no manager.
    return {**row, **(apart(quality, name, args) if name in LOSSY else {}), "on": facts()}


def medians(rows):
    """The median of each figure, of the rounds that did not fail."""
    good = [row for row in rows if "error" not in row]
    if not good:
        return rows[-1]
    names = [name for name in good[0] if name not in ("text_bytes", "on")]
    row = {name: statistics.median_low([row[name] for row in good]) for name in names}
    return {**good[-1], **row, "rounds": len(good)}


# --- Table ----------------------------------------------------------------------------------------

TABLE = {  # What is printed: from which figure, and how
    "requests": ("requests", "{:d}"),
    "max batch in this run": ("max_batch", "{:d}"),
    "most at once": ("most_at_once", "{:d}"),
    "reserved, GB": ("reserved_bytes", "{:.3f}", 1e-9),
    "used, GB": ("used_bytes", "{:.3f}", 1e-9),
    "fragmented, of reserved": ("fragmented_of_reserved", "{:.1%}"),
    "tokens/s": ("tokens_per_s", "{:.0f}"),
    "first token, s": ("first_token_s", "{:.2f}"),
    "99% of them, s": ("first_token_99_s", "{:.2f}"),
    "ms per token after it": ("token_ms", "{:.0f}"),
    "ms per step": ("step_ms", "{:.0f}"),
    "peak memory, GB": ("peak_memory_bytes", "{:.2f}", 1e-9),
    "manager's share": ("manager_share", "{:.2%}"),
    "perplexity / full": ("perplexity_of_full", "{:.3f}"),
    "same token as full": ("same_token", "{:.1%}"),
}


def print_table(rows):
    print(f"{'':24}" + "".join(f"{name:>11}" for name in rows))
    for title, (key, form, *factor) in TABLE.items():
        cells = []
        for name, row in rows.items():
            value, lossless = row.get(key), name not in (*LOSSY, "generate")
            none = "exact" if lossless and key in ("perplexity_of_full", "same_token") else "-"
            cells.append(none if value is None else form.format(value * (factor or [1])[0]))
            cells[-1] = "failed" if "error" in row else cells[-1]
        print(f"{title:24}" + "".join(f"{cell:>11}" for cell in cells))
    for name, row in rows.items():
        if "error" in row:
            print(f"{name}: {row['error']}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=STRATEGIES, metavar="NAME", default=[*STRATEGIES])
    add(
        "--rounds", type=at_least(1), default=1, metavar="N", help="medians of so many, in turn (1)"
    )
    add("--requests", type=at_least(1), default=49, metavar="N")
    add("--max-new-tokens", type=at_least(2), default=256, metavar="LEN")
    add("--kv-gb", type=at_least(0.001, float), default=1.4, metavar="GB")
    add("--model", type=Path, default=SMOLLM2, metavar="DIR")
    add("--json", type=Path, default=RESULTS / "compare.json", metavar="FILE", help="with figures")
    add("--show", type=Path, metavar="FILE", help="print an earlier result")
    add("--generate", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.generate:
        return generate(args, args.generate)
    if args.show:
        with or_exit(f"{args.show} is not a result of bench/compare.py"):
            rows = json.loads(args.show.read_text())["strategies"]
        return print_table(rows)
    asked = {"requests": args.requests, "max_new_tokens": args.max_new_tokens,
             "kv_gb": args.kv_gb, "model": args.model.resolve().name}  # fmt: skip
    rows = {}
    if args.json.exists():
        with or_exit(f"{args.json} is not a result of bench/compare.py; give another --json"):
            before = json.loads(args.json.read_text())
            rows = before["strategies"]
        if before["asked"] != asked:
            sys.exit(f"{args.json} is about {before['asked']}: give another --json.")
    runs = [name for _ in range(args.rounds) for name in args.only]
    measured = {name: [] for name in args.only}
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(runs):
            print(f"{i + 1} of {len(runs)}: {name} ...", end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            try:
                row = measure(name, args, Path(folder))
            except Exception as error:  # A process that died, a result that is none.
                row = {"error": f"{type(error).__name__}: {error}"[:150]}
            measured[name].append(row)
            new = medians(measured[name])
            if "error" not in new or "error" in rows.get(name, new):  # A measured column stays.
                rows[name] = new
            rows = {known: rows[known] for known in STRATEGIES if known in rows}
            with or_exit(f"{args.json} cannot be written"):
                save(args.json, {"asked": asked, "strategies": rows})
            speed = row.get("error") or f"{row['tokens_per_s']:.0f} tokens/s"
            print(f" {speed}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print_table(rows)
    if any("error" not in row for row in rows.values()):
        plot.draw("compare", args.json)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):  # What was measured is in the JSON file.
        os._exit(130)
