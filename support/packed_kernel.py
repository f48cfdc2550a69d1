"""Decode attention over blocks of whole numbers, read where they lie: cpu_kernels.py's other half.

A number c stands for zero + c scale. Keys have a scale and a zero for each channel d of a block, so

    query . key = sum over d of (query[d] scale[d]) c[d]  +  query . zero

where the brackets and the last term are the same for all tokens of the block. Values have a scale
and a zero for each token, which come to its weight. So a number is read, made a float and used, and
no key or value is ever restored.

Throughout this file
    B  requests in the batch, one row each       H    query heads
    G  query heads that share a K/V head         Hkv  key and value heads, H = G * Hkv
    n  compressed tokens of a row                D    size of a head
"""

import functools
import math

import numpy as np
import torch
from numba import njit, prange

from support.cpu_kernels import flat
from support.numba_help import as_float, compile_once, prefetch, softmax


@njit(inline="always")
def unpack(code, bits, numbers):
    """Write the bytes of a head as floats to numbers (D,)."""
    width = len(code)
    for d in range(width):
        if bits == 8:
            numbers[d] = np.float32(code[d])
        else:  # The lower half of a byte is from the head's first half.
            numbers[d] = np.float32(code[d] & 15)
            numbers[width + d] = np.float32(code[d] >> 4)


@functools.cache
def compiled(bits, D, G):
    """The loop for numbers of 8 or 4 bits, a head size and a group. See cpu_kernels.compiled()."""
    width = D * bits // 8  # Bytes of a head.

    # codes, keys and values: all numbers from a layer's first one on; c, k and v: strides of rooms
    # (blocks), of keys and values or scale and zero, of heads and of slots.
    def loop(q, codes, keys, values, table, n_blocks, out, sums, size, c, k, v):
        B, H, _ = q.shape
        for item in prange(H // G * B):
            h, row = item // B, item % B
            n, heads = n_blocks[row] * size, slice(h * G, h * G + G)
            query, attended = q[row, heads], out[row, heads]  # Zeros so far.
            numbers, scale = np.empty(D, np.float32), np.empty(D, np.float32)
            zero, constant = np.empty(D, np.float32), np.empty(G, np.float32)
            scaled = np.empty((G, D), np.float32)
            weights = np.empty((G, n), np.float32)  # First the scores.
            for i in range(n_blocks[row]):
                block, after = table[row, i], table[row, min(i + 1, n_blocks[row] - 1)]
                at = block * k[0] + h * k[2]
                scales, zeros = keys[at : at + D], keys[at + k[1] : at + k[1] + D]
                for d in range(D):
                    scale[d], zero[d] = as_float(scales[d]), as_float(zeros[d])
                for g in range(G):
                    total = np.float32(0)
                    for d in range(D):
                        scaled[g, d] = query[g, d] * scale[d]
                        total += query[g, d] * zero[d]
                    constant[g] = total
                for t in range(size):
                    prefetch(codes, after * c[0] + h * c[2] + t * c[3])
                    first = block * c[0] + h * c[2] + t * c[3]
                    unpack(codes[first : first + width], bits, numbers)
                    for g in range(G):
                        score = constant[g]
                        for d in range(D):
                            score += scaled[g, d] * numbers[d]
                        weights[g, i * size + t] = score
            for g in range(G):
                sums[row, h * G + g] = softmax(weights[g])
                constant[g] = 0

            for i in range(n_blocks[row]):
                block, after = table[row, i], table[row, min(i + 1, n_blocks[row] - 1)]
                for t in range(size):
                    prefetch(codes, after * c[0] + c[1] + h * c[2] + t * c[3])
                    first = block * c[0] + c[1] + h * c[2] + t * c[3]
                    unpack(codes[first : first + width], bits, numbers)
                    at = block * v[0] + h * v[2] + t * v[3]
                    scale[0], zero[0] = as_float(values[at]), as_float(values[at + v[1]])
                    for g in range(G):
                        constant[g] += weights[g, i * size + t] * zero[0]
                        weight = weights[g, i * size + t] * scale[0]
                        for d in range(D):
                            attended[g, d] += weight * numbers[d]
            for g in range(G):
                for d in range(D):
                    attended[g, d] += constant[g]

    signature = (
        "float32[:,:,::1], uint8[::1], int16[::1], int16[::1], int32[:,:], int32[:], "
        "float32[:,:,::1], float32[:,::1], int64, " + ", ".join(["UniTuple(int64, 4)"] * 3)
    )
    return compile_once(loop, f"{bits}-{D}-{G}", f"({signature})")


def attend_packed(q, parts, layer, table, n_blocks):
    """Attention of q (B, H, D) over compressed blocks only, and the log2 of its sums, (B, H)."""
    codes, keys, values = (parts[name][:, layer] for name in ("codes", "keys", "values"))
    (B, H, D), (_, _, Hkv, size, width) = q.shape, codes.shape
    q = q.float() * (D**-0.5 * math.log2(math.e))
    out, sums = torch.zeros(B, H, D), torch.empty(B, H)
    numbers = flat(codes), flat(keys).view(torch.int16), flat(values).view(torch.int16)
    compiled(8 * width // D, D, H // Hkv)(
        *(x.numpy() for x in (q, *numbers, table, n_blocks, out, sums)),
        size, codes.stride()[:4], keys.stride()[:4], values.stride()[:4],
    )  # fmt: skip
    return out, sums
