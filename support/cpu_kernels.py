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

from support.numba_help import as_float, compile_once, njit, prange, prefetch, softmax

# numpy has no bfloat16, and numba computes with neither float of 16 bits: both go in as integers,
# one as unsigned ones, the other as signed ones, which tells them apart.
AS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}

# Tokens between the one that is read and the one that prefetch() asks for: 16 to 48 were the same.
AHEAD = 16


@njit(inline="always")
def places(table, n, size, strides, h):
    """Where the n tokens of a row lie in k_cache and v_cache, flattened; and the last one again for
    what looks AHEAD. strides: of blocks, slots and heads."""
    block_stride, slot_stride, head_stride = strides
    at = np.empty(n + AHEAD, np.int64)
    for i in range(-(-n // size)):
        first = table[i] * block_stride + h * head_stride
        for t in range(i * size, min(n, i * size + size)):
            at[t] = first + (t - i * size) * slot_stride
    for t in range(n, len(at)):
        at[t] = at[n - 1]
    return at


@njit(inline="always")
def store(q, k, v, row, h, k_cache, v_cache, place, G, D):
    """Store the new token. Returns query (G, D), scaled so that a weight is 2^score."""
    for d in range(D):
        k_cache[place + d] = k[row, h, d]
        v_cache[place + d] = v[row, h, d]
    query, scale = np.empty((G, D), np.float32), np.float32(math.log2(math.e) * D**-0.5)
    for g in range(G):
        for d in range(D):
            query[g, d] = as_float(q[row, h * G + g, d]) * scale
    return query


@njit(inline="always")
def score(weights, first, query, k_cache, at, n, G, D):
    """weights (G, ...)[:, first : first + n] = query (G, D) . keys (n, D)."""
    for t in range(n):
        prefetch(k_cache, at[t + AHEAD], D)
        key = k_cache[at[t] : at[t] + D]
        for g in range(G):
            total = np.float32(0)
            for d in range(D):
                total += query[g, d] * as_float(key[d])
            weights[g, first + t] = total


@njit(inline="always")
def attend(attended, weights, first, v_cache, at, n, G, D):
    """attended (G, D) += weights (G, ...)[:, first : first + n] @ values (n, D)."""
    for t in range(n):
        prefetch(v_cache, at[t + AHEAD], D)
        value = v_cache[at[t] : at[t] + D]
        for g in range(G):
            for d in range(D):
                attended[g, d] += weights[g, first + t] * as_float(value[d])


@functools.cache
def compiled(dtype, D, G):
    """The loop for a dtype, head size and group. numba takes them as constants, which is faster.

    Compiled when first asked for and kept on disk, in __pycache__ or else the user's cache folder.
    """

    def loop(q, k, v, k_cache, v_cache, seq_len, block_table, size, strides, out):
        B, Hkv, _ = k.shape
        for item in prange(Hkv * B):
            h, row = item // B, item % B
            n = seq_len[row] + 1
            at = places(block_table[row], n, size, strides, h)
            query = store(q, k, v, row, h, k_cache, v_cache, at[n - 1], G, D)
            weights = np.empty((G, n), np.float32)  # First the scores.
            score(weights, 0, query, k_cache, at, n, G, D)
            for g in range(G):
                softmax(weights[g])
            attend(out[row, h * G : (h + 1) * G], weights, 0, v_cache, at, n, G, D)  # Zeros so far.

    return compile_once(loop, f"{dtype}-{D}-{G}", f"({types_of(dtype)})")


def types_of(dtype):
    """numba's types of q, k, v, k_cache, v_cache, seq_len, block_table, size, strides and out."""
    number = str(AS[dtype]).removeprefix("torch.")
    return (
        f"{number}[:,:,:], {number}[:,:,:], {number}[:,:,:], {number}[::1], {number}[::1], "
        "int32[:], int32[:,:], int64, UniTuple(int64, 3), float32[:,:,::1]"
    )


def flat(cache):
    """All numbers from a layer's first one on: its strides lead through those of other layers."""
    start = cache.storage_offset()
    size = cache.untyped_storage().nbytes() // cache.itemsize - start
    return cache.as_strided((size,), (1,), start)


def can_decode(q):
    """Whether decode() is for this device and dtype."""
    return q.device.type == "cpu" and q.dtype in AS


def arguments(q, k_cache, v_cache, k, v, cache_seqlens, block_table):
    """Those of decode() as the loop takes them."""
    assert q.dtype == k.dtype == k_cache.dtype and k_cache.stride() == v_cache.stride()
    tensors = (q[:, 0], k[:, 0], v[:, 0], flat(k_cache), flat(v_cache))
    numbers = (x.view(AS[q.dtype]).numpy() for x in tensors)
    lengths, table, size = cache_seqlens.numpy(), block_table.numpy(), k_cache.shape[1]
    assert lengths.max() < table.shape[1] * size, "no slot for the new token"
    return *numbers, lengths, table, size, k_cache.stride()[:3]


def decode(q, k_cache, *others):
    """flash_attn_with_kvcache() for one new token a row: q (B, 1, H, D); the others as there."""
    (B, _, H, D), Hkv = q.shape, k_cache.shape[2]
    out = torch.zeros(B, H, D)
    compiled(q.dtype, D, H // Hkv)(*arguments(q, k_cache, *others), out.numpy())
    return out.to(q.dtype)[:, None]
