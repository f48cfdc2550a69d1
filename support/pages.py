"""Ranges of virtual memory, and memory behind some of their pages: calls to system and driver."""

import mmap
import sys
from contextlib import suppress

import torch


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
        self.bytes.view(-1, self.page_bytes)[places, :: mmap.PAGESIZE] = 0  # A byte in each.

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
