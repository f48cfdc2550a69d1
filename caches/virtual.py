"""Rows of addresses, which cost nothing, with memory behind those pages that tokens are in.

A kernel that reads such a row sees one contiguous piece. Which pages have memory is decided outside
of it, by calls to the operating system or, on a GPU, to the CUDA driver: see support/pages.py.
"""

import math

import torch

from kvcache import blocks_for
from support.pages import CudaPages, HostPages


class VirtualCache:
    """Rows of max_seq_len slots, of which the first have memory: n_mapped[row] groups of pages.

    A request needs the first n_needed[row] groups of its row. What is mapped besides stays, for the
    row to grow into or for its next request, until another row needs the memory: deferred
    reclamation. (vAttention, Prabhu et al. 2024. For the calls see kvcache.py.)

    by_token: all keys and values of a token lie side by side, and a group is one page. If not, each
    layer's keys and values are a piece by themselves, and a group is a page of each of these 2 L.
    """

    def __init__(self, budget, page_bytes, by_token, max_rows, max_seq_len, shape, dtype, device):
        """Use up to `budget` bytes. shape: (layers, K and V heads, D).

        Raises ValueError, OSError, ImportError or RuntimeError where this cannot be had.
        """
        L, Hkv, D = shape
        self.pieces = 1 if by_token else 2 * L
        self.group_bytes = self.pieces * page_bytes
        self.token_bytes = 2 * L * Hkv * D * dtype.itemsize
        self.n_groups, self.row_groups = budget // self.group_bytes, self.groups_for(max_seq_len)
        size = (max_rows * self.pieces * self.row_groups, page_bytes)
        most = self.n_groups * self.pieces
        self.pages = CudaPages(*size, most) if device == "cuda" else HostPages(*size)
        pieces = self.pages.bytes.view(dtype).view(max_rows, self.pieces, -1)
        slots = (max_seq_len, L, 2, Hkv, D) if by_token else (max_seq_len, Hkv, D)
        pieces = pieces[:, :, : math.prod(slots)].unflatten(2, slots)
        self.kv = (  # (2, L, max_rows, max_seq_len, Hkv, D)
            pieces.squeeze(1).permute(3, 2, 0, 1, 4, 5)
            if by_token
            else pieces.unflatten(1, (L, 2)).permute(2, 1, 0, 3, 4, 5)
        )
        self.n_mapped, self.n_needed = [0] * max_rows, [0] * max_rows
        self.idle = list(range(max_rows))  # Rows without a request, first those idle for longest.
        self.seq_len = torch.zeros(max_rows, dtype=torch.int32)  # Tokens stored.

    def groups_for(self, n_tokens):
        """How many groups of pages hold n_tokens. In pieces, both sizes are 2 L times a piece's."""
        return blocks_for(n_tokens * self.token_bytes, self.group_bytes)

    def n_free(self):
        """How many groups no request needs."""
        return self.n_groups - sum(self.n_needed)

    def growth(self):
        """{row: groups that it needs with one more token} of the rows that have fewer of them."""
        ends = {row: self.groups_for(n + 1) for row, n in enumerate(self.seq_len.tolist())}
        return {row: end for row, end in ends.items() if end > self.n_needed[row] > 0}

    def can_grow(self):
        more = [end - self.n_needed[row] for row, end in self.growth().items()]
        return sum(more) <= self.n_free()

    def grow(self):
        for row, end in self.growth().items():
            self.need(row, end)

    def need(self, row, n):
        """A row needs its first n groups from now on; they get memory."""
        self.n_needed[row] = n
        if (more := n - self.n_mapped[row]) > 0:
            self.reclaim(sum(self.n_mapped) + more - self.n_groups)
            self.pages.map(self.places(row, self.n_mapped[row], n))
            self.n_mapped[row] = n

    def reclaim(self, n):
        """Unmap n groups that no request needs, of idle rows before those with some to spare."""
        for row in (*self.idle, *range(len(self.n_needed))):
            if (some := min(n, self.n_mapped[row] - self.n_needed[row])) > 0:
                self.n_mapped[row] -= some
                first = self.n_mapped[row]
                self.pages.unmap(self.places(row, first, first + some))
                n -= some

    def places(self, row, first, end):
        """The pages of a row's groups first .. end - 1."""
        pieces = range(row * self.pieces, (row + 1) * self.pieces)
        return [piece * self.row_groups + i for piece in pieces for i in range(first, end)]

    def can_admit(self, tokens):
        """Whether there is memory for the tokens, and for each request to grow by a group."""
        n_rows = len(self.seq_len) - len(self.idle)
        return self.groups_for(len(tokens)) + n_rows <= self.n_free()

    def admit(self, tokens):
        """Takes the idle row with the most memory."""
        row = max(self.idle, key=lambda row: self.n_mapped[row])
        self.idle.remove(row)
        self.need(row, self.groups_for(len(tokens)))
        return row

    def positions(self):
        return self.seq_len

    def tables(self, rows):
        """seq_len (B,) and the numbers (B,) of a list of rows: there is no table."""
        numbers = torch.tensor(rows, dtype=torch.int32)
        return self.seq_len[numbers].to(self.kv.device), numbers.to(self.kv.device)

    def layer(self, i):
        """k_cache and v_cache of a layer, (max_rows, max_seq_len, Hkv, D) each."""
        return self.kv[0, i], self.kv[1, i]

    def advance(self, new):
        n_new = torch.tensor([len(tokens) for tokens in new.values()], dtype=torch.int32)
        self.seq_len[list(new)] += n_new

    def usage(self):
        """Slots that the groups of all requests have room for, and slots that hold a token."""
        reserved = sum(self.n_needed) * self.group_bytes / self.token_bytes
        return reserved, int(self.seq_len.sum())

    def release(self, row):
        """Its groups stay mapped until others need the memory."""
        self.seq_len[row] = self.n_needed[row] = 0
        self.idle.append(row)
