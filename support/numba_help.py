"""What the loops of cpu_kernels.py and packed_kernel.py need and numba lacks."""

import os
import signal
import zlib
from pathlib import Path

import numpy as np

# numba reads this when it is imported. OpenMP is what torch runs on, too; with `workqueue`, decode
# attention of 49 rows between torch's products took more than twice as long.
os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")

from llvmlite import ir
from numba import njit, types
from numba import prange as prange  # From here for all, so that the line above comes first.
from numba.extending import intrinsic


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
def prefetch_line(typingctx, array, i):
    """Ask for the 64 bytes around array[i]."""

    def codegen(context, builder, signature, args):
        data = context.make_array(array)(context, builder, args[0]).data
        place, int32 = builder.gep(data, [args[1]]), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, int32, int32, int32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(function, [place, int32(0), int32(3), int32(1)])  # Read; to all caches; data.
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@njit(inline="always")
def prefetch(array, start, n):
    """Ask for array[start : start + n], which is needed soon.

    A processor sees by itself what comes next in a block, but not which block comes next: with 49
    rows of 280 tokens, attention of all layers took 40 ms without this and 25 with it.
    """
    for i in range(0, n, 64 // array.itemsize):
        prefetch_line(array, start + i)


BYTE, INT, LONG, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, INTS, FLOATS = (ir.VectorType(kind, 8) for kind in (BYTE, INT, FLOAT))


@intrinsic(prefer_literal=True)
def add_rows(typingctx, out, column, weights, i, codes, at, half, G, m, bits):
    """out (G, n)[:, column : column + m] += weights (G, n)[:, i : i + 4] @ numbers (4, m).

    The numbers are the bytes from codes[at] on or, of 4 bits, their lower (half 0) or upper half.
    All arrays are contiguous. G, m and bits are constants, m a multiple of 8: so many at a time
    stay in registers, each made a float once. (As loops of numba this took 1.3 times as long, and
    over twice with 4 bits: for all that a compiler knows, out and codes may overlap.)
    """
    n = types.int64
    signature = types.void(out, n, weights, n, codes, n, n, G, m, bits)
    G, m, bits = (constant.literal_value for constant in (G, m, bits))

    def codegen(context, builder, signature, args):
        column, i, at, half = args[1], args[3], args[5], args[6]
        out, weights, codes = (
            context.make_array(signature.args[x])(context, builder, args[x]) for x in (0, 2, 4)
        )

        def place(array, row, x):  # Of array[row, x].
            first = builder.mul(builder.extract_value(array.shape, 1), LONG(row))
            return builder.gep(array.data, [builder.add(first, x)])

        def each(x, kind):  # Eight times x.
            vector = builder.insert_element(kind(ir.Undefined), x, INT(0))
            return builder.shuffle_vector(vector, vector, INTS([0] * 8))

        def numbers(row, j):
            first = builder.gep(codes.data, [builder.add(at, LONG(row * m + j))])
            first = builder.bitcast(first, BYTES.as_pointer())
            x = builder.zext(builder.load(first, align=1), INTS)
            if bits == 4:
                shift = builder.mul(builder.trunc(half, INT), INT(4))
                x = builder.and_(builder.lshr(x, each(shift, INTS)), INTS([15] * 8))
            return builder.sitofp(x, FLOATS)

        of_row = [builder.add(i, LONG(row)) for row in range(4)]
        w = [[builder.load(place(weights, g, x)) for x in of_row] for g in range(G)]
        for j in range(0, m, 8):
            xs = [numbers(row, j) for row in range(4)]
            for g in range(G):
                line = place(out, g, builder.add(column, LONG(j)))
                line = builder.bitcast(line, FLOATS.as_pointer())
                total = builder.load(line, align=4)
                for weight, x in zip(w[g], xs, strict=True):
                    product = builder.fmul(each(weight, FLOATS), x, flags=("fast",))
                    total = builder.fadd(total, product, flags=("fast",))
                builder.store(total, line, align=4)
        return context.get_dummy_value()

    return signature, codegen


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


@njit(fastmath=True, error_model="numpy")
def softmax(scores):
    """Turn scores (n,), logarithms to base 2, into weights that add up to 1."""
    highest, total = scores[0], np.float32(0)
    for score in scores:
        highest = max(highest, score)
    for t in range(len(scores)):
        scores[t] = power_of_2(scores[t] - highest)
        total += scores[t]
    for t in range(len(scores)):
        scores[t] /= total


def compile_once(loop, name, signature):
    """The loop as machine code for this signature, and for the next process on disk."""
    # numba keeps an index for each name. One that several processes write for different loops
    # would mix them up: each loop has a name of its own. Nor does it see changes in these files,
    # whose functions loops call.
    files = Path(__file__), Path(__file__).with_name("cpu_kernels.py")
    loop.__qualname__ += f"-{name}-{zlib.crc32(b''.join(file.read_bytes() for file in files)):x}"
    options = {"parallel": True, "fastmath": True, "error_model": "numpy"}
    held = []  # Ctrl-C has to wait: raised in one of llvmlite's finalizers, it would be lost.
    handler = signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        return njit(signature, cache=True, **options)(loop)
    except RuntimeError:  # Neither the checkout nor the user's cache folder can be written.
        return njit(signature, **options)(loop)
    finally:
        signal.signal(signal.SIGINT, handler)
        if held and callable(handler):
            handler(*held[0])
