"""Decode attention over blocks of whole numbers, read where they lie: cpu_kernels.py's other half.

A number c stands for zero + c scale. Keys have a scale and a zero for each channel d of a block, so

    query . key = sum over d of (query[d] scale[d]) c[d]  +  query . zero

where the brackets and the last term are the same for all tokens of the block. Values have a scale
and a zero for each token, which come to its weight. So no key or value is ever restored, and all
that is done with a block's numbers is two products of a few rows with them:

    scores (G, tokens) += scaled queries (G, D) @ keys (D, tokens)
    result (G, D)      += scaled weights (G, tokens) @ values (tokens, D)

Keys lie channel by channel for it: then neither adds up what is side by side in a register.

Throughout this file
    B  requests in the batch, one row each       H    query heads
    G  query heads that share a K/V head         Hkv  key and value heads, H = G * Hkv
    n  compressed blocks of a row                D    size of a head
"""

import functools
import math

import numpy as np
import torch
from numba import prange

from support.cpu_kernels import flat
from support.numba_help import add_rows, as_float, compile_once, prefetch, softmax


@functools.cache
def compiled(bits, D, G, size):
    """The loop for numbers of 8 or 4 bits, a head size, a group and a block size. (See cpu_kernels)

    D is a multiple of 16, size of 8, and not too large: add_rows() writes out what it does.
    """
    halves = 8 // bits  # Of a byte: two numbers of 4 bits. The lower is from the head's first half.
    width = D // halves

    # codes, keys and values: all numbers from a layer's first one on; c, k and v: strides of rooms
    # (blocks), of keys and values or scale and zero, and of heads.
    def loop(q, codes, keys, values, table, n_blocks, out, sums, c, k, v):
        B, H, _ = q.shape
        for item in prange(H // G * B):
            h, row = item // B, item % B
            heads, n = slice(h * G, h * G + G), n_blocks[row]
            query, attended = q[row, heads], out[row, heads]  # Zeros so far.
            weights = np.empty((G, n * size), np.float32)  # First the scores.
            scaled = np.empty((G, max(D, size)), np.float32)
            for i in range(n):
                block, after = table[row, i], table[row, min(i + 1, n - 1)]  # And the next.
                prefetch(keys, after * k[0] + h * k[2], D)
                prefetch(keys, after * k[0] + k[1] + h * k[2], D)
                first = block * k[0] + h * k[2]
                scales, zeros = keys[first : first + D], keys[first + k[1] :][:D]
                for g in range(G):
                    constant = np.float32(0)
                    for d in range(D):
                        scaled[g, d] = query[g, d] * as_float(scales[d])
                        constant += query[g, d] * as_float(zeros[d])
                    weights[g, i * size : i * size + size] = constant  # Then add the rest.
                first = block * c[0] + h * c[2]
                for half in range(halves):
                    for d in range(0, width, 4):
                        at, channel = first + d * size, half * width + d
                        prefetch(codes, at + (after - block) * c[0], 4 * size)
                        add_rows(weights, i * size, scaled, channel, codes, at, half, G, size, bits)
            for g in range(G):
                sums[row, h * G + g] = softmax(weights[g])

            for i in range(n):
                block, after = table[row, i], table[row, min(i + 1, n - 1)]
                prefetch(values, after * v[0] + h * v[2], size)
                prefetch(values, after * v[0] + v[1] + h * v[2], size)
                first = block * v[0] + h * v[2]
                scales, zeros = values[first : first + size], values[first + v[1] :][:size]
                for g in range(G):
                    constant, own = np.float32(0), weights[g, i * size : i * size + size]
                    for t in range(size):
                        scaled[g, t] = own[t] * as_float(scales[t])
                        constant += own[t] * as_float(zeros[t])
                    for d in range(D):
                        attended[g, d] += constant
                first = block * c[0] + c[1] + h * c[2]
                for half in range(halves):
                    for t in range(0, size, 4):
                        at, column = first + t * width, half * width
                        prefetch(codes, at + (after - block) * c[0], 4 * width)
                        add_rows(attended, column, scaled, t, codes, at, half, G, width, bits)

    signature = (
        "float32[:,:,::1], uint8[::1], int16[::1], int16[::1], int32[:,:], int32[:], "
        "float32[:,:,::1], float32[:,::1], " + ", ".join(["UniTuple(int64, 3)"] * 3)
    )
    return compile_once(loop, f"{bits}-{D}-{G}-{size}", f"({signature})")


def attend_packed(q, parts, layer, table, n_blocks):
    """Attention of q (B, H, D) over compressed blocks only, and the log2 of its sums, (B, H)."""
    codes, keys, values = (parts[name][:, layer] for name in ("codes", "keys", "values"))
    (B, H, D), (Hkv, size) = q.shape, values.shape[2:4]
    q = q.float() * (D**-0.5 * math.log2(math.e))
    out, sums = torch.zeros(B, H, D), torch.empty(B, H)
    numbers = flat(codes), flat(keys).view(torch.int16), flat(values).view(torch.int16)
    compiled(8 * codes.shape[3] // (size * D), D, H // Hkv, size)(
        *(x.numpy() for x in (q, *numbers, table, n_blocks, out, sums)),
        codes.stride()[:3], keys.stride()[:3], values.stride()[:3],
    )  # fmt: skip
    return out, sums
