"""What leaves the window comes back: top-k blocks out of DRAM, as the queries want them.

Throughout this file
    T  new tokens of a request in this step,     H    query heads
       or queries of a key head
    L  layers                                    Hkv  key and value heads, H / Hkv share one
    n  blocks that have left the window          D    size of a head
"""

from collections import Counter, OrderedDict

import torch

from kvcache import WindowCache, blocks_for


def bounds_of(keys):
    """The largest and the smallest number in each dimension of keys (..., block_size, D)."""
    return torch.stack([keys.amax(-2), keys.amin(-2)])  # (2, ..., D)


def highest_scores(q, bounds):
    """Scores (Hkv, T, n) of queries (Hkv, T, D) with blocks whose bounds are (2, Hkv, n, D).

    In each dimension with the bound that scores higher: no key of the block has a higher score
    (Quest, Tang et al. 2024, section 3.3).
    """
    largest, smallest = bounds.transpose(2, 3)
    return q.clamp(min=0) @ largest + q.clamp(max=0) @ smallest


def top_blocks(q, keys, bounds, top_k):
    """The numbers of the top_k blocks that q (Hkv, T, D) wants, of the first n with these keys.

    Each query divides its attention over the blocks, and a block counts as much as the most that it
    gets from any query of any head. If n > 4 top_k that is done twice: by the highest scores that
    the blocks could have, to find 4 top_k candidates, and by the scores of their keys, to choose
    among these. (Bounds alone are too loose for heads as small as SmolLM2's.) top_k is at most n.
    keys: (Hkv, n or more, block_size, D); bounds: (2, Hkv, n, D).
    """
    numbers = torch.arange(bounds.shape[2])
    if len(numbers) > 4 * top_k:
        shares = highest_scores(q, bounds.float()).softmax(2).amax((0, 1))
        numbers = shares.topk(4 * top_k).indices
    keys = keys.index_select(1, numbers).float()
    scores = q @ keys.flatten(1, 2).transpose(1, 2)
    shares = scores.softmax(2).unflatten(2, keys.shape[1:3]).sum(3).amax((0, 1))
    return numbers[shares.topk(top_k).indices].tolist()


class Away:
    """Of one row, the blocks that have left its window, numbered in the order of the text."""

    def __init__(self, slots, n_layers):
        self.n = 0  # How many are in DRAM.
        self.slots = slots  # Blocks in HBM for those that are back.
        # Which block is in which slot, {number: slot}, differs from layer to layer. The least
        # recently used first.
        self.held = [OrderedDict() for _ in range(n_layers)]
        # How many tokens had left when the blocks that are back were last squeezed; 0: not yet. It
        # lags by up to a chunk, or all would have to come again whenever a block leaves.
        self.squeezed_at = 0


