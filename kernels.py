"""The operations in which the time goes: matrix products, attention, copies between memories.

Throughout this file
    B  requests in the batch, one row each       H    query heads
    T  new tokens of a request in this step      Hkv  key and value heads, H / Hkv share one
    M  pieces of all rows together               D    size of a head
"""

import functools
import math
import mmap
import os
import time

import torch
import torch.nn.functional as F

try:  # The CUDA kernel; where it is not installed, the definition below does the work.
    from flash_attn import flash_attn_with_kvcache as flash_attn_kernel
except ImportError:
    flash_attn_kernel = None

# oneDNN keeps a compiled kernel of 0.5 MB for each shape that it meets, and ideep, between it and
# torch, keeps them again. With 1,024 each, as is usual, 100 prompts in 0.2 GB took 0.3 GB more, and
# as long.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "96")
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


# --- Attention ------------------------------------------------------------------------------------


def runs_flash_attn(device, dtype):
    """Whether attention is flash-attn's kernel, which takes blocks of 256 tokens or a multiple."""
    return flash_attn_kernel and torch.device(device).type == "cuda" and dtype != torch.float32


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, block_table=None, causal=False
):
    """Attention of q (B, T, H, D) over cached keys and values, as flash-attn 2 defines it.

    k, v (B, T, Hkv, D) are stored first, behind the cache_seqlens (B,) tokens that each row has in
    k_cache, v_cache (B, slots, Hkv, D), or (n_blocks, block_size, Hkv, D) with a block_table (B,
    width). causal: the last query sees all keys, the one before it all but the last, and so on.
    Each row has at least one key, and at least T if causal. Returns (B, T, H, D). Slots behind the
    end of a row and blocks that are not its own have no influence as long as all is finite.
    """
    if runs_flash_attn(q.device, q.dtype):
        return flash_attn_kernel(
            q, k_cache, v_cache, k, v,
            cache_seqlens=cache_seqlens, block_table=block_table, causal=causal,
        )  # fmt: skip
    (B, T), ends = q.shape[:2], cache_seqlens
    if k is not None:
        block, slot = new_slots(cache_seqlens, block_table, T, k_cache.shape[1])
        k_cache[block, slot], v_cache[block, slot] = k, v
        ends = cache_seqlens + T
    # Up to three short rows are faster by row: one of 100 tokens takes less than half as long.
    if block_table is None or T > 1 or (B <= 3 and block_table.numel() * k_cache.shape[1] <= 1024):
        return by_row(q, k_cache, v_cache, ends, block_table, causal)
    return by_block(q, k_cache, v_cache, ends, block_table)


