"""The memory of a KV cache: blocks, block tables, and DRAM below HBM.

A block has room for the keys and values of block_size tokens in all layers. A request owns whole
blocks, anywhere in the pool, and its row of the block table names them in order: token t is in slot
t % block_size of block table[row, t // block_size]. (PagedAttention, Kwon et al. 2023, section 4)
"""

from collections import Counter, OrderedDict
from itertools import islice

import torch

from kernels import Link, zeros
from prefix import PrefixStore

# --- Blocks ---------------------------------------------------------------------------------------


class OutOfBlocks(Exception):
    """OutOfBlocks(need, free, total): more were asked for than are free. None was taken."""


def blocks_for(n_tokens, block_size):
    """How many blocks hold n_tokens."""
    return -(-n_tokens // block_size)


class BlockPool:
    """Who has the blocks 0 .. n_blocks - 1. Ids only, no tensors.

    A block is free, in use, or idle: then nobody uses it, but it has a name (see TieredCache) and
    keeps its contents until its room is needed. leave(Block) is called before that.
    """

    def __init__(self, n_blocks, leave=None):
        self.free_ids = list(reversed(range(n_blocks)))  # A stack: freed last, taken first.
        self.ref_count = [0] * n_blocks  # Users of each block.
        self.named = {}  # The Blocks of those that have a name, by id.
        self.idle, self.leave = OrderedDict(), leave  # Idle ids, the least recently used first.

    def n_free(self):
        """How many blocks can be had, idle ones included."""
        return len(self.free_ids) + len(self.idle)

    def alloc(self, n):
        """Take n blocks and return their ids. Raises OutOfBlocks before it takes anything."""
        if n > self.n_free():
            raise OutOfBlocks(n, self.n_free(), len(self.ref_count))
        while len(self.free_ids) < n:
            block = next(iter(self.idle))
            self.leave(self.named[block])
            del self.idle[block], self.named[block]
            self.free_ids.append(block)
        ids = [self.free_ids.pop() for _ in range(n)]
        self.hold(ids)
        return ids

    def hold(self, ids):
        """Add one reference to each block."""
        for block in ids:
            self.ref_count[block] += 1
            self.idle.pop(block, None)

    def free(self, ids):
        """Drop one reference to each block; after the last it is free, or idle if it has a name."""
        for block in reversed(ids):  # The end of a text is forgotten before its beginning.
            assert self.ref_count[block] > 0, f"block {block} is free already"
            self.ref_count[block] -= 1
            if self.ref_count[block] == 0 and block in self.named:
                self.idle[block] = None
            elif self.ref_count[block] == 0:
                self.free_ids.append(block)


class PagedCache:
    """Keys and values of a batch whose requests come and go: rows 0 .. n_rows - 1, oldest first.

    In each step the caller calls grow() and admit(), so that all new tokens have slots, runs the
    model over tables(), and calls advance(). While no request comes or goes, that is a few
    operations on vectors with one number per row, however long the rows are.
    """

    def __init__(self, n_blocks, block_size, max_rows, max_seq_len, shape, dtype, device):
        """Take the memory of n_blocks * block_size tokens. shape: (layers, K and V heads, D)."""
        L, Hkv, D = shape
        # In a block, the keys of one head lie side by side: a matrix.
        size = (L, 2, n_blocks, Hkv, block_size, D)
        self.kv = zeros(size, dtype, device)
        self.block_size, self.pool = block_size, BlockPool(n_blocks)
        width = blocks_for(max_seq_len, block_size)
        self.block_table = torch.zeros(max_rows, width, dtype=torch.int32, device=device)
        # The lengths that the manager looks at in each step stay on the CPU.
        self.seq_len = torch.zeros(max_rows, dtype=torch.int32)  # Tokens stored, new ones excluded.
        self.n_owned = torch.zeros(max_rows, dtype=torch.int32)  # Blocks that the row has.
        self.n_gone = torch.zeros(max_rows, dtype=torch.int32)  # Tokens evicted, see evict().
        self.n_rows = 0

    def layer(self, i):
        """k_cache and v_cache of a layer, (n_blocks, block_size, Hkv, D) each, for the kernel."""
        return self.kv[i, 0].transpose(1, 2), self.kv[i, 1].transpose(1, 2)

    def positions(self):
        """Where each row's next token stands in its text, (n_rows,), on the CPU."""
        return self.seq_len[: self.n_rows] + self.n_gone[: self.n_rows]

    def can_admit(self, n_tokens):
        """Whether there are blocks for n_tokens, and one for each row to grow into before long."""
        return blocks_for(n_tokens, self.block_size) + self.n_rows <= self.pool.n_free()

    def admit(self, n_tokens):
        """Add an empty row with blocks for n_tokens. Raises OutOfBlocks before any change."""
        self.add_row(self.pool.alloc(blocks_for(n_tokens, self.block_size)), 0)

    def add_row(self, ids, n_stored):
        """Add a row with these blocks, in which its first n_stored tokens are."""
        self.block_table[self.n_rows, : len(ids)] = self.block_table.new_tensor(ids)
        self.seq_len[self.n_rows], self.n_owned[self.n_rows] = n_stored, len(ids)
        self.n_gone[self.n_rows] = 0
        self.n_rows += 1

    def full_rows(self):
        """The rows without a slot for one more token."""
        seq_len, n_owned = self.seq_len[: self.n_rows], self.n_owned[: self.n_rows]
        return (seq_len >= n_owned * self.block_size).nonzero().flatten()

    def can_grow(self):
        """Whether there is a block for each full row."""
        return len(self.full_rows()) <= self.pool.n_free()

    def grow(self):
        """Give each full row a block, all at once. Raises OutOfBlocks before any change."""
        rows = self.full_rows()
        ids = self.pool.alloc(len(rows))
        if ids:
            self.block_table[rows, self.n_owned[rows]] = self.block_table.new_tensor(ids)
            self.n_owned[rows] += 1

    def tables(self):
        """seq_len (n_rows,) and block_table (n_rows, blocks of the longest row) for the kernel."""
        width = int(self.n_owned[: self.n_rows].max())
        seq_len = self.seq_len[: self.n_rows].to(self.block_table.device)
        return seq_len, self.block_table[: self.n_rows, :width]

    def advance(self, n_new):
        """Count the tokens that the model has stored: n_new[row] for each row."""
        self.seq_len[: self.n_rows] += torch.tensor(n_new, dtype=torch.int32)

    def release(self, rows):
        """Free the blocks of these rows at once; the rows behind them move up."""
        for row in rows:
            self.pool.free(self.block_table[row, : self.n_owned[row]].tolist())
        first = min(rows, default=self.n_rows)
        keep = [row for row in range(first, self.n_rows) if row not in rows]
        for state in (self.block_table, self.seq_len, self.n_owned, self.n_gone):
            state[first : first + len(keep)] = state[keep]
        self.n_rows = first + len(keep)

    def evict(self, row, sink, window):
        """Free the row's blocks between the first `sink` blocks and the last `window` tokens.

        The window counts the token that comes next. What is behind moves up in the table. Returns
        the ids of the blocks, which keep what they hold until they are taken again.
        """
        n = (int(self.seq_len[row]) + 1 - window) // self.block_size - sink
        if n <= 0:
            return []
        table = self.block_table[row]
        ids = table[sink : sink + n].tolist()
        table[sink:-n] = table[sink + n :].clone()
        self.n_owned[row] -= n
        self.seq_len[row] -= n * self.block_size
        self.n_gone[row] += n * self.block_size
        self.pool.free(ids)
        return ids

    def usage(self):
        """Slots reserved, and slots that hold a token; what rows share counts once."""
        reserved = (len(self.pool.ref_count) - self.pool.n_free()) * self.block_size
        seq_len, n_owned = self.seq_len[: self.n_rows], self.n_owned[: self.n_rows]
        return reserved, reserved - int((n_owned * self.block_size - seq_len).sum())


# --- Tiers ----------------------------------------------------------------------------------------


class TieredCache(PagedCache):
    """A PagedCache whose blocks outlive their requests, in HBM and in DRAM below it.

    commit() names a row's blocks, store.lookup() finds those that begin a list of tokens, admit()
    starts a row with them. Where room is needed, what was not used for the longest time goes, from
    HBM to DRAM, from DRAM for good. A preempted request leaves all its blocks and comes back like
    any other. (Names as in vLLM's prefix caching; the interface is that of UCM's DRAM store.)
    """

    def __init__(self, n_dram, link_gbs, n_blocks, block_size, *others):
        """n_dram: blocks in DRAM. link_gbs: see Link. The others are PagedCache's."""
        super().__init__(n_blocks, block_size, *others)
        self.pool.leave = self.leave_hbm
        self.dram_pool = BlockPool(n_dram, lambda block: self.leave(block, "dram"))
        size = (n_dram, *self.kv[:, :, 0].shape)  # Here a block is one piece.
        self.dram = zeros(size, self.kv.dtype, "cpu", pinned=self.kv.is_cuda)
        self.to_dram, self.to_hbm = (Link(self.kv.is_cuda, link_gbs) for _ in range(2))
        self.store, self.chains = PrefixStore(block_size), []  # Chains: what each row begins with.
        self.counts = Counter(shared=0, fetched=0, spilled=0, dropped=0)  # Blocks.

    def commit(self, row, tokens, last=False):
        """Name the row's blocks that are full with `tokens`, its first ones, unless others are.

        last: the last one, too, full or not; then the row must be released.
        """
        chain, n_named = self.chains[row], len(self.chains[row])
        self.store.extend(chain, tokens, last)
        ids = self.block_table[row, n_named : len(chain)].tolist()
        for block, i in zip(chain[n_named:], ids, strict=True):
            if block.hbm is None:
                block.hbm, self.pool.named[i] = i, block

    def can_admit(self, tokens):
        """Whether there are blocks for tokens, and one for each row to grow into before long."""
        found = [block.hbm for block in self.store.lookup(tokens)]
        n_used = sum(i is not None and i not in self.pool.idle for i in found)
        return super().can_admit(len(tokens) - n_used * self.block_size)

    def admit(self, tokens):
        """Add a row for tokens and return how many of them are stored: the rest is to compute.

        Raises OutOfBlocks, or what went wrong with a copy; both tiers are as before then.
        """
        chain = self.store.lookup(tokens)
        absent = [block for block in chain if block.hbm is None]
        held, slots = [b.hbm for b in chain if b.hbm is not None], [b.dram for b in absent]
        self.pool.hold(held)  # Nothing that makes room now shall take them away.
        self.dram_pool.hold(slots)
        try:
            ids = self.pool.alloc(blocks_for(len(tokens), self.block_size) - len(held))
            held, fetched, new = held + ids, ids[: len(slots)], ids[len(slots) :]
            moves = zip(fetched, slots, strict=True)
            self.to_hbm.copy([(self.kv[:, :, i], self.dram[slot]) for i, slot in moves])()
        except BaseException:
            self.pool.free(held)
            raise
        finally:
            self.dram_pool.free(slots)
        for block, block.hbm in zip(absent, fetched, strict=True):
            self.pool.named[block.hbm] = block
        self.counts.update(shared=len(chain) - len(absent), fetched=len(absent))
        n_stored = sum(len(block.tokens) for block in chain)
        self.add_row([block.hbm for block in chain] + new, n_stored)
        if chain and len(chain[-1].tokens) < self.block_size:  # The row will write to its slots.
            self.leave(self.pool.named.pop(chain.pop().hbm), "hbm", taken=True)
        self.chains.append(chain)
        return n_stored

    def release(self, rows):
        super().release(rows)
        self.chains = [chain for row, chain in enumerate(self.chains) if row not in rows]

    def spill(self):
        """Start to copy what will leave HBM next, a block for each row to grow into."""
        n = min(self.n_rows - len(self.pool.free_ids), len(self.dram_pool.ref_count))
        for i in list(islice(self.pool.idle, max(0, n))):
            self.dump(self.pool.named[i])

    def dump(self, block):
        """Start to copy a block to DRAM, unless it is there or all blocks there are in use."""
        if block.dram is None and self.dram_pool.n_free():
            (block.dram,) = self.dram_pool.alloc(1)
            self.dram_pool.named[block.dram] = block
            block.wait = self.to_dram.copy([(self.dram[block.dram], self.kv[:, :, block.hbm])])
            self.dram_pool.free([block.dram])
            self.counts["spilled"] += 1

    def leave_hbm(self, block):
        """Let an idle block go from HBM, when its copy in DRAM is made."""
        self.dump(block)
        if block.dram is not None:
            block.wait()
        self.leave(block, "hbm")

    def leave(self, block, tier, taken=False):
        """The Block loses its place in a tier, which a row has taken over or others need."""
        setattr(block, tier, None)
        if block.hbm is block.dram is None:
            del self.store[block.name]
            self.counts["dropped"] += not taken
