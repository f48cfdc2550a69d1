"""What stays in HBM of a text that outgrows it: sink and window, and what retrieval brings back.

Throughout this file
    T  new tokens of a request in this step      H    query heads
    L  layers                                    Hkv  key and value heads, H / Hkv share one
    n  blocks that have left the window          D    size of a head
"""

from collections import Counter, OrderedDict

import torch

from kernels import zeros
from kvcache import BlockPool, PagedCache, blocks_for

# --- Sink and window ------------------------------------------------------------------------------


def plan(longest, sink, window, chunk, top_k, block_size):
    """What a row that comes to `longest` tokens needs, all given in tokens. Returns

    - blocks in HBM, with room for those that come back and for what is kept beside the blocks,
    - tokens that it holds in HBM at a time, without those that come back,
    - blocks of its sink, blocks that may leave its window, and how many of these come back.
    """
    # The sink is whole blocks; so is the window, which may begin anywhere in its first one.
    most, sink = min(longest, sink + window + chunk + 2 * block_size), blocks_for(sink, block_size)
    far = max(0, blocks_for(max(0, longest - window), block_size) - sink)
    top_k = min(far, blocks_for(top_k, block_size))
    # For each that left, bounds as long as a token; or the sink's keys once more, half its size.
    beside = blocks_for(far, block_size) if top_k else blocks_for(sink if far else 0, 2)
    return blocks_for(most, block_size) + top_k + beside, most, sink, far, top_k


class WindowCache(PagedCache):
    """A PagedCache whose rows forget the middle: StreamingLLM (Xiao et al. 2023, section 3.2).

    When a step begins, before its new tokens have slots, a row loses the blocks behind its first
    `sink` blocks all of whose tokens lie `window` or more before the first new one. What is kept
    has consecutive positions. In the window nothing changes for that, because a score depends on
    distance alone; the sink's keys are rotated forward by as many positions as have left.
    """

    def __init__(self, row_blocks, sink, window, chunk, rotations, *others):
        """row_blocks: set aside for each row; sink in blocks, window in tokens: see plan().

        chunk: the most new tokens of a row in a step. rotations(positions): RoPE. The others are
        PagedCache's; its max_seq_len is the most that a row holds at a time.
        """
        super().__init__(*others)
        self.row_blocks, self.sink, self.window, self.chunk = row_blocks, sink, window, chunk
        self.rotations = rotations
        self.sink_keys = []  # Each row's, as they were stored: rotated from there, nothing drifts.
        self.counts = Counter(shared=0, fetched=0, spilled=0, dropped=0)  # Blocks.

    def can_admit(self, tokens):
        """Whether one more row can have all that it may need: no row is ever preempted."""
        return (self.n_rows + 1) * self.row_blocks <= len(self.pool.ref_count)

    def usage(self):
        """Slots set aside for the rows, and slots that hold a token."""
        return self.n_rows * self.row_blocks * self.block_size, super().usage()[1]

    def admit(self, tokens):
        """Add an empty row. Returns how many tokens are stored: none, rows share nothing here."""
        self.add_row([], 0)
        self.sink_keys.append(None)
        return 0

    def slide(self, n_new):
        """Begin a step: let blocks leave, then give each row blocks for n_new[row] new tokens."""
        for row, n in enumerate(n_new):
            if ids := self.evict(row, self.sink, self.window):
                self.let_go(row, ids)
            n_owned = int(self.n_owned[row])
            need = blocks_for(int(self.seq_len[row]) + n, self.block_size) - n_owned
            ids = self.block_table.new_tensor(self.pool.alloc(need))
            self.block_table[row, n_owned : n_owned + need] = ids
            self.n_owned[row] += need

    def let_go(self, row, ids):
        """These blocks are forgotten, and the sink follows."""
        self.counts["dropped"] += len(ids)
        sink = self.block_table[row, : self.sink].long()
        if self.sink_keys[row] is None:
            self.sink_keys[row] = self.kv[:, 0, sink]
        by = self.rotations(self.n_gone[row : row + 1].to(self.kv.device))  # (1, 1, D / 2)
        pairs = torch.view_as_complex(self.sink_keys[row].float().unflatten(-1, (-1, 2)))
        self.kv[:, 0, sink] = torch.view_as_real(pairs * by).flatten(-2).to(self.kv.dtype)

    def release(self, rows):
        super().release(rows)
        self.sink_keys = [keys for row, keys in enumerate(self.sink_keys) if row not in rows]

    def commit(self, row, tokens, last=False):
        """Nothing: what a window holds depends on more than the tokens, so it gets no name."""

    def spill(self):
        """Nothing: see commit."""


