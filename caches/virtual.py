"""Rows of addresses, which cost nothing, with memory behind those pages that tokens are in.

A kernel that reads such a row sees one contiguous piece. Which pages have memory is decided outside
of it, by calls to the operating system or, on a GPU, to the CUDA driver: see support/pages.py.
"""

import torch

from kvcache import PagedCache, blocks_for
from support.pages import CudaPages, HostPages


class VirtualCache:
    """Rows of max_seq_len slots, of which the first have memory: n_mapped[row] pages.

    A request needs the first n_needed[row] pages of its row. What is mapped besides stays, for the
    row to grow into or for its next request, until another row needs the memory: deferred
    reclamation. (vAttention, Prabhu et al. 2024. For the calls see kvcache.py.)

    All layers' keys and values of a token lie side by side: with tensors for each layer, a row
    would grow by a page in each of these, 128 MiB for Llama-3-8B on a GPU.
    """

    def __init__(self, budget, page_bytes, max_rows, max_seq_len, shape, dtype, device):
        """Use up to `budget` bytes. shape: (layers, K and V heads, D).

        Raises ValueError, OSError, ImportError or RuntimeError where this cannot be had.
        """
        L, Hkv, D = shape
        self.page_bytes, self.token_bytes = page_bytes, 2 * L * Hkv * D * dtype.itemsize
        self.n_pages, self.row_pages = budget // page_bytes, self.pages_for(max_seq_len)
        size = (max_rows * self.row_pages, page_bytes)
        self.pages = CudaPages(*size, self.n_pages) if device == "cuda" else HostPages(*size)
        rows, of_row = self.pages.bytes.view(max_rows, -1), (max_seq_len, L, 2, Hkv, D)
        slots = rows[:, : max_seq_len * self.token_bytes].view(dtype).unflatten(1, of_row)
        self.kv = slots.permute(3, 2, 0, 1, 4, 5)  # (2, L, max_rows, max_seq_len, Hkv, D)
        self.n_mapped, self.n_needed = [0] * max_rows, [0] * max_rows
        self.idle = list(range(max_rows))  # Rows without a request, first those idle for longest.
        self.seq_len = torch.zeros(max_rows, dtype=torch.int32)  # Tokens stored.

    def pages_for(self, n_tokens):
        """How many pages hold n_tokens."""
        return blocks_for(n_tokens * self.token_bytes, self.page_bytes)

    def n_free(self):
        """How many pages no request needs."""
        return self.n_pages - sum(self.n_needed)

    def growth(self):
        """{row: pages that it needs with one more token} of the rows that have fewer of them."""
        ends = {row: self.pages_for(n + 1) for row, n in enumerate(self.seq_len.tolist())}
        return {row: end for row, end in ends.items() if end > self.n_needed[row] > 0}

    def can_grow(self):
        more = [end - self.n_needed[row] for row, end in self.growth().items()]
        return sum(more) <= self.n_free()

    def grow(self):
        for row, end in self.growth().items():
            self.need(row, end)

    def need(self, row, n):
        """A row needs its first n pages from now on; they get memory."""
        self.n_needed[row] = n
        if (more := n - self.n_mapped[row]) > 0:
            self.reclaim(sum(self.n_mapped) + more - self.n_pages)
            self.pages.map(self.places(row, self.n_mapped[row], n))
            self.n_mapped[row] = n

    def reclaim(self, n):
        """Unmap n pages, if any, that no request needs: of idle rows, then of those with spare."""
        for row in (*self.idle, *range(len(self.n_needed))):
            if (some := min(n, self.n_mapped[row] - self.n_needed[row])) > 0:
                self.n_mapped[row] -= some
                first = self.n_mapped[row]
                self.pages.unmap(self.places(row, first, first + some))
                n -= some

    def places(self, row, first, end):
        """A row's pages first .. end - 1 among those of all rows."""
        return range(row * self.row_pages + first, row * self.row_pages + end)

    def can_admit(self, tokens):
        """Whether there is memory for the tokens, and for each request to grow by a page."""
        n_rows = len(self.seq_len) - len(self.idle)
        return self.pages_for(len(tokens)) + n_rows <= self.n_free()

    def admit(self, tokens):
        """Takes the idle row with the most memory."""
        row = max(self.idle, key=lambda row: self.n_mapped[row])
        self.idle.remove(row)
        self.need(row, self.pages_for(len(tokens)))
        return row

    positions, advance = PagedCache.positions, PagedCache.advance  # For these seq_len is enough.

    def tables(self, rows):
        """seq_len (B,) and the numbers (B,) of a list of rows: there is no table."""
        numbers = torch.tensor(rows, dtype=torch.int32)
        return self.seq_len[numbers].to(self.kv.device), numbers.to(self.kv.device)

    def layer(self, i):
        """k_cache and v_cache of a layer, (max_rows, max_seq_len, Hkv, D) each."""
        return self.kv[0, i], self.kv[1, i]

    def usage(self):
        """Slots that the pages of all requests have room for, and slots that hold a token."""
        reserved = sum(self.n_needed) * self.page_bytes / self.token_bytes
        return reserved, int(self.seq_len.sum())

    def release(self, row):
        """Its pages stay mapped until others need the memory."""
        self.seq_len[row] = self.n_needed[row] = 0
        self.idle.append(row)
