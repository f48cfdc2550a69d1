"""Requests that arrive at random: up to which rate does each memory manager keep up?

    python bench/serve.py                     three quarters of an hour on two cores
    python bench/serve.py --only naive paged --rates 0.5 1 2 --rounds 1 --json some.json

The strategies are those of bench/compare.py. In a round, each gets the same prompts at the same
moments, R a second on average (--rate), and before that the first 8 of them one at a time: the idle
system. Normalized latency is the mean over the requests of the seconds from a request's arrival to
its last token, over the tokens of its answer (PagedAttention, Kwon et al. 2023, section 6.1). A
strategy keeps up until that is twice the idle system's: a rate between the two measured ones around
it, or the highest one. Medians of the rounds; in brackets the lowest and the highest.
"""

import math
import statistics
import sys
from itertools import pairwise

from common import apart, arguments, earlier, save, table
from compare import STRATEGIES, run_strategy

from support.arguments import at_least, run
from support.checkpoint import SMOLLM2

RATES, ALONE = (0.6, 1.2, 2.4, 4.8, 9.6), 8  # ALONE: requests for the idle system.


def latencies(results):
    """Of all requests of some runs: seconds to the first token, per token after it, normalized."""
    first, each, normalized = [], [], []
    for result in results:
        clock = result["time"]
        first += clock["first_token_s"]
        each += [seconds for seconds in clock["per_token_s"] if seconds is not None]
        lengths = [len(response["tokens"]) for response in result["responses"]]
        of_each = zip(clock["first_token_s"], clock["per_token_s"], lengths, strict=True)
        normalized += [(wait + (seconds or 0) * (n - 1)) / n for wait, seconds, n in of_each]
    figures = {"normalized_ms": 1000 * statistics.mean(normalized)}
    for name, values in (("normalized", normalized), ("first", first), ("token", each)):
        values = sorted(1000 * value for value in values)
        figures[f"{name}_50_ms"] = statistics.median(values)
        figures[f"{name}_99_ms"] = values[math.ceil(0.99 * len(values)) - 1]
    return figures


def by_second(load):
    """[seconds, requests running, waiting] of the last step in each second of a run."""
    steps = zip(load["seconds"], load["running"], load["waiting"], strict=True)
    return list({int(step[0]): step for step in steps}.values())


def serve(name, seed, args):
    """The figures of a strategy in a process of its own: alone (rate 0), then at each rate."""
    run_strategy(name, args, 0, 1)  # Warms up.
    alone = [run_strategy(name, args, i, i + 1) for i in range(min(ALONE, args.requests))]
    cases = [{"rate": 0, **latencies(alone)}]
    for rate in sorted(args.rates):
        result = run_strategy(name, args, 0, args.requests, "--rate", rate, "--seed", seed)
        cases.append({"rate": rate, **latencies([result]), "steps": by_second(result["load"])})
    return cases


def keeps_up_to(cases):
    """The rate at which normalized latency is twice the idle system's, or the highest one tried."""
    limit = 2 * cases[0]["normalized_ms"]
    for before, after in pairwise(cases):
        low, high = before["normalized_ms"], after["normalized_ms"]
        if high > limit:
            return before["rate"] + (limit - low) / (high - low) * (after["rate"] - before["rate"])
    return cases[-1]["rate"]


def spread(values):
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def print_tables(rounds):
    print("Milliseconds: normalized latency, mean; 50 and 99% of it, to the first token, per token")
    rows, knees = [], {}
    for name, runs in rounds.items():
        for cases in zip(*runs.values(), strict=True):
            of = {key: [case[key] for case in cases] for key in cases[0] if key.endswith("ms")}
            row = {"": name, "rate": cases[0]["rate"], "mean": spread(of["normalized_ms"])}
            for title in ("normalized", "first", "token"):
                middle, slow = (statistics.median(of[f"{title}_{p}_ms"]) for p in (50, 99))
                row[title] = f"{middle:.0f}, {slow:.0f}"
            steps = [step for case in cases for step in case.get("steps", [])]
            row["waited"] = max([waiting for _, _, waiting in steps], default=0)
            rows.append(row)
        knees[name] = {seed: keeps_up_to(cases) for seed, cases in runs.items()}
    table(rows)
    print("\nRequests a second up to which each keeps up")
    rows, naive = [], knees.get("naive", {})
    for name, knee in knees.items():
        ratios = [knee[seed] / naive[seed] for seed in knee.keys() & naive.keys()]
        rows.append({"": name, "rate": spread(knee.values())})
        rows[-1]["over naive's"] = spread(ratios) if ratios else None
    table(rows)


def main():
    parser = arguments(__doc__, "serve")
    add = parser.add_argument
    names = ("naive", "virtual", "paged", "int8", "tiered")
    add("--only", nargs="+", choices=STRATEGIES, metavar="NAME", default=names)
    add("--rates", nargs="+", type=at_least(0.001, float), default=RATES, metavar="R")
    add("--requests", type=at_least(1), default=32, metavar="N")
    add("--rounds", type=at_least(1), default=3)
    parser.set_defaults(max_new_tokens=128, kv_gb=1.4, model=SMOLLM2)
    args = parser.parse_args()
    asked = {"requests": args.requests, "rates": sorted(args.rates)}
    if args.show:
        return print_tables(earlier(args.json).get("rounds", {}))
    rounds = earlier(args.json, asked).get("rounds", {})
    for seed in range(args.rounds):
        for name in args.only:
            print(f"{name}, round {seed + 1} ...", file=sys.stderr, flush=True)
            cases, _ = apart(serve, name, seed, args)
            rounds.setdefault(name, {})[str(seed)] = cases
            save(args.json, {"asked": asked, "rounds": rounds})
    print_tables(rounds)


if __name__ == "__main__":
    run(main)