# --- Retrieval ------------------------------------------------------------------------------------


def bounds_of(keys):
    """The largest and the smallest number in each dimension of keys (..., block_size, D)."""
    return torch.cat([keys.amax(-2), keys.amin(-2)], -1)  # (..., 2 D)


def highest_scores(q, bounds):
    """Scores (Hkv, T, n) of queries (Hkv, T, D) with blocks whose bounds are (Hkv, n, 2 D).

    In each dimension with the bound that scores higher: no key of the block has a higher score
    (Quest, Tang et al. 2024, section 3.3).
    """
    ends = torch.cat([q.clamp(min=0), q.clamp(max=0)], 2)  # (Hkv, T, 2 D)
    # For a token and 4,096 blocks in bfloat16 on a CPU, ends @ bounds.transpose(1, 2) takes 3.4
    # times as long.
    return (bounds @ ends.transpose(1, 2)).transpose(1, 2)


def choose(q, bounds, keys_of, top_k):
    """The numbers of the top_k blocks that q (Hkv, T, D) wants, of n with bounds (Hkv, n, 2 D).

    Each query divides its attention over the blocks, and a block counts as much as the most that it
    gets from any query of any head. If n > 4 top_k that is done twice: by the highest scores that
    the blocks could have, to find 4 top_k candidates, and by the scores of their keys, to choose
    among these. (Bounds are far above the keys in heads as small as SmolLM2's: by them alone, 14 of
    20 needles were found in 2,000 tokens with room for an eighth.) top_k is at most n.

    keys_of(numbers): the keys of these blocks (blocks, Hkv, block_size, D), wherever they are.
    """
    numbers = list(range(bounds.shape[1]))
    if len(numbers) > 4 * top_k:
        shares = highest_scores(q, bounds).float().softmax(2).amax((0, 1))
        numbers = shares.topk(4 * top_k).indices.tolist()
    keys = keys_of(numbers).transpose(0, 1)  # (Hkv, blocks, block_size, D)
    scores = q.to(keys.device) @ keys.flatten(1, 2).transpose(1, 2)
    shares = scores.float().softmax(2).unflatten(2, keys.shape[1:3]).sum(3).amax((0, 1))
    return [numbers[i] for i in shares.topk(top_k).indices.tolist()]


class Away:
    """Of one row, the blocks that have left its window, numbered in the order of the text."""

    def __init__(self, cache):
        (L, _, _, Hkv, _, D), kv = cache.kv.shape, cache.kv
        self.dram = []  # The id in DRAM of each.
        self.bounds = zeros((L, Hkv, cache.n_far, 2 * D), kv.dtype, kv.device)
        self.slots = []  # Blocks in HBM for those that are back; each layer has its own in them.
        self.held = [OrderedDict() for _ in range(L)]  # number: slot; least recently used first.