def by_row(q, k_cache, v_cache, ends, block_table, causal):
    """Attention row by row; keys and values in blocks are copied into one piece first."""
    (_, T, H, D), block_size, Hkv = q.shape, *k_cache.shape[1:3]
    out = torch.empty_like(q)
    tile = max(64, T // 32)  # Queries at a time: more tiles were more kernels than oneDNN keeps.
    later = torch.ones(tile, tile, dtype=torch.bool, device=q.device).triu(1)[:, None]
    for row, n in enumerate(ends.tolist()):
        keys, values = k_cache[row, :n], v_cache[row, :n]  # (n, Hkv, D)
        if block_table is not None:
            ids = block_table[row, : -(-n // block_size)]
            keys = k_cache.index_select(0, ids).flatten(0, 1)[:n]
            values = v_cache.index_select(0, ids).flatten(0, 1)[:n]
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)  # (Hkv, n, D)
        queries = q[row].view(T, Hkv, H // Hkv, D).transpose(0, 1)  # (Hkv, T, H / Hkv, D)
        if T == 1:  # The heads that share keys go in as that many queries of one head.
            attended = F.scaled_dot_product_attention(queries[:, 0][None], keys[None], values[None])
            out[row] = attended.view(1, H, D)
            continue
        # Written out, for a tile of queries at a time, whose scores stay in the processor's cache.
        # SDPA takes 1.6 to 2.1 times as long in bfloat16 from 400 tokens on, 0.5 to 1 in float32.
        # The last tile sees most keys: the memory that its scores leave is enough for the others'.
        for start in reversed(range(0, T, tile)):
            some = queries[:, start : start + tile] * D**-0.5  # (Hkv, t, H / Hkv, D)
            t = some.shape[1]
            end = n - T + start + t if causal else n  # What the last of these queries sees.
            scores = some.flatten(1, 2) @ keys[:, :end].transpose(1, 2)
            scores = scores.unflatten(1, (t, -1))  # (Hkv, t, H / Hkv, end)
            if causal:
                scores[..., end - t :].masked_fill_(later[:t, :, :t], -math.inf)
            attended = scores.softmax(3).flatten(1, 2) @ values[:, :end]
            out[row, start : start + t] = attended.view(Hkv, t, -1, D).transpose(0, 1).flatten(1, 2)
    return out


def remember_last(function):
    """Keep the last result for equal arguments: in a decode step, all layers ask for the same.

    Measured with 49 rows: pieces_of() once a step saves 7 of 88 ms. (With retrieval each layer has
    a table of its own, and nothing is saved.)
    """
    last = None  # Copies of the arguments, and the result.

    def same(a, b):
        if torch.is_tensor(a) and torch.is_tensor(b):
            return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        return a == b

    @functools.wraps(function)
    def remembering(*args):
        nonlocal last
        if not last or not all(map(same, args, last[0])):
            copies = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
            last = copies, function(*args)
        return last[1]

    return remembering


@remember_last
def new_slots(cache_seqlens, block_table, T, block_size):
    """Block and slot of each row's next T tokens, (B, T) each."""
    slot = cache_seqlens[:, None].long() + torch.arange(T, device=cache_seqlens.device)
    if block_table is None:  # A row is one block.
        return torch.arange(len(slot), device=slot.device)[:, None], slot
    return block_table.gather(1, slot // block_size), slot % block_size


@remember_last
def pieces_of(ends, block_table, block_size, Hkv):
    """What by_block() reads: rows cut into pieces, of as many blocks as make 64 tokens or more.

    Returns where the pieces are, as numbers of matrices: block * Hkv + head, (M, Hkv, blocks of a
    piece); each piece's row (M,); a mask to be added to the scores (M, 1, tokens of a piece); and
    which piece is a row's first (B,). The pieces of a row follow each other; behind all of them
    come some that are masked as a whole.
    """
    device, per_piece = ends.device, -(-64 // block_size)  # Blocks.
    table = F.pad(block_table, (0, -block_table.shape[1] % per_piece))
    table = table.unflatten(1, (-1, per_piece))  # (B, pieces of the longest row, per_piece)
    first = torch.arange(table.shape[1], device=device) * (per_piece * block_size)  # Their tokens.
    row, nth = (first < ends[:, None]).nonzero(as_tuple=True)  # Row after row.
    left, starts = ends[row] - first[nth], (nth == 0).nonzero()[:, 0]
    # oneDNN makes a kernel for each M that it meets: 0.5 ms and 0.7 MB. Multiples of 16 are few.
    row, nth, left = (F.pad(numbers, (0, -len(row) % 16)) for numbers in (row, nth, left))
    behind = torch.arange(per_piece * block_size, device=device) >= left[:, None]
    ids = table[row, nth].long().masked_fill_(behind[:, ::block_size], 0)  # (M, per_piece)
    ids = ids[:, None] * Hkv + torch.arange(Hkv, device=device)[:, None]
    mask = torch.zeros(behind.shape, device=device).masked_fill_(behind, -math.inf)
    return ids, row, mask[:, None], starts


@functools.lru_cache(maxsize=1)
def workspace(shape, dtype, device):
    """Memory to copy into, the same one as long as the same is asked for.

    Otherwise glibc may return each copy to the system, and every page of the next one faults: with
    133 rows in llama3-tiered.py, decode took 112 s instead of 50.
    """
    with torch.inference_mode(False):  # What inference mode makes cannot be written outside it.
        return torch.empty(shape, dtype=dtype, device=device)


def by_block(q, k_cache, v_cache, ends, block_table):
    """Attention of one query a row, block by block (PagedAttention, section 4.1).

    Each row is cut into pieces of 64 tokens, copied out of its blocks wherever they lie. The pieces
    of all rows are one batch of equally small products, so that rows of different lengths need no
    padding. Measured over SmolLM2's 30 layers with 49 rows of 280 tokens: 29 to 53 ms, by row 110
    to 210. Reading blocks of 32 in place made decode steps 0.93 to 1.05 times as long, and is
    possible only where they lie close together and no rows share any. The price: bmm rounds the
    scores to q's dtype, so that in bfloat16 the error is about twice that by row.
    """
    (B, _, H, D), (_, block_size, Hkv, _) = q.shape, k_cache.shape
    ids, row, mask, starts = pieces_of(ends, block_table, block_size, Hkv)
    M, size = len(row), mask.shape[2]
    # A matrix for each block and head. PagedCache lays them out so; others would be copied here.
    k_cache, v_cache = k_cache.transpose(1, 2).flatten(0, 1), v_cache.transpose(1, 2).flatten(0, 1)
    matrices = workspace((ids.numel(), block_size, D), q.dtype, q.device)
    pieces = matrices.view(M * Hkv, size, D)  # First their keys, then their values.
    queries = (q * D**-0.5).view(B, H * D).index_select(0, row).view(-1, H // Hkv, D)
    torch.index_select(k_cache, 0, ids.flatten(), out=matrices)
    scores = torch.bmm(queries, pieces.transpose(1, 2)).view(M, H, size)
    scores = torch.add(mask, scores, alpha=math.log2(math.e))  # 2^x: e^x takes 3 times as long.
    highest = scores.new_full((B, H), -math.inf)
    highest.scatter_reduce_(0, row[:, None].expand(-1, H), scores.amax(2), "amax")
    weights = scores.sub_(highest[row][..., None]).exp2_()
    totals = scores.new_zeros(B, H).index_add_(0, row, weights.sum(2))
    weights = weights.div_(totals[row][..., None]).to(q.dtype).view(-1, H // Hkv, size)
    torch.index_select(v_cache, 0, ids.flatten(), out=matrices)
    attended = torch.bmm(weights, pieces).view(M, H * D)
    # The sum over each row's pieces. index_add_, which needs float copies, takes 4 times as long.
    places = torch.arange(M, device=q.device)
    return F.embedding_bag(places, attended, starts, mode="sum").view(B, 1, H, D)


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
