"""What the block manager costs per decode step, by batch and context, without a model.

    python bench/manager.py [--json FILE]

A step is what llama3-paged.py does around the model: let rows grow, hand out the tables, count the
new tokens, read the statistics. Every row needs a new block once in block_size steps; the rows'
lengths are spread so that in each step an equal share of them does. Prints the median over rounds
of the mean over block_size steps, in microseconds, and the ratio to batch 8 at context 100.
"""

import argparse
import statistics
import time

import torch
from common import save

from kvcache import PagedCache

BLOCK_SIZE, WARM_UP, ROUNDS = 16, 5, 40


def microseconds_per_step(batch, context):
    """Median over ROUNDS rounds of BLOCK_SIZE steps, for rows of about `context` tokens."""
    longest = context + BLOCK_SIZE * (WARM_UP + ROUNDS + 1)
    n_blocks = batch * (longest // BLOCK_SIZE + 1)
    cache = PagedCache(n_blocks, BLOCK_SIZE, batch, longest, (1, 1, 1), torch.float32, "cpu")
    lengths = [context + row % BLOCK_SIZE for row in range(batch)]
    for length in lengths:
        cache.admit(length)
    cache.advance(lengths)
    rounds, new = [], [[0]] * batch
    for _ in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        for _ in range(BLOCK_SIZE):
            assert cache.can_grow(), "the pool is made for all rounds"
            cache.grow()
            cache.tables()
            cache.advance([len(tokens) for tokens in new])
            cache.usage()
            cache.release([])
        rounds.append((time.perf_counter() - start) / BLOCK_SIZE * 1e6)
    return statistics.median(rounds[WARM_UP:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    contexts, batches = (100, 8000), (1, 8, 64, 512)
    result = {f"{b} x {c}": microseconds_per_step(b, c) for b in batches for c in contexts}
    print("microseconds per decode step\nbatch   context 100   context 8,000   vs. batch 8")
    for batch in batches:
        short, long = (result[f"{batch} x {context}"] for context in contexts)
        print(f"{batch:5} {short:13.1f} {long:15.1f} {short / result['8 x 100']:12.2f}")
    if args.json:
        save(args.json, {"microseconds": result})


if __name__ == "__main__":
    main()