class RetrievalCache(WindowCache):
    """A WindowCache that remembers: what leaves the window waits in DRAM.

    In each step and layer, the blocks that the new queries want most come back into slots of the
    row's own; what was chosen before and is there still need not be copied. Bounds and keys are
    looked at in DRAM, so that in HBM a row takes the same room however long it gets.

    If all texts fit the model's context, keys keep their positions: with room for all blocks this
    is full attention. If not, what has left the window is squeezed into `reach` positions before
    it: the sink walks, and blocks begin nearer to each other, in their order, so that no query sees
    a distance that the model has not. Within a block distances stay, so blocks overlap. To be put
    anywhere, a block is in DRAM as if it began at position 0. (docs/window.svg; interpolated
    positions are from Chen et al. 2023, section 2.3; there those of all tokens)
    """

    def __init__(self, n_dram, top_k, context, sink, window, chunk, rotate, *others):
        """n_dram: blocks in DRAM; top_k: tokens that come back; context: the most that the model
        was trained on. The others as WindowCache's."""
        _, _, _, max_seq_len, *_ = others
        fits = max_seq_len <= context
        super().__init__(sink, window, chunk, (lambda keys, by: keys) if fits else rotate, *others)
        size, (max_rows, width) = self.block_size, self.block_table.shape
        # Sink, a block half out of the window, the window, a chunk that is read, and one by which
        # squeezed_at lags need room, too. A quarter will do: near the end SmolLM2 finds less.
        rest = context - (self.sink + 1) * size - window - 2 * chunk
        self.reach = max_seq_len if fits else min(context // 4, rest)
        if not fits and self.reach < size:
            raise ValueError(f"a window of {window} tokens takes all of the context's {context}")
        # The most blocks that leave a row, and that come back to it at a time.
        self.n_far = max(0, (width * size + 1 - window) // size - self.sink)
        self.top_k = min(self.n_far, blocks_for(top_k, size))
        # Each row has room for all of its blocks; the bounds of one take as much as a token.
        n_rooms = n_dram * size // (self.n_far * (size + 1)) if self.n_far else max_rows
        L, _, _, Hkv, _, D = self.kv.shape
        room = (min(max_rows, n_rooms), L, 2, Hkv, self.n_far)
        self.dram = torch.empty(*room, size, D, dtype=self.kv.dtype)
        self.bounds = torch.empty(*room, D, dtype=self.kv.dtype)  # 2: bounds_of(keys)
        self.away = {}  # Of each row.
        self.counts = Counter(shared=0, fetched=0, spilled=0, dropped=0)  # Blocks.

    def can_admit(self, tokens):
        # A new row has the lowest number that is free, which is also its room's in `dram`.
        return self.row_blocks + self.top_k <= self.n_free() and len(self.away) < len(self.dram)

    def admit(self, tokens):
        row, slots = super().admit(tokens), self.alloc(self.top_k)
        self.away[row] = Away(slots, len(self.kv))
        return row

    def evict(self, row, n):
        """The n blocks behind the sink go to DRAM."""
        away, size = self.away[row], self.block_size
        new, ids = slice(away.n, away.n + n), self.block_table[row, self.sink :][:n].long()
        blocks = self.kv[:, :, ids].transpose(2, 3).cpu()  # (L, 2, Hkv, n, size, D)
        starts = (self.sink + away.n + torch.arange(n)) * size
        blocks[:, 0] = self.rotate(blocks[:, 0], -starts[:, None])
        self.dram[row, :, :, :, new] = blocks
        self.bounds[row, :, :, :, new] = bounds_of(blocks[:, 0]).transpose(0, 1)
        away.n += n
        super().evict(row, n)
        self.counts.update(spilled=n, dropped=-n)  # Which undoes WindowCache's.
        if self.n_evicted[row] - max(away.squeezed_at, self.reach) > self.chunk:
            away.squeezed_at = int(self.n_evicted[row])
            away.held = [OrderedDict() for _ in away.held]  # What is back moves: it comes again.

    def starts(self, row, numbers):
        """The positions (n, 1) at which these blocks begin when they are back."""
        n_left, size = self.away[row].squeezed_at, self.block_size
        starts = torch.tensor(numbers)[:, None] * size  # Behind the sink.
        if n_left:
            starts = n_left - self.reach + starts * (self.reach - size) // n_left
        return self.sink * size + starts

    def choose(self, layer, row, q):
        """The numbers of the blocks that q (T, H, D) wants back; of many, the last 32 decide."""
        away, Hkv = self.away[row], self.kv.shape[3]
        if away.n <= self.top_k:
            return range(away.n)
        # Blocks in DRAM begin at 0 (if not `fits`): scored as if at n_evicted, near the window.
        q = self.rotate(q[-32:].cpu(), -self.n_evicted[[row]]).float() * q.shape[2] ** -0.5
        q = q.unflatten(1, (Hkv, -1)).transpose(0, 1).flatten(1, 2)  # (Hkv, T H / Hkv, D)
        bounds = self.bounds[row, layer, :, :, : away.n]
        return top_blocks(q, self.dram[row, layer, 0], bounds, self.top_k)

    def fetch(self, layer, row, numbers):
        """Bring these blocks into HBM, where they are not there; returns their slots."""
        away, held = self.away[row], self.away[row].held[layer]
        absent = [number for number in numbers if number not in held]
        for number in numbers:
            if number in held:
                held.move_to_end(number)
        for number in absent:  # In place of the first: what is wanted has moved to the end.
            full = len(held) == len(away.slots)
            held[number] = held.popitem(last=False)[1] if full else away.slots[len(held)]
        if absent:
            blocks = self.dram[row, layer][:, :, absent]  # (2, Hkv, n, size, D)
            blocks[0] = self.rotate(blocks[0], self.starts(row, absent))
            slots = [held[number] for number in absent]
            self.kv[layer][:, slots] = blocks.transpose(1, 2).to(self.kv.device)
        L, n = len(self.kv), len(absent)  # In blocks of all layers; shared: hits, fetched: misses.
        self.counts.update(shared=(len(numbers) - n) / L, fetched=n / L)
        return [held[number] for number in numbers]

    def retrieve(self, layer, rows, q, cache_seqlens, block_table):
        """Lengths and tables of these rows (a list) with the blocks that q (B, T, H, D) wants back.

        cache_seqlens (B,) and block_table (B, width) are tables()'. What comes back stands between
        the sink and the window, in any order: positions are in the keys.
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
        empty = sum(max(0, self.top_k - away.n) for away in self.away.values())
        return reserved, used - empty * self.block_size

    def release(self, row):
        self.pool.free(self.away.pop(row).slots)
        super().release(row)
