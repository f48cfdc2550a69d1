"""What DRAM below HBM is worth: llama3-tiered.py's store against computing again.

    python bench/tiers.py                        half an hour on two cores
    python bench/tiers.py --tokens 4000          the first table for one length only

1. Time to first token when the tiers hold the first 80% of each prompt, in HBM or in DRAM, against
   computing all of it: UCM's table. The mean over the requests, which arrive at once. The limit is
   80% in HBM: only the last fifth is computed, and nothing has to be moved.
2. What it takes a preempted request to reach its next token: by swap (its blocks go to DRAM, wait
   there and come back) and by computing its context again.

The prompts are random tokens, and what the store holds is random numbers, which take as long as
any. Contexts beyond the model's own (8,192) give times like others. Medians of --rounds, the ways
in turn; of fewer rounds for prompts of more than 4,000 tokens.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import plot
import torch
from common import RESULTS, load_script, save

from inputs import Turn
from kvcache import TieredCache, blocks_for

TOKENS, REQUESTS, CONTEXTS = (
    (4000, 8000, 16000),
    (1, 2, 4),
    (64, 128, 256, 512, 1024, 2048, 4096, 8192),
)
WAYS = ("computed", "HBM", "DRAM")
# Unified Cache Manager's README, DRAM store: how much sooner at 80% hits, by (tokens, requests).
UCM = {
    (4000, 1): 2.31, (4000, 2): 2.66, (4000, 4): 2.76,
    (8000, 1): 2.65, (8000, 2): 2.81, (8000, 4): 2.90,
    (16000, 1): 1.98, (16000, 2): 1.88, (16000, 4): 2.10,
}  # fmt: skip


class Bench:
    """The model and what its script needs around it."""

    def __init__(self):
        self.script = load_script("llama3-tiered")
        self.args = self.script.parser.parse_args(["1", "--max-new-tokens", "1"])
        self.args.max_seq_len = 10**6
        self.model, _, _ = self.script.load(self.args)
        self.params = self.model[0]
        self.size = self.script.block_size_for(self.args, 16)
        self.seed = 0

    def dtype(self):
        return getattr(torch, self.args.dtype)

    def cache(self, n_tokens, n_requests):
        """Both tiers have room for all requests, HBM for a block more each."""
        n_blocks = n_requests * (blocks_for(n_tokens, self.size) + 1)
        layers, heads, dim = (self.params[name] for name in ("n_layers", "n_kv_heads", "dim"))
        shape, place = (
            (layers, heads, dim // self.params["n_heads"]),
            (self.dtype(), self.args.device),
        )
        paged = (n_blocks, self.size, n_requests, n_tokens + 1, shape, *place)
        return TieredCache(n_blocks, None, *paged)

    def prompt(self, n_tokens):
        """Random tokens, other ones each time."""
        self.seed += 1
        g = torch.Generator().manual_seed(self.seed)
        return torch.randint(1000, self.params["vocab_size"], (n_tokens,), generator=g).tolist()

    def store(self, cache, tokens):
        """Let the store hold these tokens, in HBM."""
        cache.admit(tokens)
        for block in cache.block_table[0, : cache.n_owned[0]].tolist():
            cache.kv[:, :, block].normal_()
        cache.commit(0, tokens, last=True)
        cache.release([0])

    def spill(self, cache):
        """Take all of HBM, so that everything leaves it; returns the seconds that this takes."""
        start = time.perf_counter()
        cache.pool.free(cache.pool.alloc(cache.pool.n_free()))
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self):
        if self.args.device == "cuda":
            torch.cuda.synchronize()

    def first_token(self, cache, prompts):
        """Mean seconds from the arrival of all prompts to the first token of each."""
        stats = self.script.Stats.__new__(self.script.Stats)
        stats.seconds, stats.preemptions = dict.fromkeys(("prefill", "decode", "manager"), 0.0), 0
        stats.sample = lambda *_: None
        turns = [Turn((i, 0), "", prompt, []) for i, prompt in enumerate(prompts)]
        self.script.generate(self.model, cache, turns, set(), self.args, stats)
        return statistics.mean(turn.first_token for turn in turns)

    def hit(self, way, n_tokens, n_requests):
        """Seconds to the first token with 80% of the prompts in this tier."""
        cache = self.cache(n_tokens, n_requests)
        prompts = [self.prompt(n_tokens) for _ in range(n_requests)]
        kept = n_tokens * 4 // 5 // self.size * self.size
        for prompt in prompts if way != "computed" else []:
            self.store(cache, prompt[:kept])
        if way == "DRAM":
            self.spill(cache)
        seconds = self.first_token(cache, prompts)
        blocks = kept // self.size * n_requests
        found = cache.counts["shared"], cache.counts["fetched"]
        assert found == {"computed": (0, 0), "HBM": (blocks, 0), "DRAM": (0, blocks)}[way]
        return seconds

    def resume(self, way, n_tokens):
        """Seconds a preempted request of n_tokens costs until its next token."""
        cache, tokens = self.cache(n_tokens + 1, 1), self.prompt(n_tokens + 1)
        away = 0.0
        if way == "swap":
            self.store(cache, tokens[:-1])
            away = self.spill(cache)
        return away + self.first_token(cache, [tokens])

    def bandwidths(self, n_tokens):
        """GB/s (1e9 bytes) to DRAM and back to HBM."""
        cache, tokens = self.cache(n_tokens + 1, 1), self.prompt(n_tokens + 1)
        self.store(cache, tokens[:-1])
        down = self.spill(cache)
        start = time.perf_counter()
        cache.admit(tokens)
        self.synchronize()
        up = time.perf_counter() - start
        return [len(tokens) // self.size * cache.dram[0].nbytes / s / 1e9 for s in (down, up)]


def print_tables(result):
    print(
        "\nSeconds to the first token; 80% of the prompt in a tier; how much sooner than computed"
    )
    print("tokens  requests   computed     HBM    DRAM   DRAM/HBM     ours    limit      UCM")
    for case in result["first_token"]:
        full, hbm, dram = (case["seconds"][way] for way in WAYS)
        n, requests = case["tokens"], case["requests"]
        ucm = f"{UCM[n, requests]:+9.0%}" if (n, requests) in UCM else f"{'-':>9}"
        print(f"{n:6,}{requests:10}{full:11.2f}{hbm:8.2f}{dram:8.2f}{dram / hbm:11.2f}"
              f"{full / dram - 1:+9.0%}{full / hbm - 1:+9.0%}{ucm}")  # fmt: skip
    down, up = result["gb_per_s"]
    print(f"Copies of 8,192 tokens: {down:.1f} GB/s to DRAM, {up:.1f} GB/s back.")
    if result["resume"]:
        print("\nMilliseconds to the next token of a preempted request")
        print("context      swap   recompute   ratio")
    for case in result["resume"]:
        swap, again = case["swap"] * 1000, case["recompute"] * 1000
        print(f"{case['context']:7,}{swap:10.1f}{again:12.1f}{again / swap:8.2f}")


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="N")
    parser.add_argument("--requests", nargs="+", type=int, default=REQUESTS, metavar="N")
    parser.add_argument("--contexts", nargs="*", type=int, default=CONTEXTS, metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "tiers.json", metavar="FILE")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="print and draw an earlier result"
    )
    args = parser.parse_args()
    if args.show:
        result = json.loads(args.show.read_text())
        print_tables(result)
        plot.draw("tiers", args.show)
        return
    bench = Bench()
    bench.hit("computed", 512, 1)  # Warms up.
    gb_per_s = [bench.bandwidths(8192) for _ in range(args.rounds)]
    gb_per_s = [statistics.median(values) for values in zip(*gb_per_s, strict=True)]
    result = {"rounds": args.rounds, "gb_per_s": gb_per_s, "first_token": [], "resume": []}
    for context in args.contexts:
        seconds = {"swap": [], "recompute": []}
        for _ in range(args.rounds):
            for way, values in seconds.items():
                values.append(bench.resume(way, context))
        medians = {way: statistics.median(values) for way, values in seconds.items()}
        result["resume"].append({"context": context, **medians})
        save(args.json, result)
    for n_tokens in args.tokens:
        for n_requests in args.requests:
            seconds = {way: [] for way in WAYS}
            for _ in range(max(1, args.rounds * 4000 // n_tokens)):
                for way, values in seconds.items():
                    values.append(bench.hit(way, n_tokens, n_requests))
            medians = {way: statistics.median(values) for way, values in seconds.items()}
            case = {"tokens": n_tokens, "requests": n_requests, "seconds": medians}
            result["first_token"].append(case)
            save(args.json, result)
            print(f"{n_tokens} tokens, {n_requests} requests: {medians}", flush=True)
    print_tables(result)
    plot.draw("tiers", args.json)


if __name__ == "__main__":
    main()
