"""Blocks that take less room: what is full is written once more, in fewer bytes, by a codec.

Throughout this file
    B  requests in the batch, one row each       H    query heads
    T  new tokens of a request in this step      Hkv  key and value heads, H / Hkv share one
    L  layers, n  blocks                         D    size of a head
"""

import torch

from caches.codecs import CODECS
from kvcache import OutOfBlocks, PagedCache, blocks_for
from support import attention


class End:
    """Rooms of equal size from one end of a memory on, of which the n outermost are in use.

    A hole is filled with the innermost one, so that what is free lies in one piece between two ends
    and serves either. Then the table, which has the ids of the rooms, is corrected.
    """

    def __init__(self, memory, room_bytes, at_start, table):
        total = len(memory) // room_bytes
        whole = memory[: total * room_bytes] if at_start else memory[-total * room_bytes :]
        self.rooms = whole.view(total, room_bytes)
        self.ids = range(total) if at_start else range(total)[::-1]  # The outermost first.
        self.n, self.table = 0, table

    def take(self, n):
        """The ids of n more rooms. Between the ends there must be memory for them."""
        self.n += n
        return list(self.ids[self.n - n : self.n])

    def free(self, ids):
        """Give rooms back; others may have other ids afterwards."""
        for hole in sorted(ids, key=self.ids.index, reverse=True):  # The innermost first.
            self.n -= 1
            innermost = self.ids[self.n]
            if hole != innermost:
                self.rooms[hole] = self.rooms[innermost]
                self.table[self.table == innermost] = hole


