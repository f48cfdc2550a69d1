"""What managing memory costs, without a model.

    python bench/manager.py

step    microseconds that the block manager takes per decode step, by batch and context. A step is
        what llama3-paged.py does around the model: let rows grow, hand out the tables, count the
        new tokens, read the statistics. Every row needs a new block once in block_size steps; the
        rows' lengths are spread so that in each step an equal share of them does. The median over
        rounds of the mean over block_size steps, and the ratio to batch 8 at context 100.
map     microseconds to map and unmap a page of llama3-virtual.py, of 4 KiB and 2 MiB, 60 at a time
"""

import json
import mmap
import statistics
import time

import torch
from common import arguments, in_turn, save, table

from kvcache import PagedCache
from support.pages import CudaPages, HostPages

BLOCK_SIZE, WARM_UP, ROUNDS = 16, 5, 40
BATCHES, CONTEXTS = (1, 8, 64, 512), (100, 8000)


def step(batch, context):
    """Median over ROUNDS rounds of BLOCK_SIZE steps, for rows of about `context` tokens."""
    longest = context + BLOCK_SIZE * (WARM_UP + ROUNDS + 1)
    n_blocks = batch * (longest // BLOCK_SIZE + 1)
    cache = PagedCache(n_blocks, BLOCK_SIZE, batch, longest, (1, 1, 1), torch.float32, "cpu")
    for i in range(batch):
        tokens = [0] * (context + i % BLOCK_SIZE)
        row = cache.admit(tokens)
        cache.advance({row: tokens})
    rounds, new = [], {row: [0] for row in range(batch)}
    for _ in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        for _ in range(BLOCK_SIZE):
            assert cache.can_grow(), "the pool is made for all rounds"
            cache.grow()
            cache.positions().tolist()
            cache.tables(list(new))
            cache.advance(new)
            cache.usage()
        rounds.append((time.perf_counter() - start) / BLOCK_SIZE * 1e6)
    return statistics.median(rounds[WARM_UP:])


def mapping(page_kb, device, n=4096):
    """Microseconds to map and to unmap a page, of n pages of 4 KiB, or fewer that are larger."""
    n = max(60, n * 4 // page_kb // 60 * 60)
    size = (n, page_kb * 1024)
    pages = CudaPages(*size, n) if device == "cuda" else HostPages(*size)

    def call(name):
        start = time.perf_counter()
        for first in range(0, n, 60):
            getattr(pages, name)(list(range(first, first + 60)))
        return 1e6 * (time.perf_counter() - start) / n

    return in_turn(["map", "unmap"], 5, call)


def print_tables(result):
    print("Microseconds of the block manager per decode step")
    of, rows = result["microseconds"], []
    for batch in BATCHES:
        short, long = (of[f"{batch} x {context}"] for context in CONTEXTS)
        ratio = short / of["8 x 100"]
        rows.append({"batch": batch, "context 100": short, "8,000": long, "vs. batch 8": ratio})
    table(rows)
    print("\nMicroseconds to map and to unmap a page")
    table(result["map"])


def main():
    args = arguments(__doc__, "manager").parse_args()
    if args.show:
        return print_tables(json.loads(args.json.read_text()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [2048] if device == "cuda" else [mmap.PAGESIZE // 1024, 2048]
    result = {
        "microseconds": {f"{b} x {c}": step(b, c) for b in BATCHES for c in CONTEXTS},
        "map": [{"page_kb": kb, **mapping(kb, device)} for kb in sizes],
    }
    save(args.json, result)
    print_tables(result)


if __name__ == "__main__":
    main()
