"""Rows in virtual memory: what has memory, and the calls that give it."""

import ctypes
import mmap
import sys
from itertools import count
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caches.virtual import VirtualCache
from support.pages import CudaPages
from test_kvcache import PAGE, VIRTUAL, run


def resident(cache):
    """The pages of all rows behind which the kernel has memory."""
    libc, memory = ctypes.CDLL(None, use_errno=True), cache.pages.memory
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    flags = (ctypes.c_ubyte * (len(memory) // PAGE))()
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(memory)), flags) == 0
    size = cache.pages.page_bytes // PAGE
    pages = [list(flags[i : i + size]) for i in range(0, len(flags), size)]
    assert all(len({flag & 1 for flag in page}) == 1 for page in pages)
    return {i for i, page in enumerate(pages) if page[0] & 1}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@given(data=st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_what_has_memory(data):
    """After each step: what the kernel says, the budget, and all that the rows hold."""
    n_pages, size = data.draw(st.integers(3, 12)), PAGE * data.draw(st.sampled_from([1, 2]))
    shape = (2, 1, 3 * size // 64)  # A token is three quarters of a page.
    cache = VirtualCache(n_pages * size, size, 4, 12, shape, torch.float32, "cpu")
    held, numbers_left = {}, count(1)  # Of each row in use the numbers in it, one a token.

    def store(new):
        for row, n in new.items():
            for _ in range(n):
                held[row].append(next(numbers_left))
                cache.kv[:, :, row, len(held[row]) - 1] = held[row][-1]
        cache.advance({row: [0] * n for row, n in new.items()})

    for _ in range(40):
        before = list(cache.n_mapped)
        match data.draw(st.sampled_from(["admit", "decode", "decode", "release"])):
            case "admit":
                n = data.draw(st.integers(1, 12))
                fits = cache.pages_for(n) + len(held) <= cache.n_free()
                assert cache.can_admit([0] * n) == fits
                if len(held) < 4 and fits:
                    row = cache.admit([0] * n)
                    held[row] = []
                    store({row: data.draw(st.integers(1, n))})  # A part of the prompt, or all.
            case "decode" if held and max(map(len, held.values())) < 12:
                needs = [
                    max(cache.n_needed[row], cache.pages_for(len(numbers) + 1))
                    for row, numbers in held.items()
                ]
                assert cache.can_grow() == (sum(needs) <= n_pages)
                while not cache.can_grow():
                    row, _ = held.popitem()
                    cache.release(row)
                cache.grow()
                store(dict.fromkeys(held, 1))
            case "release" if held:
                row = data.draw(st.sampled_from(sorted(held)))
                cache.release(row)
                del held[row]
                assert cache.n_mapped == before  # Nothing is unmapped before others need it.
        assert resident(cache) == {
            row * cache.row_pages + i for row in range(4) for i in range(cache.n_mapped[row])
        }
        assert sum(cache.n_mapped) <= n_pages
        for row, numbers in held.items():
            assert cache.n_needed[row] <= cache.n_mapped[row]
            assert cache.pages_for(len(numbers)) <= cache.n_needed[row]
            for token, number in enumerate(numbers):
                assert (cache.kv[:, :, row, token] == number).all()
            assert cache.positions()[row] == len(numbers)
        assert sorted([*held, *cache.idle]) == [0, 1, 2, 3]
        assert cache.usage()[1] == sum(map(len, held.values()))


def test_pages_that_no_request_needs():
    """A new one takes the row with the most of them; the row idle for longest loses them first."""
    shape = (1, 1, PAGE // 8)
    cache = VirtualCache(10 * PAGE, PAGE, 4, 8, shape, torch.float32, "cpu")
    rows = [cache.admit([0] * n) for n in (1, 4, 2, 1)]  # A token is a page.
    assert rows == [0, 1, 2, 3]
    for row in (3, 1, 2, 0):
        cache.release(row)
    assert cache.n_mapped == [1, 4, 2, 1] and cache.n_free() == 10
    assert cache.admit([0] * 7) == 1  # Three more: two had no place, one is row 3's.
    assert cache.n_mapped == [1, 7, 2, 0] and cache.n_free() == 3
    cache.release(1)
    assert cache.admit([0]) == 1
    assert cache.n_mapped == [1, 7, 2, 0] and cache.n_free() == 9
    assert cache.admit([0] * 6) == 2  # Four more: row 0's, and three that row 1 does not need.
    assert cache.n_mapped == [0, 4, 6, 0] and cache.n_free() == 3
    cache.advance({1: [0], 2: [0] * 6})
    cache.grow()  # Row 1 has had its second page all the time; row 2's seventh was row 1's fourth.
    assert cache.n_mapped == [0, 3, 7, 0] and cache.n_needed == [0, 2, 7, 0]
    assert not cache.can_admit([0]) and cache.n_free() == 1  # One that each of two could grow by.


def test_calls_to_the_cuda_driver(monkeypatch):
    """Order and arguments, by a stand-in that notes them; the addresses are those of a buffer."""
    calls, made, buffer = [], iter(range(100, 200)), torch.zeros(16 * 4096, dtype=torch.uint8)

    def function(name):
        def call(*args):
            calls.append((name, *args))
            results = {"cuMemGetAllocationGranularity": 1024, "cuMemCreate": next(made)}
            if name == "cuMemAddressReserve":
                return 0, buffer.data_ptr()
            return (0, results[name]) if name in results else (0,)

        return call

    driver = mock.MagicMock()
    names = ["GetAllocationGranularity", "AddressReserve", "Create", "Map", "SetAccess", "Unmap"]
    for name in names:
        setattr(driver, f"cuMem{name}", function(f"cuMem{name}"))
    monkeypatch.setitem(sys.modules, "cuda", mock.MagicMock())
    monkeypatch.setitem(sys.modules, "cuda.bindings", mock.MagicMock(driver=driver))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    device = CudaPages(16, 4096, 2, torch.device("cpu"))
    create = ("cuMemCreate", 4096, device.prop, 0)
    assert calls[0][0] == "cuMemGetAllocationGranularity" and calls[2:] == [create] * 2
    assert calls[1] == ("cuMemAddressReserve", 16 * 4096, 0, 0, 0)
    base = buffer.data_ptr()
    assert device.bytes.data_ptr() == base and device.bytes.numel() == buffer.numel()
    calls.clear()
    device.map([3, 5])
    a, b = base + 3 * 4096, base + 5 * 4096
    first, second = (call[4] for call in calls if call[0] == "cuMemMap")
    assert first != second
    access = [device.access], 1
    assert calls == [
        ("cuMemMap", a, 4096, 0, first, 0), ("cuMemSetAccess", a, 4096, *access),
        ("cuMemMap", b, 4096, 0, second, 0), ("cuMemSetAccess", b, 4096, *access),
    ]  # fmt: skip
    calls.clear()
    device.unmap([5])
    device.map([9])
    c = base + 9 * 4096
    assert calls == [
        "synchronize", ("cuMemUnmap", b, 4096),
        ("cuMemMap", c, 4096, 0, second, 0), ("cuMemSetAccess", c, 4096, *access),
    ]  # fmt: skip
    driver.cuMemUnmap = lambda *args: (2,)
    with pytest.raises(RuntimeError, match="cuMemUnmap"):
        device.unmap([9])
    with pytest.raises(ValueError, match="multiples of 1 KiB"):
        CudaPages(16, 1000, 2, torch.device("cpu"))


def test_systems_without_madvise(tmp_path, tiny, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    with pytest.raises(SystemExit, match="needs madvise, as Linux and macOS have it"):
        run(VIRTUAL, tiny, tmp_path, ["a"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_pages_on_a_card():
    """Map, grow, unmap, use again; numbers stay where they were put."""
    shape = (32, 8, 128)
    cache = VirtualCache(12 << 20, 2 << 20, 3, 64, shape, torch.float16, "cuda")
    rows = [cache.admit([0] * n) for n in (16, 40)]
    for row, n in zip(rows, (16, 40), strict=True):
        cache.kv[:, :, row, :n] = row + 1
        cache.advance({row: [0] * n})
    assert cache.can_grow()
    cache.grow()
    cache.kv[:, :, rows[0], 16:32] = 5
    assert (cache.kv[:, :, rows[0], :16] == rows[0] + 1).all()
    cache.release(rows[1])
    row = cache.admit([0] * 33)
    cache.kv[:, :, row, :33] = 7
    assert (cache.kv[:, :, rows[0], 16:32] == 5).all() and (cache.kv[:, :, row, :33] == 7).all()
