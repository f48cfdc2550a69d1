"""The attention call: the definition against softmax in float64, what is faster against both."""

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import attention, checkpoint, numba_help
from support.attention import flash_attn_with_kvcache
from support.checkpoint import linear, pack

REPO = Path(__file__).resolve().parent.parent


def define(q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, block_table=None, causal=False):
    """The definition, called as flash_attn_with_kvcache() is."""
    if block_table is None:
        block_table = torch.arange(len(q)).int()[:, None]
    return attention.by_definition(q, k_cache, v_cache, k, v, cache_seqlens, block_table, causal)


@pytest.mark.parametrize("attend", [define, flash_attn_with_kvcache])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("H", "Hkv"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("total", [[17], [5, 4, 3], [3, 4, 17, 5], [16, 8, 9, 4, 7]])
def test_attention_is_softmax(attend, paged, append, causal, T, H, Hkv, total):
    """Ragged lengths; caches that are strided views; NaN in each slot that must not matter."""
    torch.manual_seed(0)
    D, block_size, B = 8, 4, len(total)  # total: lengths that count the new tokens.
    k, v = torch.randn(2, B, T, Hkv, D)
    stored = torch.randn(2, B, 20, Hkv, D)
    cache = torch.full((2, B, 3, 20, Hkv, D), math.nan)[:, :, 1]  # One layer of three: strided.
    table = None
    if paged:
        table = torch.randperm(40)[: B * 5].view(B, 5).int()
        pool = torch.full((40, 3, 2, Hkv, block_size, D), math.nan)
        cache = pool[:, 1].transpose(0, 1).transpose(2, 3)

    def place(t):  # Where token t of each row lives.
        rows = torch.arange(B)
        return (table[rows, t // block_size], t % block_size) if paged else (rows, t)

    before = [n - T if append else n for n in total]
    for row, n in enumerate(before):
        for t in range(n):
            where = tuple(x[row] if torch.is_tensor(x) else x for x in place(t))
            cache[:, where[0], where[1]] = stored[:, row, t]
    expected_cache = cache.clone()
    q = 40 * torch.randn(B, T, H, D)  # Scores whose exponentials overflow.
    out = attend(
        q, cache[0], cache[1], *((k, v) if append else ()),
        cache_seqlens=torch.tensor(before, dtype=torch.int32), block_table=table, causal=causal,
    )  # fmt: skip
    for row, n in enumerate(total):
        both = [stored[i, row, : before[row]] for i in (0, 1)]
        if append:
            both = [torch.cat([old, new[row]]) for old, new in zip(both, (k, v), strict=True)]
        for h in range(H):
            keys, values = (x[:, h // (H // Hkv)].double() for x in both)
            scores = q[row, :, h].double() @ keys.T / math.sqrt(D)
            for t in range(T if causal else 0):
                scores[t, n - T + t + 1 :] = -math.inf
            torch.testing.assert_close(out[row, :, h], (scores.softmax(-1) @ values).float())
        for t in range(before[row], before[row] + T * append):  # The append: these slots only.
            where = tuple(x[row] if torch.is_tensor(x) else x for x in place(t))
            expected_cache[:, where[0], where[1]] = torch.stack([k, v])[:, row, t - before[row]]
    torch.testing.assert_close(cache, expected_cache, rtol=0, atol=0, equal_nan=True)


def errors_of_decode(dtype, D, G, block_size, lengths):
    """Largest errors of kernel and definition in this dtype, against the definition in float64.

    lengths count the new token. Blocks lie anywhere, the second row begins with the first one's
    first block, and slots behind an end hold NaN. block_size None: contiguous rows.
    """
    torch.manual_seed(0)
    B, Hkv, longest = len(lengths), 2, max(lengths)
    size = block_size or longest
    width = -(-longest // size)
    cache = torch.randn(2, B * width, Hkv, size, D).to(dtype).transpose(2, 3)
    q, k, v = (torch.randn(B, 1, heads, D).to(dtype) for heads in (Hkv * G, Hkv, Hkv))
    table = torch.randperm(B * width).view(B, width).int()
    if block_size is None:
        table = torch.arange(B).view(B, 1).int()
    elif B > 1 and min(lengths[:2]) > size:
        table[1, 0] = table[0, 0]
    for row, n in enumerate(lengths):  # The new token's slot included, which it fills.
        last = table[row, (n - 1) // size]
        cache[:, last, (n - 1) % size :] = math.nan
        cache[:, table[row, (n - 1) // size + 1 :].long()] = math.nan
    places = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32) - 1}
    places["block_table"] = None if block_size is None else table
    exact, defined, got = cache.double(), cache.clone(), cache.clone()
    reference = define(q.double(), *exact, k.double(), v.double(), **places)
    by_definition = define(q, *defined, k, v, **places)
    by_kernel = flash_attn_with_kvcache(q, *got, k, v, **places)
    assert torch.equal(got.nan_to_num(), defined.nan_to_num())  # Both store the same.
    assert by_kernel.dtype == dtype and by_kernel.shape == q.shape
    return [(x.double() - reference).abs().max().item() for x in (by_kernel, by_definition)]


@pytest.mark.parametrize(
    ("dtype", "D", "G"),
    [
        (torch.bfloat16, 64, 3),
        (torch.bfloat16, 32, 8),
        (torch.float16, 128, 4),
        (torch.float32, 256, 1),
        (torch.float32, 80, 3),
    ],
)
def test_the_kernel_agrees_with_the_definition(dtype, D, G):
    rounding = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 1e-6}[dtype]
    for block_size in (1, 16, 31, 256, None):
        for lengths in ([1], [2, 3, 1], [16, 17, 31, 32, 33], [700, 257, 256], [5000]):
            kernel, definition = errors_of_decode(dtype, D, G, block_size, lengths)
            assert kernel < 4 * rounding, (block_size, lengths)  # Values are below 4.
            if dtype != torch.float32:
                assert kernel <= 1.02 * definition, (block_size, lengths)


def test_powers_of_two():
    """Within 3e-7 of them, from 1 down to the smallest that attention can notice."""
    x = torch.linspace(-125.9, 0, 10_001).numpy()
    got = torch.tensor([numba_help.power_of_2(number) for number in x], dtype=torch.float64)
    expected = 2.0 ** torch.from_numpy(x).double()
    torch.testing.assert_close(got, expected, rtol=3e-7, atol=0)
    assert numba_help.power_of_2(torch.tensor(-1e30).numpy()[()]) < 1.2e-38


def test_new_tokens_are_stored_where_the_table_says_now():
    """The lengths and the table change in place from step to step."""
    pool, table = torch.zeros(2, 6, 2, 4, 8), torch.arange(6).view(2, 3).int()
    seq_len, new = torch.zeros(2, dtype=torch.int32), torch.randn(3, 2, 1, 2, 8)
    for step, q in enumerate(new):
        if step == 2:
            table[:] = table.flip(0)
        places = {"cache_seqlens": seq_len, "block_table": table}
        flash_attn_with_kvcache(q, *pool.transpose(2, 3), q, -q, **places, causal=True)
        seq_len += 1
    expected = torch.zeros_like(pool)
    for row, (before, after) in enumerate([(0, 3), (3, 0)]):
        expected[0, before, :, :2] = new[:2, row, 0].transpose(0, 1)
        expected[0, after, :, 2] = new[2, row, 0]
    expected[1] = -expected[0]
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("T", [1, 3])
def test_some_rows_of_a_contiguous_cache(T):
    """cache_batch_idx: rows 3 and 1 of four. The others stay as they are."""
    torch.manual_seed(0)
    cache, rows = torch.randn(2, 4, 9, 2, 8), torch.tensor([3, 1], dtype=torch.int32)
    q, k, v = (torch.randn(2, T, heads, 8) for heads in (6, 2, 2))
    places = {"cache_seqlens": torch.tensor([5, 0], dtype=torch.int32), "causal": True}
    chosen, got = cache[:, [3, 1]].clone(), cache.clone()
    expected = define(q, *chosen, k, v, **places)
    out = flash_attn_with_kvcache(q, *got, k, v, cache_batch_idx=rows, **places)
    torch.testing.assert_close(out, expected)
    cache[:, [3, 1]] = chosen
    assert torch.equal(got, cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [0, 5, 700])
def test_prompts_are_read_by_the_flash_kernel(dtype, stored):
    """From the first token on and behind stored ones, it is what runs; the definition agrees."""
    torch.manual_seed(0)
    T, pool = 300, torch.randn(2, 70, 3, 16, 64).to(dtype)
    q, k, v = (torch.randn(1, T, heads, 64).to(dtype) for heads in (9, 3, 3))
    places = {"cache_seqlens": torch.tensor([stored], dtype=torch.int32)}
    places["block_table"] = torch.randperm(70).view(1, 70).int()
    defined, got = pool.clone(), pool.clone()
    expected = define(q, *defined.transpose(2, 3), k, v, **places, causal=True)
    with torch.profiler.profile() as profile:
        out = flash_attn_with_kvcache(q, *got.transpose(2, 3), k, v, **places, causal=True)
    ran = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in ran
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(got, defined)


def test_attention_in_float16_does_not_overflow():
    """The mean of 8,192 values of 10; their sum would be beyond float16's 65,504."""
    q, new = torch.zeros(1, 1, 8, 128).half(), torch.full((1, 1, 2, 128), 10).half()
    pool = torch.full((2, 512, 16, 2, 128), 10).half()
    places = {"cache_seqlens": torch.tensor([8191], dtype=torch.int32)}
    places["block_table"] = torch.arange(512).view(1, 512).int()
    for attend in (define, flash_attn_with_kvcache):
        out = attend(q, *pool, new, new, **places, causal=True)
        torch.testing.assert_close(out, torch.full_like(out, 10))


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_matrices_multiply_as_plain_ones(monkeypatch, dtype, instructions):
    """Also as on a CPU that cannot multiply bfloat16."""
    if not instructions:
        monkeypatch.setattr(checkpoint, "multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    x, weight = torch.randn(5, 70, dtype=dtype), torch.randn(33, 70, dtype=dtype)
    packed = pack(weight)
    assert packed.is_mkldnn == (dtype == torch.bfloat16 and checkpoint.multiplies_bfloat16())
    assert packed.is_mkldnn or packed.dtype == torch.float32
    expected = (x.double() @ weight.double().T).to(dtype)
    torch.testing.assert_close(linear(x, packed), expected, rtol=0.01, atol=0.01)


@pytest.mark.skipif(
    not (attention.flash_attn_kernel and torch.cuda.is_available()),
    reason="needs flash-attn and a CUDA card",
)
@pytest.mark.parametrize("T", [1, 5])
def test_flash_attn_agrees_with_the_definition(T):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, T, 8, 64), *torch.randn(2, 3, T, 2, 64)
    pool = torch.randn(9, 2, 2, 2, 256, 64).transpose(3, 4)
    table = torch.randperm(9).view(3, 3).int()
    seq_len = torch.tensor([1, 255, 600], dtype=torch.int32)
    expected, got = (
        flash_attn_with_kvcache(
            *(x.to(device, dtype) for x in (q, pool[:, 1, 0], pool[:, 1, 1], k, v)),
            cache_seqlens=seq_len.to(device), block_table=table.to(device), causal=True,
        )
        for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16))
    )  # fmt: skip
    torch.testing.assert_close(got.float().cpu(), expected, rtol=2e-2, atol=2e-2)


# --- The compiled loop on disk --------------------------------------------------------------------

USE = """
import sys, torch
from support import cpu_kernels
for name in sys.argv[1:]:
    dtype = getattr(torch, name)
    cache, new = torch.zeros(2, 1, 4, 1, 16).to(dtype), torch.ones(1, 1, 1, 16).to(dtype)
    lengths = torch.zeros(1, dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    assert torch.equal(cpu_kernels.decode(new, *cache, new, 3 * new, lengths, table), 3 * new)
    stats = cpu_kernels.compiled(dtype, 16, 1).stats
    print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def start(folder, *dtypes, **environment):
    """A process that uses the kernel in a copy of the checkout. Prints hits and misses."""
    command = [sys.executable, "-c", USE, *dtypes]
    inherited = {name: value for name, value in os.environ.items() if "NUMBA" not in name}
    return subprocess.Popen(
        command, cwd=folder, env=inherited | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_the_second_run_compiles_nothing(tmp_path):
    """Nor do processes that compile other kernels at the same time take it away."""
    shutil.copytree(REPO / "support", tmp_path / "support", ignore=lambda *_: ["__pycache__"])
    both = [start(tmp_path, dtype) for dtype in ("bfloat16", "float32")]
    assert [process.communicate() for process in both] == [("0 1\n", "")] * 2
    indexes = list((tmp_path / "support" / "__pycache__").glob("*loop*.nbi"))
    assert len(indexes) == 2  # One for each: an index that two processes write mixes them up.
    assert start(tmp_path, "bfloat16", "float32").communicate() == ("1 0\n1 0\n", "")


def test_a_checkout_and_a_home_that_cannot_be_written(tmp_path):
    """Then each run compiles for itself."""
    shutil.copytree(REPO / "support", tmp_path / "support", ignore=lambda *_: ["__pycache__"])
    (tmp_path / "support" / "__pycache__").touch()  # A file, so that it cannot be a folder.
    nowhere = str(tmp_path / "support" / "__pycache__" / "home")
    places = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "IPYTHONDIR": nowhere}
    out, errors = start(tmp_path, "float32", **places).communicate()
    assert (out, errors) == ("0 1\n", "")


def test_without_numba_the_definition_runs(tmp_path):
    """And one line says how to make it fast."""
    code = f"import sys; sys.modules['numba'] = None\n{USE.split('for name')[0]}"
    code = code.replace("cpu_kernels", "attention") + (
        "cache, new = torch.zeros(2, 1, 4, 1, 16), torch.ones(1, 1, 1, 16)\n"
        "places = {'cache_seqlens': torch.zeros(1, dtype=torch.int32), 'causal': True}\n"
        "out = attention.flash_attn_with_kvcache(new, *cache, new, 3 * new, **places)\n"
        "assert torch.equal(out, 3 * new)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    (line,) = done.stderr.splitlines()
    assert "pip install numba" in line


def test_ctrl_c_waits_for_the_compiler(monkeypatch):
    """Raised in one of its finalizers, Python would print it and go on."""

    def njit(*_, **__):
        signal.raise_signal(signal.SIGINT)
        return done.append

    done, handler = [], signal.default_int_handler
    monkeypatch.setattr(numba_help, "njit", njit)
    before = signal.signal(signal.SIGINT, handler)  # A shell ignores it for what runs behind it.
    try:
        with pytest.raises(KeyboardInterrupt):
            numba_help.compile_once(test_ctrl_c_waits_for_the_compiler, "", "()")
        assert len(done) == 1 and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("file", ["cpu_kernels.py", "numba_help.py"])
def test_a_loop_is_compiled_again_when_what_it_calls_has_changed(monkeypatch, file):
    names, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(numba_help, "njit", lambda *_, **__: lambda f: names.append(f.__qualname__))

    def changed(path):
        return read_bytes(path) + b"#" * (path.name == file)

    for read in (read_bytes, read_bytes, changed):
        monkeypatch.setattr(Path, "read_bytes", read)
        numba_help.compile_once(lambda: None, "name", "()")
    assert names[0] == names[1] != names[2]
