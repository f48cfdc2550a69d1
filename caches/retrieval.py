"""What leaves the window comes back: top-k blocks out of DRAM, as the queries want them.

Throughout this file
    T  new tokens of a request in this step      H    query heads
    L  layers                                    Hkv  key and value heads, H / Hkv share one
    n  blocks that have left the window          D    size of a head
"""

from collections import Counter, OrderedDict

import torch

from kvcache import BlockPool, WindowCache, blocks_for


def bounds_of(keys):
    """The largest and the smallest number in each dimension of keys (..., block_size, D)."""
    return torch.stack([keys.amax(-2), keys.amin(-2)])  # (2, ..., D)


def highest_scores(q, bounds):
    """Scores (Hkv, T, n) of queries (Hkv, T, D) with blocks whose bounds are (2, Hkv, n, D).

    In each dimension with the bound that scores higher: no key of the block has a higher score
    (Quest, Tang et al. 2024, section 3.3).
    """
    largest, smallest = bounds
    columns = q.transpose(1, 2)  # In this order a product is 3 times as fast on a CPU.
    scores = largest @ columns.clamp(min=0) + smallest @ columns.clamp(max=0)
    return scores.transpose(1, 2)


def top_blocks(q, bounds, keys_of, top_k):
    """The numbers of the top_k blocks that q (Hkv, T, D) wants, of n with bounds (2, Hkv, n, D).

    Each query divides its attention over the blocks, and a block counts as much as the most that it
    gets from any query of any head. If n > 4 top_k that is done twice: by the highest scores that
    the blocks could have, to find 4 top_k candidates, and by the scores of their keys, to choose
    among these. (Bounds are far above the keys in heads as small as SmolLM2's: by them alone, 14 of
    20 needles were found in 2,000 tokens with room for an eighth.) top_k is at most n.

    keys_of(numbers): the keys of these blocks (blocks, Hkv, block_size, D), wherever they are.
    """
    numbers = list(range(bounds.shape[2]))
    if len(numbers) > 4 * top_k:
        shares = highest_scores(q, bounds).float().softmax(2).amax((0, 1))
        numbers = shares.topk(4 * top_k).indices.tolist()
    keys = keys_of(numbers).transpose(0, 1)  # (Hkv, blocks, block_size, D)
    scores = q.to(keys.device) @ keys.flatten(1, 2).transpose(1, 2)
    shares = scores.float().softmax(2).unflatten(2, keys.shape[1:3]).sum(3).amax((0, 1))
    return [numbers[i] for i in shares.topk(top_k).indices.tolist()]


class Away:
    """Of one row, the blocks that have left its window, numbered in the order of the text."""

    def __init__(self, ids, top_k, n_layers):
        self.in_dram = []  # The id in DRAM of each.
        # Blocks in HBM for those that are back, and for the bounds of all.
        self.slots, self.bounds = ids[:top_k], ids[top_k:]
        # Which block is in which slot, {number: slot}, differs from layer to layer. The least
        # recently used first.
        self.held = [OrderedDict() for _ in range(n_layers)]


