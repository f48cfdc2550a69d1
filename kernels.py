"""The operations in which the time goes: matrix products, attention, copies between memories.

Throughout this file
    B  requests in the batch, one row each       H    query heads
    T  new tokens of a request in this step      Hkv  key and value heads, H / Hkv share one
    M  blocks read for all rows together         D    size of a head
"""

import functools
import math
import mmap
import time

import torch
import torch.nn.functional as F

try:  # The CUDA kernel; where it is not installed, the definition below does the work.
    from flash_attn import flash_attn_with_kvcache as flash_attn_kernel
except ImportError:
    flash_attn_kernel = None


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
    end of a row and blocks of no row have no influence as long as their numbers are finite.
    """
    if runs_flash_attn(q.device, q.dtype):
        return flash_attn_kernel(
            q, k_cache, v_cache, k, v,
            cache_seqlens=cache_seqlens, block_table=block_table, causal=causal,
        )  # fmt: skip
    B, T = q.shape[:2]
    ends = cache_seqlens
    if k is not None:
        block, slot = new_slots(cache_seqlens, block_table, T, k_cache.shape[1])
        k_cache[block, slot], v_cache[block, slot] = k, v
        ends = cache_seqlens + T
    if block_table is not None and T == 1 and B > 3:  # One to three rows are faster by row.
        return by_block(q, k_cache, v_cache, ends, block_table)
    return by_row(q, k_cache, v_cache, ends, block_table, causal)


def by_row(q, k_cache, v_cache, ends, block_table, causal):
    """Attention row by row; keys and values in blocks are copied into one piece first."""
    (_, T, H, D), block_size, Hkv = q.shape, *k_cache.shape[1:3]
    out = torch.empty_like(q)
    later = torch.ones(128, 128, dtype=torch.bool, device=q.device).triu(1)[:, None]
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
        # Written out, for 128 queries at a time, whose scores stay in the processor's cache. SDPA
        # takes 1.5 to 1.7 times as long in bfloat16 from 400 tokens on, 0.7 times in float32.
        for start in range(0, T, 128):
            some = queries[:, start : start + 128] * D**-0.5  # (Hkv, t, H / Hkv, D)
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

    Measured with 49 rows: blocks_in_use() once a step saves 4 to 8 of some 90 ms. (With retrieval
    each layer has a table of its own, and nothing is saved.)
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
def blocks_in_use(ends, block_table, block_size, n_blocks):
    """Which blocks by_block() reads, and whose they are.

    Returns their ids, a slice or a tensor (M,); row (M,), 0 for those of no row; a mask to be added
    to the scores (M, 1, block_size); where among the M each row's blocks are, row after row, and
    where in that list each row begins (B,).
    """
    device = ends.device
    first = torch.arange(block_table.shape[1], device=device) * block_size
    row, nth = (first < ends[:, None]).nonzero(as_tuple=True)  # Row after row.
    ids, left = block_table[row, nth].long(), (ends[:, None] - first)[row, nth]
    places, starts = torch.arange(len(ids), device=device), (nth == 0).nonzero()[:, 0]
    low, high = int(ids.min()), int(ids.max()) + 1
    in_place = high - low <= 1.5 * len(ids) and len(ids.unique()) == len(ids)
    # oneDNN makes a kernel for each size that it meets: 0.3 ms and 0.6 MB. So there are few sizes.
    M = -(-(high - low if in_place else len(ids)) // 32) * 32
    if in_place:
        M = min(M, n_blocks - low)
        places, ids = ids - low, slice(low, low + M)
    else:
        ids = F.pad(ids, (0, M - len(ids)), value=low)
    whose = places.new_zeros(2, M)  # Of each block: its row, and its row's tokens from here on.
    whose[:, places] = torch.stack([row, left])
    behind = torch.arange(block_size, device=device) >= whose[1][:, None]
    mask = torch.zeros(behind.shape, device=device).masked_fill_(behind, -math.inf)
    return ids, whose[0], mask[:, None], places, starts


def by_block(q, k_cache, v_cache, ends, block_table):
    """Attention of one query a row, block by block (PagedAttention, section 4.1).

    The blocks of all rows are one batch of equally small products, so that rows of different
    lengths need no padding. If each belongs to one row and few others lie between them, they are
    read where they are: a batch of which no request has ended looks like that. Measured over
    SmolLM2's 30 layers with 49 rows of 280 tokens, in blocks of 32: 40 to 51 ms in place and by
    row 120 to 250. Copied, 184 to 207, no better than by row: glibc returns the memory of each copy
    to the system. With MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ at 1e9: 57. The price: bmm
    rounds the scores to q's dtype, so that in bfloat16 the error is about twice that by row.
    """
    (B, _, H, D), (n_blocks, block_size, Hkv, _) = q.shape, k_cache.shape
    ids, row, mask, places, starts = blocks_in_use(ends, block_table, block_size, n_blocks)
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)  # (n_blocks, Hkv, slots, D)
    if isinstance(ids, slice):
        keys, values = keys[ids], values[ids]
    else:  # Faster than keys[ids].
        keys, values = keys.index_select(0, ids), values.index_select(0, ids)
    queries = (q * D**-0.5).view(B, H * D).index_select(0, row).view(-1, H // Hkv, D)
    scores = torch.bmm(queries, keys.flatten(0, 1).transpose(1, 2)).view(-1, H, block_size)
    scores = torch.add(mask, scores, alpha=math.log2(math.e))  # 2^x: e^x takes 3 times as long.
    highest = scores.new_full((B, H), -math.inf)
    highest.scatter_reduce_(0, row[:, None].expand(-1, H), scores.amax(2), "amax")
    weights = scores.sub_(highest[row][..., None]).exp2_()  # (M, H, block_size)
    totals = scores.new_zeros(B, H).index_add_(0, row, weights.sum(2))
    weights = weights.div_(totals[row][..., None]).to(q.dtype).view(-1, H // Hkv, block_size)
    attended = torch.bmm(weights, values.flatten(0, 1)).view(-1, H * D)
    # The sum over each row's blocks. index_add_, which needs float copies, takes 4 times as long.
    attended = F.embedding_bag(places, attended, starts, mode="sum")
    return attended.view(B, 1, H, D)


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