class CompressedCache(PagedCache):
    """A PagedCache whose full blocks are compressed, but for the first one of each row.

    The first stays as it is, since attention puts most weight on the text's first tokens. So do
    the block that is not full and `residual` full ones before it (KIVI, Liu et al. 2024, section
    3.3); and what one step writes is compressed only after it. Blocks in full precision lie at the
    start of the memory, and seq_len, n_owned and block_table are about them alone; those that are
    compressed lie at its end.
    """

    residual = 0

    def __init__(self, codec, *others):
        """codec: a key of CODECS. The others are PagedCache's, with blocks in full precision.

        Raises ValueError where a block would take more room than before.
        """
        super().__init__(*others)
        (L, _, _, Hkv, size, D), dtype = self.kv.shape, self.kv.dtype
        self.codec = CODECS[codec]((L, Hkv, D), size, dtype)
        part_bytes = [part.nbytes for part in self.codec.parts.values()]
        self.block_bytes = 2 * L * Hkv * size * D * dtype.itemsize
        self.packed_bytes = blocks_for(sum(part_bytes), 8) * 8  # So that numbers are aligned.
        if self.packed_bytes > self.block_bytes:
            sizes = f"{self.packed_bytes} bytes instead of {self.block_bytes}"
            raise ValueError(f"in {codec} a block of {size} tokens takes {sizes}")
        self.memory = self.kv.flatten().view(torch.uint8)
        self.packed_table = torch.zeros_like(self.block_table)
        self.n_packed = torch.zeros_like(self.n_owned)  # Compressed blocks of each row.
        self.full = End(self.memory, self.block_bytes, True, self.block_table)
        self.packed = End(self.memory, self.packed_bytes, False, self.packed_table)
        self.blocks = self.full.rooms.view(dtype).unflatten(1, (L, 2, Hkv, size, D))
        self.kv = self.blocks.movedim(0, 2)  # (L, 2, n, Hkv, block_size, D)
        pieces = self.packed.rooms[:, : sum(part_bytes)].split(part_bytes, 1)
        self.parts = {}  # name: (rooms, ...)
        for (name, part), piece in zip(self.codec.parts.items(), pieces, strict=True):
            self.parts[name] = piece.view(part.dtype).unflatten(1, part.shape)

    def free_bytes(self):
        """What lies between the ends."""
        used = self.full.n * self.block_bytes + self.packed.n * self.packed_bytes
        return len(self.memory) - used

    def n_free(self):
        return self.free_bytes() // self.block_bytes

    def alloc(self, n):
        if n > self.n_free():
            raise OutOfBlocks(n, self.n_free(), len(self.full.ids))
        return self.full.take(n)

    def can_admit(self, tokens):
        """False, too, while a step's worth of prompts waits to be read: they take the most room."""
        unread = int(self.n_owned[self.positions() == 0].sum()) * self.block_size
        # To grow, a row takes a block and has the one before compressed, unless that is its first.
        beside = torch.where(self.n_owned > 1, self.packed_bytes, self.block_bytes)
        need = blocks_for(len(tokens), self.block_size) * self.block_bytes
        need += int(beside[self.n_owned > 0].sum())
        return unread < 1024 and need <= self.free_bytes()

    def positions(self):
        return self.seq_len + self.n_packed * self.block_size

    def tables(self, rows):
        """Lengths (B, 2) of rows: tokens in full precision, compressed blocks; both tables (B, 2,
        width)."""
        rows = torch.tensor(rows)
        width = max(int(self.n_owned[rows].max()), int(self.n_packed[rows].max()))
        lengths = torch.stack([self.seq_len[rows], self.n_packed[rows]], 1)
        tables = torch.stack([self.block_table[rows, :width], self.packed_table[rows, :width]], 1)
        return lengths.to(self.memory.device), tables

    def attend(self, layer, q, k, v, cache_seqlens, block_table):
        """flash_attn_with_kvcache() over all blocks of some rows; lengths and tables: tables()'."""
        seq_len, n_packed = cache_seqlens.unbind(1)
        table, packed = block_table.unbind(1)
        if q.shape[1] == 1 and self.codec.decode and attention.can_decode(q):
            own = (*self.layer(layer), k, v, seq_len, table)
            return self.codec.decode(q, own, self.parts["block"][:, layer], n_packed, packed)
        if not n_packed.any():
            places = {"cache_seqlens": seq_len, "block_table": table, "causal": True}
            return attention.flash_attn_with_kvcache(q, *self.layer(layer), k, v, **places)
        return self.attend_restored(layer, q, k, v, seq_len, table, n_packed, packed)

    def attend_restored(self, layer, q, k, v, seq_len, table, n_packed, packed):
        """The same for any codec and device, from a copy of a row's blocks, all restored."""
        out = torch.empty_like(q)
        for i, n in enumerate(n_packed.tolist()):
            one, stored = slice(i, i + 1), int(seq_len[i])
            ids = table[i, : blocks_for(stored + q.shape[1], self.block_size)]
            restored = self.codec.restore(self.parts, packed[i, :n], layer)
            blocks = torch.cat([restored, self.kv[layer][:, ids]], 1)  # (2, n, Hkv, block_size, D)
            numbers = torch.arange(blocks.shape[1], dtype=torch.int32, device=q.device)
            length = seq_len[one] + n * self.block_size
            places = {"cache_seqlens": length, "block_table": numbers[None]}
            out[one] = attention.flash_attn_with_kvcache(
                q[one], *blocks.transpose(2, 3), k[one], v[one], **places, causal=True
            )
            self.kv[layer][:, ids] = blocks[:, n:]  # With what is new.
        return out

    def advance(self, new):
        super().advance(new)
        for row in new:
            n = int(self.seq_len[row]) // self.block_size - 1 - self.residual
            if n > 0:
                self.compress(row, n)

    def compress(self, row, n):
        """The n blocks behind the first one are encoded; their room is free at once."""
        ids = self.block_table[row, 1 : 1 + n].tolist()
        encoded = self.codec.encode(torch.stack([self.blocks[block] for block in ids]))
        behind = self.block_table[row, 1 : self.n_owned[row]]
        behind.copy_(behind.roll(-n))
        self.n_owned[row] -= n
        self.seq_len[row] -= n * self.block_size
        self.full.free(ids)
        packed, first = self.packed.take(n), int(self.n_packed[row])
        self.packed_table[row, first : first + n] = self.packed_table.new_tensor(packed)
        self.n_packed[row] += n
        for name, values in encoded.items():
            for room, value in zip(packed, values, strict=True):
                self.parts[name][room] = value

    def usage(self):
        """In tokens of full precision: a compressed block counts as the bytes that it takes."""
        packed = self.packed.n * self.packed_bytes / self.block_bytes * self.block_size
        return self.full.n * self.block_size + packed, int(self.seq_len.sum()) + packed

    def release(self, row):
        self.full.free(self.block_table[row, : self.n_owned[row]].tolist())
        self.packed.free(self.packed_table[row, : self.n_packed[row]].tolist())
        self.seq_len[row] = self.n_owned[row] = self.n_packed[row] = 0
