"""Matrix products, and memory and copies below the KV cache."""

import math
import mmap
import os
import time

import torch
import torch.nn.functional as F

# oneDNN keeps a compiled kernel of 0.5 MB for each shape that it meets, 1,024 of them as is usual,
# and ideep, between it and torch, keeps them again. A step needs five; to keep 96 of them took more
# memory than 16 and was no faster.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "8")


# --- Matrix products ------------------------------------------------------------------------------


def pack(weight):
    """The matrix in oneDNN's blocked layout if it is bfloat16 on a CPU that can multiply that.

    Measured with AVX512-BF16: 1 to 8 rows times all matrices of SmolLM2 take half as long as with
    the plain layout, 49 rows three quarters, 2,048 rows nine tenths.
    """
    on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.ops.mkldnn._reorder_linear_weight(weight)
    return weight


def linear(x, weight):
    """x (rows, n_in) times the transpose of weight (n_out, n_in), packed or plain, of x's dtype."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


# --- Memory and copies ----------------------------------------------------------------------------


def zeros(size, dtype, device, pinned=False):
    """Zeros, on a CPU straight from the system: they take no room until they are written to.

    pinned: a GPU may copy from and to them while it computes. (torch would round their size up.)
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    memory = mmap.mmap(-1, max(1, math.prod(size)) * dtype.itemsize)
    tensor = torch.frombuffer(memory, dtype=dtype)[: math.prod(size)].view(size)
    if pinned:
        torch.cuda.check_error(
            torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        )
    return tensor


class Link:
    """One direction between HBM and DRAM, in which copies follow each other.

    On CUDA a stream of its own, beside the computation. Elsewhere a copy is made at once; where gbs
    is given, it counts as under way for as long as a link of gbs (1e9 bytes a second) would take.
    """

    def __init__(self, on_cuda, gbs=None):
        self.stream, self.gbs = torch.cuda.Stream() if on_cuda else None, gbs
        self.seconds, self.idle_at = 0.0, 0.0  # On a CPU: spent copying; the end of the last copy.

    def copy(self, pairs):
        """Start to copy each (target, source). Returns a function that waits until that is done.

        On CUDA it makes the GPU's later work wait, not the caller.
        """
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())  # Which has written the sources.
            with torch.cuda.stream(self.stream):
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
            event = self.stream.record_event()
            return lambda: torch.cuda.current_stream().wait_event(event)
        start = time.perf_counter()
        for target, source in pairs:
            target.copy_(source)
        self.seconds += time.perf_counter() - start
        takes = sum(source.nbytes for _, source in pairs) / (self.gbs or math.inf) / 1e9
        self.idle_at = end = max(start, self.idle_at) + takes
        return lambda: time.sleep(max(0, end - time.perf_counter()))
