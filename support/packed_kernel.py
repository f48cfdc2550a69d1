"""Decode attention over compressed blocks, too, which are read where they lie.

A loop as in cpu_kernels.py, with its letters, for rows of which n blocks are in whole numbers. Such
a number c stands for zero + c scale. Keys have a scale and a zero for each channel d of a block, so

    query . key = sum over d of (query[d] scale[d]) c[d]  +  query . zero

where the brackets and the last term are the same for all tokens of the block. Values have a scale
and a zero for each token, which come to its weight. So no key or value is ever restored, and all
that is done with a block's numbers is two products of a few rows with them:

    scores (G, tokens) += scaled queries (G, D) @ keys (D, tokens)
    result (G, D)      += scaled weights (G, tokens) @ values (tokens, D)

Keys lie channel by channel for it: then no sum runs across a register. A block is one piece for
each head, keys and then values, and each of these
    scale x rows, zero x rows (16 bits each), numbers (rows, m), of 4 bits two in a byte
"""

import functools

import numpy as np
import torch

from support.cpu_kernels import arguments, attend, flat, places, score, store, types_of
from support.numba_help import add_rows, as_float, compile_once, njit, prange, prefetch, softmax


@njit(inline="always")
def add_product(out, column, x, first, scaled, block, floats, at, ahead, rows, m, G, bits):
    """out (G, ...)[:, column : column + m] += x (G, ...)[:, first : first + rows] @ keys or values.

    These begin at block[at]; floats is the same memory in units of 16 bits. What is needed next is
    `ahead` bytes on and asked for in advance. scaled: room for (G, rows) numbers. Of a byte of two
    numbers, the lower is from the first half of rows.
    """
    scale, codes = at // 2, at + 4 * rows
    prefetch(floats, scale + ahead // 2, 2 * rows)
    scales, zeros = floats[scale : scale + rows], floats[scale + rows :][:rows]
    for g in range(G):
        here, total = x[g, first : first + rows], out[g, column : column + m]
        constant = np.float32(0)
        for i in range(rows):
            scaled[g, i] = here[i] * as_float(scales[i])
            constant += here[i] * as_float(zeros[i])
        for j in range(m):
            total[j] += constant
    part = rows * bits // 8
    for half in range(8 // bits):
        for i in range(0, part, 4):
            prefetch(block, codes + ahead + i * m, 4 * m)
            add_rows(out, column, scaled, half * part + i, block, codes + i * m, half, G, m, bits)


@functools.cache
def compiled(dtype, bits, D, G, size):
    """The loop for a dtype, numbers of 8 or 4 bits, a head size, a group and a block size.

    D and size are multiples of 8, and not too large: add_rows() writes out what it does.
    """
    values_at = 4 * D + D * size * bits // 8  # They begin there, keys at 0.

    # block: all that lies from a layer's first block on. _: size, once more.
    def loop(
        q, k, v, k_cache, v_cache, seq_len, block_table, _, strides, out,
        block, floats, table, n_blocks, block_strides,
    ):  # fmt: skip
        B, Hkv, _ = k.shape
        for item in prange(Hkv * B):
            h, row = item // B, item % B
            n_own, n = seq_len[row] + 1, n_blocks[row]  # Tokens in full precision, blocks beside.
            tokens = places(block_table[row], n_own, size, strides, h)
            query = store(q, k, v, row, h, k_cache, v_cache, tokens[n_own - 1], G, D)
            blocks = places(table[row], n, 1, block_strides, h)
            weights = np.zeros((G, n * size + n_own), np.float32)  # First the scores.
            scaled = np.empty((G, max(D, size)), np.float32)
            for i in range(n):
                at, ahead = blocks[i], blocks[i + 1] - blocks[i]
                add_product(
                    weights, i * size, query, 0, scaled, block, floats, at, ahead, D, size, G, bits
                )
            score(weights, n * size, query, k_cache, tokens, n_own, G, D)
            for g in range(G):
                softmax(weights[g])
            result = out[row, h * G : (h + 1) * G]  # Zeros so far.
            for i in range(n):
                at, ahead = blocks[i] + values_at, blocks[i + 1] - blocks[i]
                add_product(
                    result, 0, weights, i * size, scaled, block, floats, at, ahead, size, D, G, bits
                )
            attend(result, weights, n * size, v_cache, tokens, n_own, G, D)

    types = types_of(dtype) + ", uint8[::1], int16[::1], int32[:,:], int32[:], UniTuple(int64, 3)"
    return compile_once(loop, f"{dtype}-{bits}-{D}-{G}-{size}", f"({types})")


def decode_packed(bits, q, own, block, n_blocks, table):
    """decode(q, *own) for rows that have compressed blocks, too: n_blocks (B,), in the rooms table
    (B, width) of a layer's block (rooms, Hkv, bytes). (See Integers)
    """
    (B, _, H, D), size, Hkv = q.shape, own[0].shape[1], block.shape[1]
    out = torch.zeros(B, H, D)
    tensors = (out, flat(block), flat(block).view(torch.int16), table, n_blocks)
    run = compiled(q.dtype, bits, D, H // Hkv, size)
    run(*arguments(q, *own), *(x.numpy() for x in tensors), (block.stride(0), 0, block.stride(1)))
    return out.to(q.dtype)[:, None]
