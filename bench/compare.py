"""Everything beside everything: one table of all strategies on the same prompts and budget.

    python bench/compare.py                             everything: 13 to 30 minutes on two cores
    python bench/compare.py --only naive paged --requests 20 --json some.json

naive       llama3-naive.py, as many requests at a time as there is room for
virtual     llama3-virtual.py, as paged is llama3-paged.py, and tiered llama3-tiered.py, which has
            a seventh of the budget, with DRAM below it
window      llama3-tiered.py in the whole budget, with a sink of 16 tokens and a window of 240
retrieval   the same with a window of 64, and 176 tokens from DRAM
int8 ...    llama3-paged.py with --compress int8, int4, minicache

Each runs in a process of its own; what fails is a column that says so. The JSON file is written
after each run, and --only measures some columns of it again. `most at once` is the largest number
of requests of which none waits for another's end: found by running the script's loop with a model
that chooses tokens without computing anything, so that all answers are of full length. `ms per
token after it` is the median of the requests' means; peak memory the process's resident set. What
window, retrieval and the compressed ones lose is measured by bench/quality.py.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import apart, arguments, earlier, facts, load_script, run_script, save, table

from caches.compressed import CODECS
from support.arguments import at_least, run
from support.checkpoint import SMOLLM2
from support.prompts import PROMPTS

STRATEGIES = {  # Script and options
    "naive": "llama3-naive",
    "virtual": "llama3-virtual",
    "paged": "llama3-paged",
    "tiered": "llama3-tiered",
    "window": "llama3-tiered --sink 16 --window 240",
    "retrieval": "llama3-tiered --sink 16 --window 64 --top-k 176 --dram-gb 8",
    **{codec: f"llama3-paged --compress {codec}" for codec in CODECS},
}


# --- Runs, each in a process of its own -----------------------------------------------------------


def options_for(name, args):
    """What the script of a strategy gets, but for the number of requests."""
    gb = args.kv_gb / 7 if name == "tiered" else args.kv_gb
    _, *own = STRATEGIES[name].split()
    shared = ["--kv-gb", gb, "--max-new-tokens", args.max_new_tokens, "--model", args.model]
    return [str(option) for option in (*shared, *own)]


def run_strategy(name, args, first, end, *options):
    """What a strategy's script writes as JSON about the prompts first .. end - 1."""
    said = json.loads(PROMPTS.read_text())
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([said[n % len(said)] for n in range(first, end)], file)
        file.flush()
        options = [*options_for(name, args), "--prompts", file.name, *options]
        return run_script(load_script(STRATEGIES[name].split()[0]), end - first, *options)


def most_at_once(name, args):
    """The largest number of requests of which none has to wait for another's end, or 0."""
    script, options = load_script(STRATEGIES[name].split()[0]), options_for(name, args)
    (params, _), *others = script.load(script.parser.parse_args(["1", *options]))
    script.load = lambda args: ((params, None), *others)
    # A model that computes nothing and says token 100, which ends no answer.
    script.forward = lambda model, new, *_: torch.eye(101)[[100] * len(new)]

    def fit(n):
        try:
            result = run_script(script, n, *options)
        except SystemExit:  # Refused.
            return False
        return result["max_batch"]["peak"] == n and not result["preemptions"]

    few, many = 0, 1
    while fit(many):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fit(middle) else (few, middle)
    return few


# --- Columns --------------------------------------------------------------------------------------


def row_of(results):
    """The figures of runs, each of which began when the one before had ended."""
    first, each, seconds, manager = [], [], 0, 0
    for clock in (result["time"] for result in results):
        first += [seconds + wait for wait in clock["first_token_s"] if wait is not None]
        each += [wait for wait in clock["per_token_s"] if wait is not None]
        seconds += clock["prefill_s"] + clock["decode_s"] + clock["manager_s"]
        manager += clock["manager_s"]
    kvs = [result["kv"] for result in results]
    reserved, used = max((kv["peak_reserved_bytes"], kv["peak_used_bytes"]) for kv in kvs)
    return {
        "max_batch": max(result["max_batch"]["peak"] for result in results),
        "reserved_bytes": reserved, "used_bytes": used,
        "fragmented_of_reserved": 1 - used / reserved,
        "tokens_per_s": sum(result["generated_tokens"] for result in results) / seconds,
        "first_token_s": statistics.median(first),
        "token_ms": 1000 * statistics.median(each),
        "manager_share": manager / seconds,
    }  # fmt: skip


def measure(name, args):
    """A column of the table. Raises RuntimeError where a run fails."""
    most, _ = apart(most_at_once, name, args)
    n, size = args.requests, max(1, most) if name == "naive" else args.requests
    apart(run_strategy, name, args, 0, 1, "--max-new-tokens", 2)  # Compiles what is not yet.
    runs = [apart(run_strategy, name, args, i, min(n, i + size)) for i in range(0, n, size)]
    results, peaks = zip(*runs, strict=True)
    return {"most_at_once": most, **row_of(results), "peak_memory_bytes": max(peaks), "on": facts()}


TABLE = {  # What is printed: which figure, times what, and how
    "max batch in this run": ("max_batch", 1, "{:d}"),
    "most at once": ("most_at_once", 1, "{:d}"),
    "reserved, GB": ("reserved_bytes", 1e-9, "{:.3f}"),
    "used, GB": ("used_bytes", 1e-9, "{:.3f}"),
    "fragmented, of reserved": ("fragmented_of_reserved", 1, "{:.1%}"),
    "tokens/s": ("tokens_per_s", 1, "{:.0f}"),
    "first token, s": ("first_token_s", 1, "{:.2f}"),
    "ms per token after it": ("token_ms", 1, "{:.0f}"),
    "peak memory, GB": ("peak_memory_bytes", 1e-9, "{:.2f}"),
    "manager's share": ("manager_share", 1, "{:.2%}"),
}


def print_table(columns):
    rows = []
    for title, (figure, factor, form) in TABLE.items():
        rows.append({"": title})
        for name, column in columns.items():
            if figure in column:
                rows[-1][name] = form.format(column[figure] * factor)
    table(rows)
    for name, column in columns.items():
        if "error" in column:
            print(f"{name} failed: {column['error']}")


def main():
    parser = arguments(__doc__, "compare")
    add = parser.add_argument
    add("--only", nargs="+", choices=STRATEGIES, metavar="NAME", default=[*STRATEGIES])
    add("--requests", type=at_least(1), default=49, metavar="N")
    add("--max-new-tokens", type=at_least(2), default=256, metavar="LEN")
    add("--kv-gb", type=at_least(0.001, float), default=1.4, metavar="GB")
    add("--model", type=Path, default=SMOLLM2, metavar="DIR")
    args = parser.parse_args()
    asked = {"requests": args.requests, "max_new_tokens": args.max_new_tokens,
             "kv_gb": args.kv_gb, "model": args.model.resolve().name}  # fmt: skip
    if args.show:
        return print_table(earlier(args.json).get("strategies", {}))
    columns = earlier(args.json, asked).get("strategies", {})
    for name in args.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            column = measure(name, args)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            column = {"error": str(error)[:150]}
        if "error" not in column or "error" in columns.get(name, column):  # A measured one stays.
            columns[name] = column
        columns = {known: columns[known] for known in STRATEGIES if known in columns}
        save(args.json, {"asked": asked, "strategies": columns})
    print_table(columns)


if __name__ == "__main__":
    run(main)  # After Ctrl-C, what was measured is in the JSON file.