class RetrievalCache(WindowCache):
    """A WindowCache that remembers: what leaves the window waits in DRAM, its bounds in HBM.

    In each step and layer, the blocks that the new queries want most come back into slots of the
    row's own; what was chosen before and is there still need not be copied. Keys keep their
    positions, so that with room for all blocks this is full attention.
    """

    def __init__(self, n_dram, top_k, n_far, *others):
        """In blocks: in DRAM, those that come back, and the most of a row that leave its window."""
        super().__init__(*others)
        self.top_k, self.n_far = top_k, n_far
        self.dram_pool, self.away = BlockPool(n_dram), []
        size = (n_dram, *self.kv[:, :, 0].shape)
        self.dram = zeros(size, self.kv.dtype, "cpu")

    def can_admit(self, tokens):
        n_dram = len(self.dram_pool.ref_count)
        return super().can_admit(tokens) and (self.n_rows + 1) * self.n_far <= n_dram

    def admit(self, tokens):
        self.away.append(Away(self))
        return super().admit(tokens)

    def let_go(self, row, ids):
        """These blocks go to DRAM, before the pool, in which they are free, gives them away."""
        away, first = self.away[row], len(self.away[row].dram)
        away.dram += self.dram_pool.alloc(len(ids))
        self.dram[away.dram[first:]] = self.kv[:, :, ids].movedim(2, 0).to("cpu")
        keys = self.kv[:, 0, ids].transpose(1, 2)  # (L, Hkv, n, block_size, D)
        away.bounds[:, :, first : len(away.dram)] = bounds_of(keys)
        away.slots += self.pool.alloc(min(self.top_k, len(away.dram)) - len(away.slots))
        self.counts["spilled"] += len(ids)

    def choose(self, layer, row, q):
        """The numbers of the blocks that q (T, H, D) wants back. Their keys are read in DRAM."""
        away, (T, _, D) = self.away[row], q.shape
        if len(away.dram) <= self.top_k:
            return range(len(away.dram))
        bounds = away.bounds[layer, :, : len(away.dram)]
        q = (q * D**-0.5).view(T, len(bounds), -1, D).transpose(0, 1).flatten(1, 2)

        def keys_of(numbers):  # index_select is twice as fast as self.dram[ids, layer, 0].
            ids = torch.tensor([away.dram[number] for number in numbers])
            return self.dram[:, layer, 0].index_select(0, ids)

        return choose(q, bounds, keys_of, self.top_k)

    def fetch(self, layer, row, numbers):
        """Bring these blocks into HBM, where they are not there; returns their slots."""
        away, held = self.away[row], self.away[row].held[layer]
        absent = [number for number in numbers if number not in held]
        for number in numbers:
            if number in held:
                held.move_to_end(number)
        for number in absent:  # Nothing wanted now is at the front: there are slots for all of it.
            full = len(held) == len(away.slots)
            held[number] = held.popitem(last=False)[1] if full else away.slots[len(held)]
        if absent:
            blocks = self.dram[[away.dram[number] for number in absent], layer].transpose(0, 1)
            self.kv[layer][:, [held[number] for number in absent]] = blocks.to(self.kv.device)
        L = len(self.kv)  # Counted in blocks of all layers; shared: hits, fetched: misses.
        self.counts["fetched"] += len(absent) / L
        self.counts["shared"] += (len(numbers) - len(absent)) / L
        return [held[number] for number in numbers]

    def retrieve(self, layer, rows, q, seq_len, block_table):
        """seq_len (B,) and block_table (B, width) of these rows (a slice) with what q wants back.

        q: (B, T, H, D). The blocks stand between the sink and the window.
        """
        tables, lengths = [], []
        for row, ids in enumerate(block_table.tolist(), rows.start):
            slots = self.fetch(layer, row, self.choose(layer, row, q[row - rows.start]))
            padding = [0] * (self.top_k - len(slots))  # Behind the row's end.
            tables.append(ids[: self.sink] + slots + ids[self.sink :] + padding)
            lengths.append(len(slots) * self.block_size)
        return seq_len + seq_len.new_tensor(lengths), block_table.new_tensor(tables)

    def release(self, rows):
        for row in rows:
            self.pool.free(self.away[row].slots)
            self.dram_pool.free(self.away[row].dram)
        self.away = [away for row, away in enumerate(self.away) if row not in rows]
        super().release(rows)