class RetrievalCache(WindowCache):
    """A WindowCache that remembers: what leaves the window waits in DRAM, its bounds in HBM.

    In each step and layer, the blocks that the new queries want most come back into slots of the
    row's own; what was chosen before and is there still need not be copied. Keys keep their
    positions, so that with room for all blocks this is full attention.
    """

    def __init__(self, n_dram, top_k, sink, window, chunk, *others):
        """n_dram: blocks in DRAM; top_k: tokens that come back. The others as WindowCache's."""
        super().__init__(sink, window, chunk, lambda keys, by: keys, *others)
        size, width = self.block_size, self.block_table.shape[1]
        # The most blocks that leave a row, and that come back to it at a time.
        self.n_far = max(0, (width * size + 1 - window) // size - self.sink)
        self.top_k = min(self.n_far, blocks_for(top_k, size))
        # The bounds of a block are kept as a token's key (the largest) and value (the smallest).
        self.n_beside = self.top_k + blocks_for(self.n_far, size)
        block = self.kv.shape[:2] + self.kv.shape[3:]
        self.dram = torch.empty(n_dram, *block, dtype=self.kv.dtype)
        self.dram_pool, self.away = BlockPool(n_dram), {}
        self.counts = Counter(shared=0, fetched=0, spilled=0, dropped=0)  # Blocks.

    def can_admit(self, tokens):
        n_hbm, n_dram = self.row_blocks + self.n_beside, (len(self.away) + 1) * self.n_far
        return n_hbm <= self.n_free() and n_dram <= len(self.dram)

    def admit(self, tokens):
        row, ids = super().admit(tokens), self.alloc(self.n_beside)
        self.away[row] = Away(ids, self.top_k, len(self.kv))
        return row

    def evict(self, row, n):
        """The n blocks behind the sink go to DRAM. The sink stays as it is."""
        ids, away = self.block_table[row, self.sink : self.sink + n].tolist(), self.away[row]
        numbers = torch.arange(len(away.in_dram), len(away.in_dram) + n)
        away.in_dram += self.dram_pool.alloc(n)
        self.dram[away.in_dram[-n:]] = self.kv[:, :, ids].movedim(2, 0).to("cpu")
        blocks = torch.tensor(away.bounds)[numbers // self.block_size]
        bounds = bounds_of(self.kv[:, 0, ids])  # (2, L, n, Hkv, D)
        bounds = bounds.permute(2, 1, 0, 3, 4)  # (n, L, 2, Hkv, D)
        for block, number, both in zip(blocks, numbers, bounds, strict=True):
            self.kv[:, :, block, :, number % self.block_size] = both
        super().evict(row, n)
        self.counts.update(spilled=n, dropped=-n)  # Not lost, as WindowCache.evict() counts.

    def choose(self, layer, row, q):
        """The numbers of the blocks that q (T, H, D) wants back. Their keys are read in DRAM."""
        away, (T, _, D), Hkv = self.away[row], q.shape, self.kv.shape[3]
        n = len(away.in_dram)
        if n <= self.top_k:
            return range(n)
        bounds = self.kv[layer][:, away.bounds[: blocks_for(n, self.block_size)]]
        bounds = bounds.transpose(1, 2).flatten(2, 3)[:, :, :n]  # (2, Hkv, n, D)
        q = (q * D**-0.5).view(T, Hkv, -1, D).transpose(0, 1).flatten(1, 2)

        def keys_of(numbers):  # index_select is twice as fast as self.dram[ids, layer, 0].
            ids = torch.tensor([away.in_dram[number] for number in numbers])
            return self.dram[:, layer, 0].index_select(0, ids)

        return top_blocks(q, bounds, keys_of, self.top_k)

    def fetch(self, layer, row, numbers):
        """Bring these blocks into HBM, where they are not there; returns their slots."""
        away, held = self.away[row], self.away[row].held[layer]
        absent = [number for number in numbers if number not in held]
        for number in numbers:
            if number in held:
                held.move_to_end(number)
        for number in absent:  # What was there and is wanted has moved to the end, out of reach.
            full = len(held) == len(away.slots)
            held[number] = held.popitem(last=False)[1] if full else away.slots[len(held)]
        if absent:
            blocks = self.dram[[away.in_dram[number] for number in absent], layer].transpose(0, 1)
            self.kv[layer][:, [held[number] for number in absent]] = blocks.to(self.kv.device)
        L = len(self.kv)  # Counted in blocks of all layers; shared: hits, fetched: misses.
        self.counts["fetched"] += len(absent) / L
        self.counts["shared"] += (len(numbers) - len(absent)) / L
        return [held[number] for number in numbers]

    def retrieve(self, layer, rows, q, cache_seqlens, block_table):
        """Lengths and tables of these rows (a list) with the blocks that q (B, T, H, D) wants back.

        cache_seqlens (B,) and block_table (B, width) are tables()'. What comes back stands between
        the sink and the window, in any order, since these keys have their positions.
        """
        tables, lengths = [], []
        for i, (row, ids) in enumerate(zip(rows, block_table.tolist(), strict=True)):
            slots = self.fetch(layer, row, self.choose(layer, row, q[i]))
            padding = [0] * (self.top_k - len(slots))  # Behind the row's end.
            tables.append(ids[: self.sink] + slots + ids[self.sink :] + padding)
            lengths.append(len(slots) * self.block_size)
        lengths, tables = cache_seqlens.new_tensor(lengths), block_table.new_tensor(tables)
        return {"cache_seqlens": cache_seqlens + lengths, "block_table": tables}

    def usage(self):
        reserved, used = super().usage()
        back = sum(min(self.top_k, len(away.in_dram)) for away in self.away.values())
        return reserved, used - (len(self.away) * self.n_beside - back) * self.block_size

    def release(self, row):
        away = self.away.pop(row)
        self.pool.free(away.slots + away.bounds)
        self.dram_pool.free(away.in_dram)
        super().release(row)
