"""Decode attention over compressed blocks, too, which are read where they lie.

A loop as in cpu_kernels.py, for rows of which some blocks are in whole numbers.

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

import numpy as np
import torch
from numba import prange

from support.cpu_kernels import arguments, attend, flat, places, score, store, types_of
from support.numba_help import add_rows, as_float, compile_once, prefetch, softmax


@functools.cache
def compiled(dtype, bits, D, G, size):
    """The loop for a dtype, numbers of 8 or 4 bits, a head size, a group and a block size.

    D is a multiple of 16, size of 8, and not too large: add_rows() writes out what it does.
    """
    halves = 8 // bits  # Of a byte: two numbers of 4 bits. The lower is from the head's first half.
    width = D // halves

    # codes, keys and values: all numbers from a layer's first one on; c, ks and vs: their strides
    # of rooms (blocks), of keys and values or scale and zero, and of heads.
    def loop(
        q, k, v, k_cache, v_cache, seq_len, block_table, _, strides, out,
        codes, keys, values, table, n_blocks, c, ks, vs,
    ):  # fmt: skip
        B, Hkv, _ = k.shape
        for item in prange(Hkv * B):
            h, row = item // B, item % B
            own, n = seq_len[row] + 1, n_blocks[row]  # Tokens in full precision, blocks beside.
            tokens = places(block_table[row], own, size, strides, h)
            query = store(q, k, v, row, h, k_cache, v_cache, tokens[own - 1], G, D)
            attended = out[row, h * G : (h + 1) * G]  # Zeros so far.
            weights = np.empty((G, n * size + own), np.float32)  # First the scores.
            scaled = np.empty((G, max(D, size)), np.float32)
            for i in range(n):
                block, after = table[row, i], table[row, min(i + 1, n - 1)]  # And the next.
                prefetch(keys, after * ks[0] + h * ks[2], D)
                prefetch(keys, after * ks[0] + ks[1] + h * ks[2], D)
                first = block * ks[0] + h * ks[2]
                scales, zeros = keys[first : first + D], keys[first + ks[1] :][:D]
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
            score(weights, n * size, query, k_cache, tokens, own, G, D)
            for g in range(G):
                softmax(weights[g])

            for i in range(n):
                block, after = table[row, i], table[row, min(i + 1, n - 1)]
                prefetch(values, after * vs[0] + h * vs[2], size)
                prefetch(values, after * vs[0] + vs[1] + h * vs[2], size)
                first = block * vs[0] + h * vs[2]
                scales, zeros = values[first : first + size], values[first + vs[1] :][:size]
                for g in range(G):
                    constant, of_block = np.float32(0), weights[g, i * size : i * size + size]
                    for t in range(size):
                        scaled[g, t] = of_block[t] * as_float(scales[t])
                        constant += of_block[t] * as_float(zeros[t])
                    for d in range(D):
                        attended[g, d] += constant
                first = block * c[0] + c[1] + h * c[2]
                for half in range(halves):
                    for t in range(0, size, 4):
                        at, column = first + t * width, half * width
                        prefetch(codes, at + (after - block) * c[0], 4 * width)
                        add_rows(attended, column, scaled, t, codes, at, half, G, width, bits)
            attend(attended, weights, n * size, v_cache, tokens, own, G, D)

    others = ["uint8[::1], int16[::1], int16[::1], int32[:,:], int32[:]"]
    signature = ", ".join([types_of(dtype), *others, *["UniTuple(int64, 3)"] * 3])
    return compile_once(loop, f"{dtype}-{bits}-{D}-{G}-{size}", f"({signature})")


def decode_packed(q, own, parts, n_blocks, table):
    """decode(q, *own) of rows with n_blocks (B,) compressed blocks, too, which are in the rooms
    table (B, width). parts: codes, keys and values (rooms, ...) of a layer. (See Integers)
    """
    (B, _, H, D), (codes, keys, values) = q.shape, parts
    Hkv, size = values.shape[2:4]
    bits, out = 8 * codes.shape[3] // (size * D), torch.zeros(B, H, D)
    numbers = flat(codes), flat(keys).view(torch.int16), flat(values).view(torch.int16)
    compiled(q.dtype, bits, D, H // Hkv, size)(
        *arguments(q, *own), *(x.numpy() for x in (out, *numbers, table, n_blocks)),
        codes.stride()[:3], keys.stride()[:3], values.stride()[:3],
    )  # fmt: skip
    return out.to(q.dtype)[:, None]
