"""Forms in which a block takes less room. A further one is a class and its name in CODECS:

    __init__(shape, block_size, dtype)   of the model; shape: (L, Hkv, D)
    parts             {name: shape and dtype of what a block becomes}, as tensors without memory
    encode(kv)        {name: tensor (n, ...)} of n blocks (n, L, 2, Hkv, block_size, D)
    restore(parts, ids, layer)           keys and values (2, n, Hkv, block_size, D) of a layer of
                      the blocks ids (n,), out of {name: tensor (rooms, ...)}
    decode            None, or attention for decode steps that reads the part "block" in place

Throughout this file
    L  layers                                    Hkv  key and value heads
    n  blocks                                    D    size of a head
"""

import math
from functools import partial

import torch

try:
    from support.packed_kernel import decode_packed
except ImportError:  # Without numba, blocks are restored.
    decode_packed = None


def part(dtype, *shape):
    """What a block becomes: a tensor of this dtype and shape, without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Integers:
    """Whole numbers of 8 or 4 bits: keys channel by channel, values token by token.

    A number c stands for zero + c scale; zero is the lowest of the channel in the block, or of the
    token in the head, and the largest c stands for the highest. Some channels of keys are far
    larger than the others for all tokens; values have no such. (KIVI, Liu et al. 2024, section 3)
    """

    def __init__(self, bits, shape, block_size, dtype):
        (L, Hkv, D), self.bits, self.dtype = shape, bits, dtype
        reads = decode_packed and D % 8 == 0 and block_size in range(8, 257, 8)
        self.decode = partial(decode_packed, bits) if reads else None
        # Of keys, of values: (rows, m). A row has a scale and a zero.
        self.shapes = [(D, block_size), (block_size, D)]
        self.bytes = [4 * rows + rows * m * bits // 8 for rows, m in self.shapes]
        self.parts = {"block": part(torch.uint8, L, Hkv, sum(self.bytes))}

    def encode(self, kv):
        keys, values = kv.float().unbind(2)
        encoded = []
        for x in (keys.transpose(3, 4), values):  # (n, L, Hkv, rows, m)
            low, high = x.amin(4, keepdim=True), x.amax(4, keepdim=True)
            scale = ((high - low) / (2**self.bits - 1)).clamp(min=2**-24).half()
            codes = (x - low.half()).div_(scale).round_().clamp_(0, 2**self.bits - 1)
            codes = codes.byte().flatten(3)
            if self.bits == 4:  # Lower 4 bits: the first half of the rows.
                first, second = codes.chunk(2, 3)
                codes = first + 16 * second
            floats = torch.cat([scale, low.half()], 3).flatten(3)
            encoded += [floats.view(torch.uint8), codes]
        return {"block": torch.cat(encoded, 3)}

    def restore(self, parts, ids, layer):
        restored = []
        encoded = parts["block"][ids, layer].split(self.bytes, 2)
        for x, (rows, m) in zip(encoded, self.shapes, strict=True):
            scale, zero = x[..., : 4 * rows].view(torch.half).float().unsqueeze(3).chunk(2, 2)
            codes = x[..., 4 * rows :]
            if self.bits == 4:
                codes = torch.cat([codes & 15, codes >> 4], 2)
            restored.append(zero + codes.unflatten(2, (rows, m)) * scale)
        keys, values = restored
        return torch.stack([keys.transpose(2, 3), values]).to(self.dtype)


class MiniCache:
    """Two layers share the directions of their keys and values; each keeps their lengths.

    From the middle of the model on, where neighbouring layers are alike, in pairs. The directions
    of both are interpolated on the sphere, at T from the first to the second. In each block, pair
    and head, the GAMMA of the tokens whose directions lie farthest apart are kept as they are.
    (MiniCache, Liu et al. 2024, sections 3.2 to 3.4; there a threshold says how many.)
    """

    T, GAMMA = 0.6, 0.05
    decode = None

    def __init__(self, shape, block_size, dtype):
        L, Hkv, D = shape
        pairs, n_kept = (L - L // 2) // 2, math.ceil(self.GAMMA * block_size)
        self.first, self.n_kept, self.dtype = L - 2 * pairs, n_kept, dtype  # Pairs from there on.
        self.parts = {
            "single": part(dtype, self.first, 2, Hkv, block_size, D),
            "direction": part(dtype, pairs, 2, Hkv, block_size, D),
            "length": part(dtype, pairs, 2, 2, Hkv, block_size, 1),
            "kept": part(dtype, pairs, 2, 2, Hkv, n_kept, D),
            "which": part(torch.int16, pairs, 2, Hkv, n_kept, 1),
        }

    def encode(self, kv):
        pairs = kv[:, self.first :].float().unflatten(1, (-1, 2))
        length = pairs.norm(dim=6, keepdim=True)  # (n, pairs, 2, 2, Hkv, block_size, 1)
        a, b = (pairs / length.clamp(min=1e-9)).unbind(2)  # (n, pairs, 2, Hkv, block_size, D)
        cosine = (a * b).sum(5, keepdim=True)
        # Rounding may take a cosine past 1, and an angle of 0 would be divided by.
        angle = cosine.clamp(-1, 1).acos().clamp(1e-3, math.pi - 1e-3)
        direction = ((1 - self.T) * angle).sin() * a + (self.T * angle).sin() * b
        which = cosine.topk(self.n_kept, 4, largest=False).indices
        index = which.unsqueeze(2).expand(-1, -1, 2, -1, -1, -1, pairs.shape[6])
        return {
            "single": kv[:, : self.first],
            "direction": direction / angle.sin(),
            "length": length,
            "kept": pairs.gather(5, index),
            "which": which,
        }

    def restore(self, parts, ids, layer):
        if layer < self.first:
            return parts["single"][ids, layer].transpose(0, 1)
        pair, second = divmod(layer - self.first, 2)
        direction, length = parts["direction"][ids, pair], parts["length"][ids, pair, second]
        x = (direction.float() * length.float()).to(self.dtype)  # (n, 2, Hkv, block_size, D)
        index = parts["which"][ids, pair].long().expand(-1, -1, -1, -1, x.shape[4])
        return x.scatter(3, index, parts["kept"][ids, pair, second]).transpose(0, 1)


CODECS = {"int8": partial(Integers, 8), "int4": partial(Integers, 4), "minicache": MiniCache}
