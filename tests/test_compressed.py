"""Compressed blocks: what codecs restore, what attention makes of it, who has which memory."""

import json
import math
from itertools import product

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from caches import compressed
from caches.codecs import CODECS, Integers, MiniCache, part
from caches.compressed import CompressedCache
from kvcache import OutOfBlocks, blocks_for
from support import attention
from test_kvcache import (
    PAGED,
    PagedCacheMachine,
    answers,
    assert_plain,
    make_checkpoint,
    run,
    text_of,
)

SHAPE = (4, 2, 8)  # L, Hkv, D
SMOLLM2_SHAPE = (30, 3, 64)
BYTES_PER_TOKEN = 2 * 4 * 2 * 16 * 4  # In the model of these tests, in float32.


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model with layers that MiniCache merges."""
    return make_checkpoint(tmp_path_factory.mktemp("deep"), n_layers=4)


def restored(codec, kv):
    """What a codec makes of blocks kv (n, L, 2, Hkv, block_size, D), in a memory of its own."""
    encoded, n = codec.encode(kv), len(kv)
    parts = {
        name: torch.empty(n, *like.shape, dtype=like.dtype) for name, like in codec.parts.items()
    }
    for name, values in encoded.items():
        parts[name][:] = values
    layers = [codec.restore(parts, torch.arange(n), layer) for layer in range(kv.shape[1])]
    return torch.stack(layers).transpose(0, 2).transpose(1, 2)  # (n, L, 2, Hkv, block_size, D)


# --- Codecs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_the_nearest(bits):
    """Number by number in float64, with scale and zero rounded to float16."""
    torch.manual_seed(0)
    kv = torch.randn(3, *SHAPE[:1], 2, 2, 5, 8) * torch.tensor([0.01, 1, 30, 1, 1, 1, 1, 100])
    kv[0, 1, 1, 1, 2] = 0.5  # A value all of whose numbers are the same.
    got = restored(Integers(bits, SHAPE, 5, torch.float32), kv)
    most = 2**bits - 1
    for n, layer, which, head in torch.cartesian_prod(*map(torch.arange, (3, 4, 2, 2))).tolist():
        block = kv[n, layer, which, head].double()  # (5, 8)
        lines = block.T if which == 0 else block  # Keys by channel, values by token.
        expected, scales = [], []
        for line in lines.tolist():
            low, high = min(line), max(line)
            scales.append(max(float(torch.tensor((high - low) / most).half()), 2**-24))
            zero = float(torch.tensor(low).half())
            codes = [min(max(round((x - zero) / scales[-1]), 0), most) for x in line]
            expected.append([zero + code * scales[-1] for code in codes])
            for x, y in zip(line, expected[-1], strict=True):  # The ends may lose to float16.
                assert abs(x - y) <= 0.5 * scales[-1] + 2**-10 * max(abs(low), abs(high))
        expected, scales = torch.tensor(expected).double(), torch.tensor(scales).double()[:, None]
        off = (got[n, layer, which, head].double() - (expected.T if which == 0 else expected)).abs()
        off = off.T if which == 0 else off
        # A number half way between two may be rounded either way.
        assert (off < 1e-3 * scales).float().mean() > 0.95 and (off < 1.001 * scales).all()


def test_minicache_by_its_formulas():
    """Vector by vector in float64: the paper's equations, and the farthest tokens as they were."""
    torch.manual_seed(1)
    size, D = 24, 8  # 5% of 24 tokens are 2.
    kv = torch.randn(2, 4, 2, 2, size, D)
    kv[:, 3] = kv[:, 2] + 0.5 * kv[:, 3]  # Neighbours are alike.
    kv[1, 3, 1, 1, 7] = kv[1, 2, 1, 1, 7]  # The same direction: an angle of 0.
    kv[0, 2, 0, 0, 5] = 0
    got = restored(MiniCache(SHAPE, size, torch.float32), kv)
    assert torch.equal(got[:, :2], kv[:, :2])  # L / 2 layers have none to share with.
    for n, which, head in torch.cartesian_prod(*map(torch.arange, (2, 2, 2))).tolist():
        first, second = kv[n, 2, which, head].double(), kv[n, 3, which, head].double()
        cosines = []
        for a, b in zip(first, second, strict=True):
            lengths = float(a.norm() * b.norm())
            cosines.append(float(a @ b) / lengths if lengths else 0.0)
        farthest = sorted(range(size), key=cosines.__getitem__)[:2]
        for t, (a, b) in enumerate(zip(first, second, strict=True)):
            here = got[n, 2, which, head, t].double(), got[n, 3, which, head, t].double()
            if t in farthest:
                expected = a, b
            else:
                angle = max(math.acos(min(cosines[t], 1.0)), 1e-3)
                weights = math.sin(0.4 * angle), math.sin(0.6 * angle)
                units = [x / x.norm() if x.norm() else x for x in (a, b)]
                direction = (weights[0] * units[0] + weights[1] * units[1]) / math.sin(angle)
                expected = direction * a.norm(), direction * b.norm()
            for x, y in zip(here, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_minicache_of_opposite_directions():
    """Rounding takes some cosines below -1. The limit of the formula at pi is -cos(0.4 pi)."""
    torch.manual_seed(0)
    kv = torch.randn(1, 4, 2, 2, 64, 8)
    kv[:, 3] = -kv[:, 2]
    units = kv[:, 2] / kv[:, 2].norm(dim=4, keepdim=True)
    assert ((units * -units).sum(4) < -1).any()
    direction = MiniCache(SHAPE, 64, torch.float32).encode(kv)["direction"][:, 0]
    expected = -math.cos(0.4 * math.pi) * units
    torch.testing.assert_close(direction, expected, rtol=0, atol=0.01)


def test_what_a_block_takes():
    """Of its bytes in bfloat16, at 32 tokens, with SmolLM2's shape, without the tables."""
    cache = {
        name: CompressedCache(name, 4, 32, 1, 128, SMOLLM2_SHAPE, torch.bfloat16, "cpu")
        for name in CODECS
    }
    share = {name: one.packed_bytes / one.block_bytes for name, one in cache.items()}
    # Bits of a number, and of scales and zeros: 32 for each channel of 32 keys, each value of 64.
    assert share["int8"] == (8 + (32 / 32 + 32 / 64) / 2) / 16 <= 0.55
    assert share["int4"] == (4 + (32 / 32 + 32 / 64) / 2) / 16 <= 0.30
    # 16 layers as they are; of 7 pairs a direction, and of each layer a length and 2 tokens of 32.
    numbers = 16 + 7 + 14 * (1 / 64 + 2 / 32) + 7 * 2 / 32 / 64
    assert share["minicache"] == pytest.approx(numbers / 30, abs=1e-5)


@pytest.mark.parametrize(("codec", "size"), [("int8", 2), ("minicache", 1)])
def test_blocks_that_would_grow_are_refused(tmp_path, deep, codec, size):
    options = ["--dtype", "bfloat16", "--compress", codec, "--block-size", size]
    words = f"in {codec} a block of {size} tokens takes \\d+ bytes instead of \\d+"
    with pytest.raises(SystemExit, match=words):
        run(PAGED, deep, tmp_path, ["A"], *options)


# --- Attention ------------------------------------------------------------------------------------


def filled(codec, dtype, lengths, size=16):
    """A cache with a row of each length, whose keys and values are random numbers."""
    n_blocks = sum(blocks_for(n + 20, size) for n in lengths)
    cache = CompressedCache(codec, n_blocks, size, len(lengths), 900, (2, 2, 64), dtype, "cpu")
    for n in lengths:
        row = cache.admit([0] * n)
        ids = cache.block_table[row, : cache.n_owned[row]].tolist()
        # Channels of keys with an offset, as models have them.
        cache.kv[:, :, ids] = (torch.randn_like(cache.kv[:, :, ids]) + 2 * torch.randn(64)).to(
            dtype
        )
        cache.advance({row: [0] * n})
    return cache


def text_of_row(cache, layer, row):
    """Keys and values (2, n, Hkv, D) of a row's tokens, in the order of the text."""
    own = cache.block_table[row, : cache.n_owned[row]].tolist()
    packed = cache.packed_table[row, : cache.n_packed[row]]
    blocks = [cache.kv[layer][:, own[:1]], cache.codec.restore(cache.parts, packed, layer)]
    blocks = torch.cat([*blocks, cache.kv[layer][:, own[1:]]], 1)  # (2, n, Hkv, size, D)
    return blocks.transpose(2, 3).flatten(1, 2)[:, : int(cache.positions()[row])]


DTYPES = torch.float32, torch.bfloat16, torch.float16


# One new token of int8 and int4 is the kernel's, which takes seconds to compile for each pair.
@pytest.mark.parametrize(
    ("codec", "dtype", "T"),
    [*product(CODECS, DTYPES, [5]), *product(["minicache"], DTYPES, [1]),
     *zip(["int4", "int8", "int8"], DTYPES, [1] * 3, strict=True)],
)  # fmt: skip
def test_attention_over_both_kinds(monkeypatch, codec, dtype, T):
    """Against the definition over what is restored; first by the kernel, then without it."""
    torch.manual_seed(0)
    lengths = [3, 16, 17, 40, 150, 32]
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(attention, "can_decode", lambda q: False)
        cache = filled(codec, dtype, lengths)
        for row, n in enumerate(cache.seq_len.tolist()):
            if n + T > cache.n_owned[row] * 16:
                cache.block_table[row, cache.n_owned[row]] = cache.alloc(1)[0]
                cache.n_owned[row] += 1
        order = [4, 0, 2, 5, 1, 3]
        tables = cache.tables(order)
        q = torch.randn(6, T, 6, 64).to(dtype)
        k, v = torch.randn(2, 6, T, 2, 64).to(dtype)
        before = [text_of_row(cache, 1, row) for row in order]
        got = cache.attend(1, q, k, v, *tables)
        for i, row in enumerate(order):
            text = torch.cat([before[i], torch.stack([k[i], v[i]])], 1)  # (2, n, Hkv, D)
            n = torch.tensor([text.shape[1]], dtype=torch.int32)
            table = torch.zeros(1, 1, dtype=torch.int32)
            expected = attention.by_definition(
                q[i : i + 1].float(), *text[:, None].float(), None, None, n, table, True
            )
            rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
            here = got[i : i + 1].float()
            torch.testing.assert_close(here, expected, rtol=rounding, atol=rounding)
            # And what is new is stored, for the next step.
            cache.seq_len[row] += T
            assert torch.equal(text_of_row(cache, 1, row), text)


@pytest.mark.parametrize(
    ("bits", "D", "G", "size"), [(4, 64, 3, 16), (8, 16, 2, 32), (4, 24, 2, 8)]
)
def test_the_kernel_reads_blocks_where_they_lie(bits, D, G, size):
    """Against float64 over all keys and values, in a memory that is full of 255 elsewhere."""
    from support.packed_kernel import decode_packed

    torch.manual_seed(0)
    codec = Integers(bits, (3, 2, D), size, torch.float64)
    parts = {name: torch.zeros(12, *p.shape, dtype=p.dtype) for name, p in codec.parts.items()}
    parts["block"][:] = 255
    encoded = codec.encode(torch.randn(9, 3, 2, 2, size, D))
    ids = torch.tensor([3, 11, 0, 5, 4, 7, 8, 1, 9])
    for name, values in encoded.items():
        parts[name][ids] = values.to(parts[name].dtype)
    n_blocks = torch.tensor([5, 0, 4], dtype=torch.int32)
    table = torch.zeros(3, 6, dtype=torch.int32)
    table[0, :5], table[2, :4] = ids[:5].int(), ids[5:].int()
    q, new = torch.randn(3, 1, 2 * G, D), torch.randn(2, 3, 1, 2, D)
    kv, own = torch.randn(2, 6, size, 2, D), torch.tensor([[4, 1], [3, 0], [2, 5]]).int()
    seq_len = torch.tensor([size - 1, size, size + 3], dtype=torch.int32)
    out = decode_packed(bits, q, (*kv, *new, seq_len, own), parts["block"][:, 1], n_blocks, table)
    for row, some in enumerate((ids[:5], ids[:0], ids[5:])):
        stored = torch.cat([kv[:, own[row]].flatten(1, 2)[:, : seq_len[row]], new[:, row]], 1)
        packed = codec.restore(parts, some, 1).transpose(2, 3).flatten(1, 2)  # (2, n, Hkv, D)
        keys, values = torch.cat([packed, stored.double()], 1).repeat_interleave(G, 2)
        scores = torch.einsum("hd,nhd->hn", q[row, 0].double(), keys) / math.sqrt(D)
        expected = torch.einsum("hn,nhd->hd", scores.softmax(1), values)
        torch.testing.assert_close(out[row, 0].double(), expected, rtol=1e-5, atol=1e-5)
        block, slot = own[row, seq_len[row] // size], seq_len[row] % size
        assert torch.equal(kv[:, block, slot], new[:, row, 0])
    assert codec.decode.func is decode_packed
    assert not Integers(bits, (3, 2, D), 20, torch.float64).decode  # It takes eight at a time.


# --- Memory ---------------------------------------------------------------------------------------


class Whole:
    """A further codec: numbers that are whole anyway, in half the bytes."""

    decode = None

    def __init__(self, shape, block_size, dtype):
        L, Hkv, D = shape
        self.parts = {"numbers": part(torch.int32, L, 2, Hkv, block_size, D)}

    def encode(self, kv):
        return {"numbers": kv}

    def restore(self, parts, ids, layer):
        return parts["numbers"][ids, layer].transpose(0, 1).double()


class CompressedCacheMachine(PagedCacheMachine):
    """Admissions, steps, preemptions and releases, in blocks of which many are compressed."""

    def __init__(self):
        super().__init__()
        compressed.CODECS["whole"] = Whole
        size = (self.N_BLOCKS, self.BLOCK_SIZE, self.MAX_ROWS, self.MAX_LEN)
        self.cache = CompressedCache("whole", *size, (2, 2, 1), torch.float64, "cpu")

    @rule(residual=st.integers(0, 2))
    def change_what_is_kept(self, residual):
        self.cache.residual = residual

    def store(self, n_new):
        lengths, tables = self.cache.tables(list(n_new))
        for i, (row, n) in enumerate(n_new.items()):
            for t in range(int(lengths[i, 0]), int(lengths[i, 0]) + n):
                self.written += 1
                self.rows[row].append(self.written)
                block = tables[i, 0, t // self.BLOCK_SIZE]
                self.cache.kv[:, :, block, :, t % self.BLOCK_SIZE] = self.written
        self.cache.advance({row: [0] * n for row, n in n_new.items()})

    @precondition(lambda self: len(self.rows) < self.MAX_ROWS)
    @rule(n=st.integers(1, 20), read=st.integers(1, 20))
    def admit(self, n, read):
        cache = self.cache
        need = 2 * blocks_for(n, self.BLOCK_SIZE)  # In halves of a block, as compressed ones are.
        free = 2 * self.N_BLOCKS - 2 * cache.full.n - cache.packed.n
        more = sum(2 if cache.n_owned[row] == 1 else 1 for row in self.rows)
        assert cache.can_admit([0] * n) == (need + more <= free)
        if need <= free:
            row = cache.admit([0] * n)
            assert row not in self.rows
            self.rows[row] = []
            self.store({row: min(n, read)})
        else:
            with pytest.raises(OutOfBlocks):
                cache.admit([0] * n)

    @invariant()
    def blocks_are_partitioned_and_contents_intact(self):
        cache, size = self.cache, self.BLOCK_SIZE
        full, packed = [], []
        for row, expected in self.rows.items():
            assert cache.positions()[row] == len(expected)
            full += cache.block_table[row, : cache.n_owned[row]].tolist()
            packed += cache.packed_table[row, : cache.n_packed[row]].tolist()
            for layer in range(2):
                held = text_of_row(cache, layer, row)  # (2, n, 2, 1)
                written = torch.tensor(expected, dtype=torch.float64).view(1, -1, 1, 1)
                assert (held == written).all()
        assert sorted(full) == list(range(len(full)))  # Without holes, from either end on.
        assert sorted(packed) == list(range(2 * self.N_BLOCKS))[2 * self.N_BLOCKS - len(packed) :]
        assert 2 * len(full) + len(packed) <= 2 * self.N_BLOCKS
        reserved = len(full) * size + len(packed) * size / 2
        used = sum(map(len, self.rows.values())) - len(packed) * size / 2
        assert cache.usage() == (reserved, used)

    def teardown(self):
        for row in self.rows:
            self.cache.release(row)
        assert self.cache.full.n == self.cache.packed.n == 0


TestCompressedCache = CompressedCacheMachine.TestCase


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_not_compressed_is_full_attention(tmp_path, deep, monkeypatch, codec):
    monkeypatch.setattr(CompressedCache, "residual", 10**6)
    texts = [text_of(n, seed=n) for n in (14, 30, 31, 45, 61)] * 3
    blocks = 2 * blocks_for(61 + 2 + 40, 32)
    options = ["--max-new-tokens", 40, "--kv-gb", blocks * 32 * BYTES_PER_TOKEN / 1e9]
    result = run(PAGED, deep, tmp_path, texts, *options, "--compress", codec)
    assert_plain(result, deep, texts, 40)
    assert result["preemptions"]


@pytest.mark.parametrize("codec", CODECS)
def test_a_run_in_little_memory(tmp_path, deep, monkeypatch, codec):
    """Nobody is lost, the budget holds, and the same tokens come without the kernel."""
    texts = [text_of(n, seed=n) for n in (14, 30, 31, 45, 61)] * 4
    gb = 8 * 32 * BYTES_PER_TOKEN / 1e9
    options = ["--max-new-tokens", 60, "--kv-gb", gb, "--compress", codec]
    result = run(PAGED, deep, tmp_path, texts, *options)
    kv = result["kv"]
    assert kv["peak_used_bytes"] <= kv["peak_reserved_bytes"] <= kv["budget_bytes"]
    assert result["preemptions"] and all(answers(result))
    monkeypatch.setattr(attention, "can_decode", lambda q: False)
    assert answers(run(PAGED, deep, tmp_path, texts, *options)) == answers(result)


def test_prompts_come_in_as_they_are_read():
    """Not read yet, they would take the room of three or four that have been."""
    cache = CompressedCache("int4", 100, 32, 9, 900, SHAPE, torch.bfloat16, "cpu")
    rows = [cache.admit([0] * 600) for _ in range(2) if cache.can_admit([0] * 600)]
    assert len(rows) == 2 and not cache.can_admit([0])
    cache.advance({rows[0]: [0] * 600})
    assert cache.can_admit([0] * 600)


def test_more_requests_run_in_the_same_memory(tmp_path, deep):
    texts, gb = [text_of(200, seed=1)] * 30, 40 * 32 * BYTES_PER_TOKEN / 1e9
    options = ["--max-new-tokens", 30, "--kv-gb", gb]
    plain = run(PAGED, deep, tmp_path, texts, *options)["max_batch"]
    packed = run(PAGED, deep, tmp_path, texts, *options, "--compress", "int4")["max_batch"]
    assert packed["peak"] > 1.5 * plain["peak"] and packed["fits"] > 1.5 * plain["fits"]


def test_a_trace_of_both_kinds(tmp_path, deep):
    """What the memory map shows adds up to what the statistics count, step by step."""
    texts, size = [text_of(n, seed=n) for n in (30, 70, 100)], 32
    options = ["--max-new-tokens", 40, "--compress", "int8"]
    run(PAGED, deep, tmp_path, texts, *options, "--trace", tmp_path / "trace")
    head, *steps = map(json.loads, (tmp_path / "trace").read_text().splitlines())
    (total, _), (rooms, _) = head["tiers"]["HBM"], head["tiers"]["compressed"]
    block_bytes, cells = size * BYTES_PER_TOKEN, {"HBM": {}, "compressed": {}}
    packed_bytes = CompressedCache(
        "int8", 1, size, 1, 9, (4, 2, 16), torch.float32, "cpu"
    ).packed_bytes
    assert (
        total == head["budget_bytes"] // block_bytes < rooms == total * block_bytes // packed_bytes
    )
    for step in steps:
        for tier, changes in step["tiers"].items():
            for cell, *owner in changes:
                cells[tier].pop(cell, None)
                if owner:
                    cells[tier][cell] = owner
        packed = len(cells["compressed"]) * packed_bytes
        assert step["reserved_bytes"] == len(cells["HBM"]) * block_bytes + packed
        used = sum(tokens for _, tokens in cells["HBM"].values()) * BYTES_PER_TOKEN
        assert step["used_bytes"] == used + packed
    assert packed
