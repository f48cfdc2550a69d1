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

import statistics
import time
from functools import partial
from itertools import product

import torch
from common import arguments, earlier, in_turn, load_script, save, table

from kvcache import TieredCache, blocks_for
from support.arguments import run
from support.prompts import Request

# Unified Cache Manager's README, DRAM store: how much sooner at 80% hits, by (tokens, requests).
UCM = {
    (4000, 1): 2.31, (4000, 2): 2.66, (4000, 4): 2.76,
    (8000, 1): 2.65, (8000, 2): 2.81, (8000, 4): 2.90,
    (16000, 1): 1.98, (16000, 2): 1.88, (16000, 4): 2.10,
}  # fmt: skip
CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Bench:
    """The model, and a cache for each measurement."""

    def __init__(self, *options):
        self.script = load_script("llama3-tiered")
        options = ["1", "--max-new-tokens", "1", "--max-seq-len", "1000000", *options]
        self.args = self.script.parser.parse_args(options)
        self.model, _, _ = self.script.load(self.args)
        self.size = self.script.block_size_for(self.args, 16)
        self.stats = self.script.Stats(self.args, self.model[0])
        self.stats.sample = lambda *_: None  # It would show the progress.
        self.random = torch.Generator().manual_seed(0)

    def cache(self, n_tokens, n_requests):
        """Both tiers have room for all requests, HBM for a block more each."""
        n_blocks = n_requests * (blocks_for(n_tokens, self.size) + 1)
        rows = (self.size, n_requests, n_tokens + 1)
        place = (self.stats.shape, self.stats.dtype, self.args.device)
        return TieredCache(n_blocks, n_blocks, *rows, *place)

    def prompt(self, n_tokens):
        """Random tokens, other ones each time."""
        n = len(self.model[1]["tok_embeddings"])
        return torch.randint(n, (n_tokens,), generator=self.random).tolist()

    def store(self, cache, tokens):
        """Let HBM hold these tokens."""
        row = cache.admit(tokens)
        for block in cache.block_table[row, : cache.n_owned[row]].tolist():
            cache.kv[:, :, block].normal_()
        cache.advance({row: tokens})
        cache.release(row)

    def spill(self, cache):
        """Take all of HBM, so that everything leaves it; returns the seconds that this takes."""
        start = time.perf_counter()
        cache.pool.free(cache.alloc(cache.n_free()))
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def first_token(self, cache, prompts):
        """Mean seconds from the arrival of all prompts to the first token of each."""
        requests = [Request((i, 0), "", prompt, [], self.args) for i, prompt in enumerate(prompts)]
        chat = {"stop": set()}
        self.script.generate(self.model, cache, requests, chat, self.args, self.stats)
        return statistics.mean(request.first_token for request in requests)

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


def print_tables(result):
    print("\nSeconds to the first token with 80% of the prompt in a tier; how much sooner that is")
    rows = []
    for case in result.get("first_token", []):
        n, requests, seconds = case["tokens"], case["requests"], case["seconds"]
        rows.append({
            "tokens": n, "requests": requests, **seconds,
            "ours": seconds["computed"] / seconds["DRAM"] - 1,
            "limit": seconds["computed"] / seconds["HBM"] - 1, "UCM": UCM.get((n, requests)),
        })  # fmt: skip
    table(rows)
    print("\nSeconds to the next token of a preempted request")
    cases = result.get("resume", [])
    table([{**case, "ratio": case["recompute"] / case["swap"]} for case in cases])


@torch.inference_mode()
def main():
    parser = arguments(__doc__, "tiers")
    add = parser.add_argument
    add("--tokens", nargs="+", type=int, default=(4000, 8000, 16000), metavar="N")
    add("--requests", nargs="+", type=int, default=(1, 2, 4), metavar="N")
    add("--contexts", nargs="*", type=int, default=CONTEXTS, metavar="N")
    add("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.show:
        return print_tables(earlier(args.json))
    bench = Bench()
    bench.hit("computed", 512, 1)  # Warms up.
    result = {"rounds": args.rounds, "first_token": [], "resume": []}
    for n in args.contexts:
        measure = partial(bench.resume, n_tokens=n)
        seconds = in_turn(["swap", "recompute"], args.rounds, measure)
        result["resume"].append({"context": n, **seconds})
        save(args.json, result)
    for n, requests in product(args.tokens, args.requests):
        ways, rounds = ["computed", "HBM", "DRAM"], args.rounds * 4000 // max(n, 4000)
        measure = partial(bench.hit, n_tokens=n, n_requests=requests)
        seconds = in_turn(ways, max(1, rounds), measure)
        result["first_token"].append({"tokens": n, "requests": requests, "seconds": seconds})
        save(args.json, result)
        print(f"{n} tokens, {requests} requests: {seconds}", flush=True)
    print_tables(result)


if __name__ == "__main__":
    run(main)
