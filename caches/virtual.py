"""Virtual memory: a range of addresses, which costs nothing, and memory behind some of its pages.

A kernel that reads a row of a cache in such a range sees one contiguous piece. Which pages have
memory is decided outside of it, by calls to the operating system or, on a GPU, to the CUDA driver.
"""

import math
import mmap
import sys
from contextlib import suppress

import torch

from kvcache import blocks_for


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
        """How many groups of pages hold n_tokens."""
        return blocks_for(n_tokens * self.token_bytes, self.group_bytes)

    def n_free(self):
        """How many groups no request needs."""
        return self.n_groups - sum(self.n_needed)

    def growth(self):
        """{row: groups that it needs with one more token} of the rows for which that is more."""
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
        """Unmap n groups that no request needs, of idle rows before others."""
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
        return self.seq_len[rows].to(self.kv.device), numbers.to(self.kv.device)

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


class HostPages:
    """Pages of an anonymous mapping on a CPU; the first write to a page puts memory behind it.

    madvise gives it back: at once on Linux; on macOS when the system runs short of memory.
    """

    def __init__(self, n_pages, page_bytes):
        if not hasattr(mmap, "MADV_DONTNEED"):
            raise ValueError("this needs madvise, as Linux and macOS have it")
        if page_bytes % mmap.PAGESIZE:
            raise ValueError(f"pages are multiples of {mmap.PAGESIZE // 1024} KiB here")
        # MAP_NORESERVE: what is reserved may be more than all memory.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0x4000 if sys.platform == "linux" else 0)
        self.page_bytes = page_bytes
        self.memory = mmap.mmap(-1, n_pages * page_bytes, flags=flags)
        with suppress(AttributeError, OSError):  # Where Linux would put 2 MiB behind one page.
            self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)

    def map(self, places):
        """Put memory behind these pages, which have none."""
        self.bytes.view(-1, self.page_bytes)[places, :: mmap.PAGESIZE] = 0

    def unmap(self, places):
        """Give the memory behind these pages back; what they held is lost."""
        for page in places:
            self.memory.madvise(mmap.MADV_DONTNEED, page * self.page_bytes, self.page_bytes)


class CudaPages:
    """The same on a GPU, with memory in pieces the size of a page, which move from page to page."""

    def __init__(self, n_pages, page_bytes, most, device=None):
        """Addresses for n_pages and memory for `most`, which is taken now, so that it is there."""
        from cuda.bindings import driver

        device = device or torch.device("cuda", torch.cuda.current_device())
        self.driver, self.page_bytes = driver, page_bytes
        self.prop, self.access = driver.CUmemAllocationProp(), driver.CUmemAccessDesc()
        self.prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.prop.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.prop.location.id = device.index or 0
        self.access.location = self.prop.location
        self.access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        torch.empty(1, device=device)  # There is a context after this.
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        unit = self.call("cuMemGetAllocationGranularity", self.prop, least)
        if page_bytes % unit:
            raise ValueError(f"pages are multiples of {unit // 1024} KiB here")
        size = n_pages * page_bytes
        self.base = int(self.call("cuMemAddressReserve", size, 0, 0, 0))
        storage = torch._C._construct_storage_from_data_pointer(self.base, device, size)
        self.bytes = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        self.unused = [self.call("cuMemCreate", page_bytes, self.prop, 0) for _ in range(most)]
        self.handles = {}  # Those in use, by page.

    def call(self, name, *args):
        """A function of the driver. Raises RuntimeError with its result code if that is not 0."""
        code, *results = getattr(self.driver, name)(*args)
        if int(code):
            raise RuntimeError(f"{name}: {code}")
        return results[0] if results else None

    def map(self, places):
        for page in places:
            self.handles[page] = handle = self.unused.pop()
            start = self.base + page * self.page_bytes
            self.call("cuMemMap", start, self.page_bytes, 0, handle, 0)
            self.call("cuMemSetAccess", start, self.page_bytes, [self.access], 1)

    def unmap(self, places):
        torch.cuda.synchronize()  # The driver does not wait for what may still read them.
        for page in places:
            self.call("cuMemUnmap", self.base + page * self.page_bytes, self.page_bytes)
            self.unused.append(self.handles.pop(page))
