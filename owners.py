"""Who has which memory: what --trace FILE records in each step, and bench/replay.py shows.

Each function here looks into one kind of cache and returns its tiers by name, each as

    number of cells, tokens that a cell has room for, {cell: (request, tokens)}

A cell is a row, a block or a group of pages; free ones are left out. request: the number of the one
that has reserved the cell, or SHARED; tokens: how many it has put there. If tokens is KEPT, nobody
uses the cell, but what it holds stays until its room is needed; request: who waits for it, or None.
"""

import json
from pathlib import Path

from kvcache import TieredCache
from window import RetrievalCache, WindowCache

SHARED, KEPT = -1, -1


class Trace:
    """A file of JSON objects, a line each: first about the run, then about its steps.

    {"command", "budget_bytes", "bytes_per_token", "tiers": {name: [number of cells, tokens each]}}
    {"seconds", "running", "reserved_bytes", "used_bytes", "tiers": {name: [changes]}}

    A change is [cell, request, tokens], or [cell] if the cell is free now.
    """

    def __init__(self, file, run, tiers):
        self.file, self.before = Path(file), {name: {} for name in tiers}
        self.file.write_text("")
        self.write({**run, "tiers": {name: sizes for name, (*sizes, _) in tiers.items()}})

    def write(self, line):
        with self.file.open("a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def add(self, step, tiers):
        changes = {}
        for name, (_, _, cells) in tiers.items():
            before, self.before[name] = self.before[name], cells
            changed = [[cell, *owner] for cell, owner in cells.items() if before.get(cell) != owner]
            changes[name] = changed + [[cell] for cell in before if cell not in cells]
        self.write({**step, "tiers": changes})


def rows(n_cells, n_slots, seq_len, live):
    """llama3-naive.py: rows of n_slots. The tokens of a request that has ended are of no use."""
    cells = {row: (row, n if row in live else 0) for row, n in enumerate(seq_len.tolist())}
    return {"HBM": (n_cells, n_slots, cells)}


def blocks(cache, requests):
    """A PagedCache. requests: for each row, the number of its request."""
    size, cells = cache.block_size, {}
    for row, request in enumerate(requests):
        n, ids = int(cache.seq_len[row]), cache.block_table[row, : cache.n_owned[row]].tolist()
        for i, block in enumerate(ids):
            owner = request if cache.pool.ref_count[block] == 1 else SHARED
            cells[block] = owner, min(size, max(0, n - i * size))
    return {"HBM": (len(cache.pool.ref_count), size, cells)}


def pages(cache, requests):
    """A VirtualCache. requests: {row: number} of those that run.

    Where the memory behind a page lies only the system knows: here, in the first cell that was free
    when it was mapped.
    """
    mapped = [(row, i) for row, n in enumerate(cache.n_mapped) for i in range(n)]
    cache.cells = {group: cache.cells.get(group) for group in mapped}
    free = iter(sorted(set(range(cache.n_groups)) - set(cache.cells.values())))
    size, cells = cache.group_bytes / cache.token_bytes, {}
    for (row, i), cell in cache.cells.items():
        cache.cells[row, i] = cell = next(free) if cell is None else cell
        tokens = min(size, max(0, int(cache.seq_len[row]) - i * size))
        needed = i < cache.n_needed[row]
        cells[cell] = (requests[row], round(tokens, 2)) if needed else (None, KEPT)
    return {"HBM": (cache.n_groups, size, cells)}


def tiers(cache, running, waiting):
    """The caches of llama3-tiered.py. A Turn has the number of its conversation."""
    found = blocks(cache, [turn.place[0] for turn in running])
    (_, size, hbm), dram = found["HBM"], {}
    if isinstance(cache, WindowCache):
        # Set aside, but no particular blocks yet: those that would be taken last stand for them.
        spare = iter(cache.pool.free_ids)
        for row, turn in enumerate(running):
            back = cache.away[row].slots if isinstance(cache, RetrievalCache) else []
            hbm.update(dict.fromkeys(back, (turn.place[0], size)))
            for _ in range(cache.row_blocks - int(cache.n_owned[row]) - len(back)):
                hbm[next(spare)] = turn.place[0], 0
    if isinstance(cache, RetrievalCache):
        for away, turn in zip(cache.away, running, strict=True):
            dram.update(dict.fromkeys(away.dram, (turn.place[0], size)))
    if isinstance(cache, TieredCache):
        hbm.update(dict.fromkeys(cache.pool.idle, (None, KEPT)))
        dram = dict.fromkeys(cache.dram_pool.named, (None, KEPT))
        for turn in waiting:
            for block in cache.store.lookup(turn.tokens):
                for place, cells in ((block.hbm, hbm), (block.dram, dram)):
                    owner, tokens = cells.get(place, (None, 0))
                    if tokens == KEPT:
                        cells[place] = turn.place[0] if owner is None else SHARED, KEPT
    if hasattr(cache, "dram_pool"):
        found["DRAM"] = (len(cache.dram_pool.ref_count), size, dram)
    return found
