"""The memory of a KV cache: blocks, block tables, sink and window, and DRAM below HBM.

A block has room for keys and values of block_size tokens in all layers. A request has a row, which
owns whole blocks anywhere in the pool; the row's token t is in slot t % block_size of the block
block_table[row, t // block_size]. (PagedAttention, Kwon et al. 2023, section 4)

All caches, those in caches/ too, answer to these calls, which a step makes in this order:

    can_grow(), grow()                  a slot for one more token of each row: is there one, take it
    can_admit(tokens), admit(tokens)    the same for a request's tokens; returns its row
    positions()                         where in its text each row's next token is, for RoPE
    tables(rows), layer(i)              for the attention call: lengths and tables, keys and values
    advance(new)                        the model has stored the tokens new[row] of some rows
    usage()                             slots reserved, and slots that hold a token
    release(row)                        its request has ended, or is preempted
"""

from collections import Counter, OrderedDict
from itertools import takewhile

import torch

from support.dram import DramStore, keys_of


class OutOfBlocks(Exception):
    """OutOfBlocks(need, free, total): more were asked for than are free. None was taken."""


def blocks_for(n_tokens, block_size):
    """How many blocks hold n_tokens."""
    return -(-n_tokens // block_size)


class BlockPool:
    """Who has the blocks 0 .. n_blocks - 1. Ids only, no tensors."""

    def __init__(self, n_blocks):
        self.free_ids = list(reversed(range(n_blocks)))  # A stack: freed last, taken first.
        self.ref_count = [0] * n_blocks  # Users of each block.

    def alloc(self, n):
        """Take n blocks and return their ids. Raises OutOfBlocks before it takes anything."""
        if n > len(self.free_ids):
            raise OutOfBlocks(n, len(self.free_ids), len(self.ref_count))
        ids = [self.free_ids.pop() for _ in range(n)]
        self.share(ids)
        return ids

    def share(self, ids):
        """Count one user more of each block."""
        for block in ids:
            self.ref_count[block] += 1

    def free(self, ids):
        """Count one user less of each block. The last one leaves it free."""
        for block in ids:
            assert self.ref_count[block] > 0, f"block {block} is free already"
            self.ref_count[block] -= 1
            if self.ref_count[block] == 0:
                self.free_ids.append(block)


class PagedCache:
    """Keys and values of requests that come and go, in blocks, taken when they are needed."""

    def __init__(self, n_blocks, block_size, max_rows, max_seq_len, shape, dtype, device):
        """Take the memory of n_blocks * block_size tokens. shape: (layers, K and V heads, D)."""
        L, Hkv, D = shape
        # The keys of one head lie side by side. What is not written to takes no room on a CPU.
        self.kv = torch.empty(L, 2, n_blocks, Hkv, block_size, D, dtype=dtype, device=device)
        self.block_size, self.pool = block_size, BlockPool(n_blocks)
        width = blocks_for(max_seq_len, block_size)
        self.block_table = torch.zeros(max_rows, width, dtype=torch.int32, device=device)
        # The lengths that the manager looks at in each step stay on the CPU. 0 for a free row.
        self.seq_len = torch.zeros(max_rows, dtype=torch.int32)  # Tokens stored, new ones excluded.
        self.n_owned = torch.zeros(max_rows, dtype=torch.int32)  # Blocks that the row has.

    def n_free(self):
        """How many blocks can be had."""
        return len(self.pool.free_ids)

    def alloc(self, n):
        """Take n of them. Raises OutOfBlocks before any change."""
        return self.pool.alloc(n)

    def full_rows(self):
        """The rows without a slot for one more token."""
        full = (self.n_owned > 0) & (self.seq_len >= self.n_owned * self.block_size)
        return full.nonzero().flatten()

    def can_grow(self):
        return len(self.full_rows()) <= self.n_free()

    def grow(self):
        """Give each full row a block, all at once. Raises OutOfBlocks before any change."""
        rows = self.full_rows()
        ids = self.alloc(len(rows))
        self.block_table[rows, self.n_owned[rows]] = self.block_table.new_tensor(ids)
        self.n_owned[rows] += 1

    def can_admit(self, tokens):
        # One more for each running row, or the first to grow might at once preempt who comes now.
        need = blocks_for(len(tokens), self.block_size) + int((self.n_owned > 0).sum())
        return need <= self.n_free()

    def admit(self, tokens):
        """Raises OutOfBlocks before any change."""
        return self.add_row(self.alloc(blocks_for(len(tokens), self.block_size)), 0)

    def add_row(self, ids, n_stored):
        """A row with these blocks, in which its first n_stored tokens are. Returns its number."""
        row = int((self.n_owned == 0).nonzero()[0])
        self.block_table[row, : len(ids)] = self.block_table.new_tensor(ids)
        self.seq_len[row], self.n_owned[row] = n_stored, len(ids)
        return row

    def positions(self):
        return self.seq_len

    def tables(self, rows):
        """seq_len (B,) and block_table (B, blocks of the longest row) of a list of rows."""
        rows = torch.tensor(rows)
        width = int(self.n_owned[rows].max())
        return self.seq_len[rows].to(self.block_table.device), self.block_table[rows, :width]

    def layer(self, i):
        """k_cache and v_cache of a layer, (n_blocks, block_size, Hkv, D) each."""
        return self.kv[i, 0].transpose(1, 2), self.kv[i, 1].transpose(1, 2)

    def advance(self, new):
        n_new = torch.tensor([len(tokens) for tokens in new.values()], dtype=torch.int32)
        self.seq_len[list(new)] += n_new

    def usage(self):
        """A block that rows share counts once. It is full: unused slots are in rows' own blocks."""
        reserved = (len(self.pool.ref_count) - self.n_free()) * self.block_size
        return reserved, reserved - int((self.n_owned * self.block_size - self.seq_len).sum())

    def release(self, row):
        """Its blocks are free at once."""
        self.pool.free(self.block_table[row, : self.n_owned[row]].tolist())
        self.seq_len[row] = self.n_owned[row] = 0


class WindowCache(PagedCache):
    """A PagedCache whose rows forget the middle: StreamingLLM (Xiao et al. 2023, section 3.2).

    After each step a row evicts, behind the sink, the blocks that lie wholly before the window: the
    `window` tokens that end with the next one. What is kept has consecutive positions, since far
    ones would be new to the model (docs/window.svg). A score depends on distance alone: the keys in
    the window stay as they are, the sink's walk, rotated on by as many positions as have left.
    """

    def __init__(self, sink, window, chunk, rotate, *others):
        """In tokens; chunk: the most new ones of a row in a step. rotate(keys, by): RoPE of keys
        (..., D) by so many more positions (...). The others are PagedCache's."""
        super().__init__(*others)
        size, (max_rows, width) = self.block_size, self.block_table.shape
        self.sink, self.window, self.chunk = blocks_for(sink, size), window, chunk  # sink: blocks
        # What is left behind the sink: at most window + size - 2 tokens. Then chunk more come.
        self.row_blocks = min(width, self.sink + blocks_for(size + window - 2 + chunk, size))
        self.n_evicted = torch.zeros(max_rows, dtype=torch.int32)  # Tokens.
        self.sink_keys = [None] * max_rows  # As they were stored: rotated from there, none drifts.
        self.rotate, self.reach, self.counts = rotate, 0, Counter(dropped=0)

    def can_admit(self, tokens):
        return self.row_blocks <= self.n_free()

    def admit(self, tokens):
        # All it may ever need, so that it is never preempted: read again it would see other blocks.
        row = self.add_row(self.alloc(self.row_blocks), 0)
        self.n_evicted[row] = 0
        return row

    def positions(self):
        return self.seq_len + self.n_evicted

    def advance(self, new):
        super().advance(new)
        for row in new:
            n = (int(self.seq_len[row]) + 1 - self.window) // self.block_size - self.sink
            if n > 0:
                self.evict(row, n)

    def evict(self, row, n):
        """The n blocks behind the sink leave the table, and return at its end, empty."""
        sink = self.block_table[row, : self.sink].long()
        if self.n_evicted[row] == 0:
            self.sink_keys[row] = self.kv[:, 0, sink].cpu()
        behind = self.block_table[row, self.sink : self.row_blocks]
        behind.copy_(behind.roll(-n))
        self.seq_len[row] -= n * self.block_size
        self.n_evicted[row] += n * self.block_size
        by = (self.n_evicted[[row]] - self.reach).clamp(min=0)  # (See caches/retrieval.py.)
        self.kv[:, 0, sink] = self.rotate(self.sink_keys[row], by).to(self.kv)
        self.counts["dropped"] += n


class TieredCache(PagedCache):
    """A PagedCache whose full blocks are known by a key and outlive their requests.

    A known block that no row uses is idle: it stays until its room is needed, or soon will be. Then
    the one not used for the longest time is spilled to DRAM, or dropped for good from there. A new
    row that begins with known blocks shares those in HBM and fetches those in DRAM, which leave it:
    a key is in one tier at a time. (docs/tiers.svg)
    """

    def __init__(self, n_dram, *others):
        """n_dram: blocks in DRAM. The others are PagedCache's."""
        super().__init__(*others)
        self.store = DramStore(n_dram, self.kv.new_empty(self.kv.shape[:2] + self.kv.shape[3:]))
        self.in_hbm = {}  # key: block, for all known ones. The cache is one of each block's users.
        self.idle = OrderedDict()  # The same for those that no row uses, least recently used first.
        # Of each row its text and the keys of its blocks; and those keys that are yet to compute.
        self.texts, self.keys, self.computing = {}, {}, set()
        self.counts = Counter(shared=0, fetched=0, spilled=0, dropped=0)  # Blocks.

    def n_free(self):
        return super().n_free() + len(self.idle)

    def alloc(self, n):
        while len(self.pool.free_ids) < n <= self.n_free():
            self.spill()
        if n:
            self.store.wait()  # What was there may still be on its way to DRAM: that comes first.
        return self.pool.alloc(n)

    def spill(self):
        """Move the first idle block to DRAM."""
        key, block = self.idle.popitem(last=False)
        del self.in_hbm[key]
        self.counts["dropped"] += self.store.dump(key, self.kv[:, :, block])
        self.counts["spilled"] += key in self.store.ids
        self.pool.free([block])

    def lookup(self, tokens):
        """The keys of the blocks that begin these tokens and are known, in either tier.

        One token is always left to compute: the answer begins with what the model says after it.
        """
        keys = keys_of(tokens[:-1], self.block_size)
        return list(takewhile(lambda key: key in self.in_hbm or key in self.store.ids, keys))

    def can_admit(self, tokens):
        """False, too, while a row computes blocks that begin these tokens: soon they are known."""
        in_use = [key for key in self.lookup(tokens) if key in self.in_hbm and key not in self.idle]
        rest = tokens[len(in_use) * self.block_size :]  # Needs blocks that are free or idle.
        awaited = self.computing.intersection(keys_of(tokens[:-1], self.block_size))
        return not awaited and super().can_admit(rest)

    def admit(self, tokens):
        found = self.lookup(tokens)
        shared = [key for key in found if key in self.in_hbm]
        absent = [key for key in found if key in self.store.ids]
        # What is found is taken first, or what makes room for the rest could take it away.
        self.pool.share([self.in_hbm[key] for key in shared])
        for key in shared:
            self.idle.pop(key, None)
        sources = self.store.take(absent)
        ids = self.alloc(blocks_for(len(tokens), self.block_size) - len(shared))
        fetched, own = ids[: len(absent)], ids[len(absent) :]
        self.store.load(sources, [self.kv[:, :, block] for block in fetched])
        self.in_hbm.update(zip(absent, fetched, strict=True))
        self.pool.share(fetched)
        row = self.add_row([self.in_hbm[key] for key in found] + own, len(found) * self.block_size)
        self.texts[row], self.keys[row] = list(tokens), keys_of(tokens, self.block_size)
        # (Some may be known: only a block before them was dropped.)
        self.computing.update(set(self.keys[row][len(found) :]) - set(self.in_hbm))
        self.counts.update(shared=len(shared), fetched=len(absent))  # Adds these.
        return row

    def advance(self, new):
        """Blocks that are full now become known: not sooner, or others might read them empty."""
        for row, tokens in new.items():
            n, text = int(self.seq_len[row]), self.texts[row]
            text[n : n + len(tokens)] = tokens
            keys = self.keys[row] = keys_of(text, self.block_size, self.keys[row])
            for i in range(n // self.block_size, (n + len(tokens)) // self.block_size):
                self.computing.discard(keys[i])
                if keys[i] not in self.in_hbm:  # Else another row has computed the same.
                    self.store.forget(keys[i])
                    self.in_hbm[keys[i]] = block = int(self.block_table[row, i])
                    self.pool.share([block])
        super().advance(new)
        # Ahead of need, so that copying and computing overlap: room for each row to grow.
        while self.idle and len(self.pool.free_ids) < len(self.texts):
            self.spill()

    def release(self, row):
        """Its known blocks become idle, the text's end first: nobody finds it without the rest."""
        keys, n_full = self.keys.pop(row), int(self.seq_len[row]) // self.block_size
        table = self.block_table[row, :n_full].tolist()
        super().release(row)
        del self.texts[row]
        self.computing.difference_update(keys[n_full:])
        for key, block in reversed(list(zip(keys, table, strict=False))):
            if self.in_hbm.get(key) == block and self.pool.ref_count[block] == 1:  # The cache only.
                self.idle[key] = block
