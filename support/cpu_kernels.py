"""Decode attention on a CPU: PagedAttention (Kwon et al. 2023, section 4.1) as one compiled loop.

    for each row and K/V head, shared out among the processor's cores
        store the new token's key and value in its slot
        for each token of the row, in the block where it lies
            score = query . key                     for each query head of the group
        weights = softmax(scores)
        for each token of the row, in the block where it lies
            attended += weight * value              for each query head of the group

No key or value is gathered, copied or padded: a block is read in place, and a contiguous row is the
case of one block a row. All is computed in float32. Read compiled() first. What stands before it is
what numba lacks: numbers of 16 bits, a fast 2^x, and asking for memory in advance.

Throughout this file
    B  requests in the batch, one row each       H    query heads
    G  query heads that share a K/V head         Hkv  key and value heads, H = G * Hkv
    n  tokens of a row, the new one included     D    size of a head
"""

import functools
import math
import os

import numpy as np

# numba reads this when it is imported. OpenMP is what torch runs on, too; with `workqueue`, decode
# attention of 49 rows between torch's products took more than twice as long.
os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")

import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

# numpy has no bfloat16, and numba computes with neither float of 16 bits: both go in as integers,
# whose sign says which they are.
AS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}

# Tokens between the one that is read and the one that prefetch() asks for: 16 to 48 were the same.
AHEAD = 16


@intrinsic
def as_float(typingctx, number):
    """The float32 of these bits: a bfloat16's (uint16), a float16's (int16), its own (others)."""

    def codegen(context, builder, signature, args):
        bits = args[0]
        if number == types.float32:
            return bits
        if number == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        if number == types.uint16:  # The upper half of a float32.
            bits = builder.shl(builder.zext(bits, ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(number), codegen


@intrinsic
def prefetch(typingctx, array, i):
    """Ask for the 64 bytes around array[i], which are needed soon.

    A processor sees by itself what comes next in a block, but not which block comes next: with 49
    rows of 280 tokens, attention of all layers took 40 ms without this and 25 with it.
    """

    def codegen(context, builder, signature, args):
        data = context.make_array(array)(context, builder, args[0]).data
        place, int32 = builder.gep(data, [args[1]]), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, int32, int32, int32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(function, [place, int32(0), int32(3), int32(1)])  # Read; to all caches; data.
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


# 2^x from -0.5 to 0.5: least squares over Chebyshev's nodes.
NODES = np.cos(np.pi * (np.arange(64) + 0.5) / 64) / 2
POLYNOMIAL = tuple(np.polynomial.Polynomial.fit(NODES, 2**NODES, 5).convert().coef.astype("f4"))


@njit(inline="always")
def power_of_2(x):
    """2^x for -126 <= x <= 0, and 2^-126 below: the whole part of x is the float's exponent."""
    x = max(x, np.float32(-126))
    whole = np.floor(x + np.float32(0.5))
    a, b, c, d, e, f = POLYNOMIAL
    x -= whole
    fraction = a + x * (b + x * (c + x * (d + x * (e + x * f))))
    return fraction * as_float(np.uint32((np.int32(whole) + 127) << 23))


@functools.cache
def compiled(dtype, D, G):
    """The loop for a dtype, head size and group. numba takes them as constants, which is faster.

    Compiled when first asked for and kept on disk, in __pycache__ or else the user's cache folder.
    """
    scale = np.float32(D**-0.5 * math.log2(math.e))  # Scores in bits: weights are powers of 2.

    # k_cache and v_cache: all numbers of a cache in one line; strides lead to the next block, slot
    # and head. A block has `size` slots.
    def decode(q, k, v, k_cache, v_cache, seq_len, block_table, out, size, strides):
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
                for d in range(0, D, 32):  # 64 bytes, in 16 bits each.
                    prefetch(k_cache, at[t + AHEAD] + d)
                key = k_cache[at[t] : at[t] + D]
                for g in range(G):
                    score = np.float32(0)
                    for d in range(D):
                        score += query[g, d] * as_float(key[d])
                    weights[g, t] = score
            for g in range(G):
                highest, total = weights[g, 0], np.float32(0)
                for t in range(n):
                    highest = max(highest, weights[g, t])
                for t in range(n):
                    weights[g, t] = power_of_2(weights[g, t] - highest)
                    total += weights[g, t]
                for t in range(n):
                    weights[g, t] /= total

            attended = out[row, h * G : (h + 1) * G]  # Zeros so far.
            for t in range(n):
                for d in range(0, D, 32):
                    prefetch(v_cache, at[t + AHEAD] + d)
                value = v_cache[at[t] : at[t] + D]
                for g in range(G):
                    for d in range(D):
                        attended[g, d] += weights[g, t] * as_float(value[d])

    number = str(AS[dtype]).removeprefix("torch.")
    signature = (
        f"({number}[:,:,:], {number}[:,:,:], {number}[:,:,:], {number}[::1], {number}[::1], "
        "int32[:], int32[:,:], float32[:,:,::1], int64, UniTuple(int64, 3))"
    )
    # numba keeps an index for each name. One that several processes write for different loops
    # would mix them up: each loop has a name of its own.
    decode.__qualname__ += f"-{number}-{D}-{G}"
    options = {"parallel": True, "fastmath": True, "error_model": "numpy"}
    try:
        return njit(signature, cache=True, **options)(decode)
    except RuntimeError:  # Neither the checkout nor the user's cache folder can be written.
        return njit(signature, **options)(decode)


def flat(cache):
    """All numbers in a cache's memory from its first one on, those of other layers included."""
    start = cache.storage_offset()
    size = cache.untyped_storage().nbytes() // cache.itemsize - start
    return cache.as_strided((size,), (1,), start)


def can_decode(q):
    """Whether decode() is for this device and dtype."""
    return q.device.type == "cpu" and q.dtype in AS


def decode(q, k_cache, v_cache, k, v, cache_seqlens, block_table):
    """flash_attn_with_kvcache() for one new token a row: q (B, 1, H, D), k and v (B, 1, Hkv, D)."""
    (B, _, H, D), (_, block_size, Hkv, _) = q.shape, k_cache.shape
    assert q.dtype == k.dtype == k_cache.dtype and k_cache.stride() == v_cache.stride()
    lengths, table = cache_seqlens.numpy(), block_table.numpy()
    assert lengths.max() < table.shape[1] * block_size, "no slot for the new token"
    tensors = (q[:, 0], k[:, 0], v[:, 0], flat(k_cache), flat(v_cache))
    out = torch.zeros(B, H, D)
    loop = compiled(q.dtype, D, H // Hkv)
    loop(
        *(x.view(AS[q.dtype]).numpy() for x in tensors),
        lengths, table, out.numpy(),
        block_size, k_cache.stride()[:3],
    )  # fmt: skip
    return out.to(q.dtype)[:, None]
