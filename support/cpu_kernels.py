"""Decode attention on a CPU: PagedAttention (Kwon et al. 2023, section 4.1) as one compiled loop.

    for each row and K/V head, shared out among the processor's cores
        store the new token's key and value in its slot
        for each token of the row, in the block where it lies
            score = query . key                     for each query head of the group
        weights = softmax(scores)
        for each token of the row, in the block where it lies
            attended += weight * value              for each query head of the group

No key or value is gathered, copied or padded: a block is read in place, and a contiguous row is the
case of one block a row. All is computed in float32.

Throughout this file
    B  requests in the batch, one row each       H    query heads
    G  query heads that share a K/V head         Hkv  key and value heads, H = G * Hkv
    n  tokens of a row, the new one included     D    size of a head
"""

import functools
import math

import numpy as np
import torch
from numba import prange

from support.numba_help import as_float, compile_once, prefetch, softmax

# numpy has no bfloat16, and numba computes with neither float of 16 bits: both go in as integers,
# one as unsigned ones, the other as signed ones, which tells them apart.
AS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}

# Tokens between the one that is read and the one that prefetch() asks for: 16 to 48 were the same.
AHEAD = 16


@functools.cache
def compiled(dtype, D, G):
    """The loop for a dtype, head size and group. numba takes them as constants, which is faster.

    Compiled when first asked for and kept on disk, in __pycache__ or else the user's cache folder.
    """
    scale = np.float32(D**-0.5 * math.log2(math.e))  # Scores in bits: weights are powers of 2.

    # k_cache and v_cache: all numbers of a cache in one line; strides lead to the next block, slot
    # and head. A block has `size` slots.
    def loop(q, k, v, k_cache, v_cache, seq_len, block_table, out, sums, size, strides):
        (B, Hkv, _), (block_stride, slot_stride, head_stride) = k.shape, strides
        for item in prange(Hkv * B):
            h, row = item // B, item % B
            n = seq_len[row] + 1
            # Where each token lies, and the last one once more for what looks ahead.
            at = np.empty(n + AHEAD, np.int64)
            for i in range(-(-n // size)):
                first = block_table[row, i] * block_stride + h * head_stride
                for t in range(i * size, min(n, i * size + size)):
                    at[t] = first + (t - i * size) * slot_stride
            for t in range(n, len(at)):
                at[t] = at[n - 1]
            for d in range(D):
                k_cache[at[n - 1] + d] = k[row, h, d]
                v_cache[at[n - 1] + d] = v[row, h, d]
            query = np.empty((G, D), np.float32)
            for g in range(G):
                for d in range(D):
                    query[g, d] = as_float(q[row, h * G + g, d]) * scale

            weights = np.empty((G, n), np.float32)  # First the scores.
            for t in range(n):
                prefetch(k_cache, at[t + AHEAD], D)
                key = k_cache[at[t] : at[t] + D]
                for g in range(G):
                    score = np.float32(0)
                    for d in range(D):
                        score += query[g, d] * as_float(key[d])
                    weights[g, t] = score
            for g in range(G):
                sums[row, h * G + g] = softmax(weights[g])

            attended = out[row, h * G : (h + 1) * G]  # Zeros so far.
            for t in range(n):
                prefetch(v_cache, at[t + AHEAD], D)
                value = v_cache[at[t] : at[t] + D]
                for g in range(G):
                    for d in range(D):
                        attended[g, d] += weights[g, t] * as_float(value[d])

    number = str(AS[dtype]).removeprefix("torch.")
    signature = (
        f"({number}[:,:,:], {number}[:,:,:], {number}[:,:,:], {number}[::1], {number}[::1], "
        "int32[:], int32[:,:], float32[:,:,::1], float32[:,::1], int64, UniTuple(int64, 3))"
    )
    return compile_once(loop, f"{number}-{D}-{G}", signature)


def flat(cache):
    """All numbers from a layer's first one on: its strides lead through those of other layers."""
    start = cache.storage_offset()
    size = cache.untyped_storage().nbytes() // cache.itemsize - start
    return cache.as_strided((size,), (1,), start)


def can_decode(q):
    """Whether decode() is for this device and dtype."""
    return q.device.type == "cpu" and q.dtype in AS


def decode(q, k_cache, v_cache, k, v, cache_seqlens, block_table, sums=None):
    """flash_attn_with_kvcache() for one new token a row: q (B, 1, H, D), k and v (B, 1, Hkv, D).

    sums (B, H), if it is given, gets log2 of the sum of 2^score, in bits, of each softmax."""
    (B, _, H, D), (_, block_size, Hkv, _) = q.shape, k_cache.shape
    assert q.dtype == k.dtype == k_cache.dtype and k_cache.stride() == v_cache.stride()
    lengths, table = cache_seqlens.numpy(), block_table.numpy()
    assert lengths.max() < table.shape[1] * block_size, "no slot for the new token"
    tensors = (q[:, 0], k[:, 0], v[:, 0], flat(k_cache), flat(v_cache))
    out, sums = torch.zeros(B, H, D), torch.empty(B, H) if sums is None else sums
    compiled(q.dtype, D, H // Hkv)(
        *(x.view(AS[q.dtype]).numpy() for x in tensors),
        lengths, table, out.numpy(), sums.numpy(),
        block_size, k_cache.stride()[:3],
    )  # fmt: skip
    return out.to(q.dtype)[:, None]
