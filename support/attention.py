"""The one attention call of all scripts: its definition, and who computes the same faster.

Read by_definition() first. flash_attn_with_kvcache(), which the scripts call, leaves the work to
flash-attn on a CUDA card, to cpu_kernels.py for decode steps on a CPU, to PyTorch's flash kernel
for prompts, and to the definition otherwise.

Throughout this file
    B  requests in the batch, one row each       H    query heads
    T  new tokens of a request in this step      Hkv  key and value heads, H / Hkv share one
    n  tokens of a row, new ones included        D    size of a head
"""

import math
import sys

import torch
import torch.nn.functional as F

try:
    from flash_attn import flash_attn_with_kvcache as flash_attn_kernel
except ImportError:
    flash_attn_kernel = None
try:
    from support.cpu_kernels import can_decode, decode
except ImportError:
    print("Decode steps on a CPU are faster by far with numba: pip install numba", file=sys.stderr)

    def can_decode(q):
        return False


def runs_flash_attn(device, dtype):
    """Whether attention is flash-attn's kernel, which takes blocks of 256 tokens or a multiple."""
    return flash_attn_kernel and torch.device(device).type == "cuda" and dtype != torch.float32


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, cache_batch_idx=None, block_table=None,
    causal=False,
):  # fmt: skip
    """Attention of q (B, T, H, D) over cached keys and values, as flash-attn 2 defines it.

    k, v (B, T, Hkv, D) are stored first, behind the cache_seqlens (B,) tokens that each request has
    in k_cache and v_cache. These are (rows, slots, Hkv, D), and request i has row i, or the row
    cache_batch_idx (B,) names; or they are (n_blocks, block_size, Hkv, D), and request i has the
    blocks of block_table (B, width) in row i. All int32.
    causal: the last query sees all keys, the one before it all but the last, and so on. Each row
    has at least one key, and at least T if causal. Returns (B, T, H, D).
    """
    T, appends = q.shape[1], k is not None
    if runs_flash_attn(q.device, q.dtype):
        return flash_attn_kernel(
            q, k_cache, v_cache, k, v,
            cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, block_table=block_table,
            causal=causal,
        )  # fmt: skip
    if block_table is None:  # A row is one block.
        rows = torch.arange(len(q), dtype=torch.int32, device=q.device)
        block_table = (rows if cache_batch_idx is None else cache_batch_idx)[:, None]
    if T == 1 and appends and can_decode(q):
        return decode(q, k_cache, v_cache, k, v, cache_seqlens, block_table)
    if T > 1 and appends and causal:
        return read_prompts(q, k_cache, v_cache, k, v, cache_seqlens, block_table)
    return by_definition(q, k_cache, v_cache, k, v, cache_seqlens, block_table, causal)


def slots_of(row, n, cache, block_table):
    """Where the first n tokens of a row are: block and slot (n,) of each."""
    t, block_size = torch.arange(n, device=cache.device), cache.shape[1]
    return block_table[row, t // block_size], t % block_size


def by_definition(q, k_cache, v_cache, k, v, cache_seqlens, block_table, causal):
    """Store the new keys and values, then take one softmax for each row, query and head.

    Arguments and result are those of flash_attn_with_kvcache(); contiguous rows are one block each.
    In float32 or better.
    """
    (B, T, H, D), Hkv = q.shape, k_cache.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    for row in range(B):
        stored = int(cache_seqlens[row])
        n = stored if k is None else stored + T
        block, slot = slots_of(row, n, k_cache, block_table)
        if k is not None:
            k_cache[block[stored:], slot[stored:]] = k[row]
            v_cache[block[stored:], slot[stored:]] = v[row]
        keys = k_cache[block, slot].to(dtype).repeat_interleave(H // Hkv, 1)  # (n, H, D)
        values = v_cache[block, slot].to(dtype).repeat_interleave(H // Hkv, 1)
        scores = torch.einsum("thd,nhd->htn", q[row].to(dtype), keys) / math.sqrt(D)
        if causal:
            # Query t is token n - T + t, and sees no later one.
            later = torch.ones(T, n, dtype=torch.bool, device=q.device).triu(n - T + 1)
            scores.masked_fill_(later, -math.inf)
        out[row] = torch.einsum("htn,nhd->thd", scores.softmax(2), values)
    return out


def read_prompts(q, k_cache, v_cache, k, v, cache_seqlens, block_table):
    """The same for several new tokens a row, causal: on a CPU, PyTorch's flash kernel."""
    T, out = q.shape[1], torch.empty_like(q)
    for row, stored in enumerate(cache_seqlens.tolist()):
        keys, values = k[row], v[row]
        block, slot = slots_of(row, stored + T, k_cache, block_table)
        k_cache[block[stored:], slot[stored:]] = keys
        v_cache[block[stored:], slot[stored:]] = values
        mask = {"is_causal": True}
        if stored:  # More keys than queries: is_causal would let query t see keys 0 .. t only.
            keys, values = k_cache[block, slot], v_cache[block, slot]
            ones = torch.ones(T, stored + T, dtype=torch.bool, device=q.device)
            mask = {"attn_mask": ones.tril(stored)}
        heads_first = (x.transpose(0, 1)[None] for x in (q[row], keys, values))  # q: (1, H, T, D)
        attended = F.scaled_dot_product_attention(*heads_first, **mask, enable_gqa=True)
        out[row] = attended[0].transpose(0, 1)
    return out
