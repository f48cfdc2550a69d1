"""The two operations in which the time goes: matrix products and attention.

Throughout this file
    B  requests in the batch, one row each       H    query heads
    T  new tokens of a request in this step      Hkv  key and value heads, H / Hkv share one
    M  blocks of all rows together               D    size of a head
"""

import math

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
    Each row has at least T keys then. Returns (B, T, H, D). Slots behind the end of a row have no
    influence as long as their numbers are finite.
    """
    if runs_flash_attn(q.device, q.dtype):
        return flash_attn_kernel(
            q, k_cache, v_cache, k, v,
            cache_seqlens=cache_seqlens, block_table=block_table, causal=causal,
        )  # fmt: skip
    B, T = q.shape[:2]
    ends = cache_seqlens
    if k is not None:
        block = torch.arange(B, device=q.device)[:, None]  # Without a table, a row is one block.
        slot = cache_seqlens[:, None].long() + torch.arange(T, device=q.device)  # (B, T)
        if block_table is not None:
            block = block_table.gather(1, slot // k_cache.shape[1])
            slot = slot % k_cache.shape[1]
        k_cache[block, slot], v_cache[block, slot] = k, v
        ends = cache_seqlens + T
    if block_table is not None and T == 1 and B > 3:  # One to three rows are faster by row.
        return by_block(q, k_cache, v_cache, ends, block_table)
    return by_row(q, k_cache, v_cache, ends, block_table, causal)


def by_row(q, k_cache, v_cache, ends, block_table, causal):
    """Attention row by row, over keys and values that are copied into one piece."""
    (_, T, H, D), block_size, Hkv = q.shape, *k_cache.shape[1:3]
    out = torch.empty_like(q)
    for row, n in enumerate(ends.tolist()):
        keys, values = k_cache[row, :n], v_cache[row, :n]  # (n, Hkv, D)
        if block_table is not None:
            ids = block_table[row, : -(-n // block_size)]
            keys = k_cache.index_select(0, ids).flatten(0, 1)[:n]
            values = v_cache.index_select(0, ids).flatten(0, 1)[:n]
        mask = None
        if causal and n > T > 1:  # SDPA's is_causal would show the first query only the first key.
            mask = torch.ones(T, n, dtype=torch.bool, device=q.device).tril(n - T)
        # For a single token, the H / Hkv heads that share keys go in as that many queries of one
        # head: on a CPU 3 to 5 times faster than enable_gqa in bfloat16, not in float32.
        queries = q[row].view(Hkv, H // Hkv, D) if T == 1 else q[row].transpose(0, 1)
        attended = F.scaled_dot_product_attention(
            queries[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None],
            attn_mask=mask, is_causal=causal and n == T > 1, enable_gqa=T > 1,
        )  # fmt: skip
        out[row] = attended.view(T, H, D) if T == 1 else attended[0].transpose(0, 1)
    return out


def by_block(q, k_cache, v_cache, ends, block_table):
    """Attention of one query a row, block by block (PagedAttention, section 4.1).

    The blocks of all rows are one batch of equally small products, so that rows of different
    lengths need no padding. If each belongs to one row and few others lie between them, they are
    read where they are: a batch that starts, no prompt having ended, looks like that. Measured over
    SmolLM2's 30 layers with 49 rows of 280 tokens: 42 ms in place, 55 with the blocks copied, by
    row about 110. The price: bmm rounds the scores to q's dtype, so that in bfloat16 the error is
    about twice that by row.
    """
    (B, _, H, D), (_, block_size, Hkv, _) = q.shape, k_cache.shape
    first = torch.arange(block_table.shape[1], device=q.device) * block_size
    row, place = (first < ends[:, None]).nonzero(as_tuple=True)  # (M,) each, row after row
    ids, left = block_table[row, place].long(), (ends[:, None] - first)[row, place]
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)  # (n_blocks, Hkv, slots, D)
    low, high = int(ids.min()), int(ids.max()) + 1
    in_order = ids.new_zeros(2, high - low)  # Of each block: its row, how many tokens are left.
    in_order[:, ids - low] = torch.stack([row, left])
    if high - low <= 1.5 * len(ids) and in_order[1].count_nonzero() == len(ids):
        (row, left), keys, values = in_order, keys[low:high], values[low:high]
    else:
        keys, values = keys.index_select(0, ids), values.index_select(0, ids)

    queries = (q * D**-0.5).view(B, H * D).index_select(0, row).view(-1, H // Hkv, D)
    scores = torch.bmm(queries, keys.flatten(0, 1).transpose(1, 2)).view(-1, H, block_size).float()
    nth, slot = (torch.arange(block_size, device=q.device) >= left[:, None]).nonzero(as_tuple=True)
    scores[nth, :, slot] = -math.inf
    highest = scores.new_full((B, H), -math.inf)
    highest.scatter_reduce_(0, row[:, None].expand(-1, H), scores.amax(2), "amax")
    weights = scores.sub_(highest[row][..., None]).exp_()  # (M, H, block_size)
    totals = scores.new_zeros(B, H).index_add_(0, row, weights.sum(2))

    weights = weights.to(q.dtype).view(-1, H // Hkv, block_size)
    attended = torch.bmm(weights, values.flatten(0, 1)).view(-1, H, D).float()
    attended = scores.new_zeros(B, H, D).index_add_(0, row, attended) / totals[..., None]
    return attended.to(q.dtype)[:, None]
