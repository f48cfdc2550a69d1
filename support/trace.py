"""Who has which memory: what --trace FILE records in each step, and bench/replay.py shows.

Each function here looks into one kind of cache and returns its tiers by name, each as

    number of cells, tokens that a cell has room for, {cell: (request, tokens)}

A cell is a row, a block or a page; free ones are left out. request: the number of the one
that has reserved the cell, or SHARED; tokens: how many it has put there. If tokens is KEPT, nobody
uses the cell, but what it holds stays until its room is needed; request: who waits for it, or None.
"""

import json
from pathlib import Path

SHARED = -1  # In place of a request.
KEPT = -1  # In place of a number of tokens.


class Trace:
    """A file of JSON objects, a line each: first about the run, then about its steps.

    {"command", "budget_bytes", "bytes_per_token", "tiers": {name: [number of cells, tokens each]}}
    {"seconds", "running", "waiting", "reserved_bytes", "used_bytes", "tiers": {name: [changes]}}

    A change is [cell, request, tokens], or [cell] if the cell is free now. waiting: requests.
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


def rows(n_cells, n_slots, batch, seq_len, live):
    """llama3-naive.py: rows of n_slots. The tokens of a request that has ended are of no use."""
    cells = {}
    for row, (request, n) in enumerate(zip(batch, seq_len.tolist(), strict=True)):
        cells[row] = request.place[0], (n if row in live else 0)
    return {"HBM": (n_cells, n_slots, cells)}


def blocks(cache, running):
    """A PagedCache. running: {row: request}. The number of a request is its conversation's."""
    size, cells = cache.block_size, {}
    for row, request in running.items():
        n, ids = int(cache.seq_len[row]), cache.block_table[row, : cache.n_owned[row]].tolist()
        for i, block in enumerate(ids):
            tokens = min(size, max(0, n - i * size))
            known = cells.get(block, (None, 0))[0]
            cells[block] = (request.place[0] if known is None else SHARED), tokens
    found = {"HBM": (cache.kv.shape[2], size, cells)}
    if hasattr(cache, "packed"):  # A CompressedCache: what is free is one piece, for either.
        packed = {}
        for row, request in running.items():
            ids = cache.packed_table[row, : cache.n_packed[row]].tolist()
            packed.update(dict.fromkeys(ids, (request.place[0], size)))
        found["compressed"] = (len(cache.packed.ids), size, packed)
    return found


def pages(cache, running):
    """A VirtualCache. Where the memory behind a page lies only the system knows: here a page has
    the cell of its place among all pages of all rows that have memory."""
    size, cells = cache.page_bytes / cache.token_bytes, {}
    mapped = [(row, i) for row, n in enumerate(cache.n_mapped) for i in range(n)]
    for cell, (row, i) in enumerate(mapped):
        tokens = min(size, max(0, int(cache.seq_len[row]) - i * size))
        needed = i < cache.n_needed[row]
        cells[cell] = (running[row].place[0], round(tokens, 2)) if needed else (None, KEPT)
    return {"HBM": (cache.n_pages, size, cells)}


def tiers(cache, running, waiting):
    """The caches of llama3-tiered.py."""
    found = blocks(cache, running)
    (_, size, hbm), dram = found["HBM"], {}
    if hasattr(cache, "away"):  # A RetrievalCache: what is in DRAM, and back from there.
        for row, away in cache.away.items():
            request, room = running[row].place[0], row * cache.n_far
            dram.update(dict.fromkeys(range(room, room + away.n), (request, size)))
            hbm.update(dict.fromkeys(away.slots[: away.n], (request, size)))
            hbm.update(dict.fromkeys(away.slots[away.n :], (request, 0)))
        found["DRAM"] = (len(cache.dram) * cache.n_far, size, dram)
    if hasattr(cache, "store"):  # A TieredCache: what is kept, and who waits for it.
        hbm.update(dict.fromkeys(cache.idle.values(), (None, KEPT)))
        dram.update(dict.fromkeys(cache.store.ids.values(), (None, KEPT)))
        for request in waiting:
            for key in cache.lookup(request.tokens):
                cells, ids = (hbm, cache.in_hbm) if key in cache.in_hbm else (dram, cache.store.ids)
                owner, tokens = cells[ids[key]]
                if tokens == KEPT:
                    cells[ids[key]] = (request.place[0] if owner is None else SHARED), KEPT
        found["DRAM"] = (len(cache.store.blocks), size, dram)
    return found
