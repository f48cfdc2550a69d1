"""Rows in virtual memory: what has memory, and the calls that give it."""

from test_kvcache import *


# --- Virtual memory -------------------------------------------------------------------------------

PAGE = mmap.PAGESIZE


@pytest.mark.parametrize("page_kb", [PAGE // 1024, PAGE // 512])
@pytest.mark.parametrize("layout", ["layer", "token"])
@pytest.mark.parametrize("tight", [False, True])
def test_virtual_equals_plain_forward(tmp_path, tiny, monkeypatch, page_kb, layout, tight):
    """Prompts that end just before, at and after a page; tight: hardly room for the longest."""
    page = page_kb * 1024 // BYTES_PER_TOKEN
    step = page * {"layer": 4, "token": 1}[layout]  # Two layers' keys and values.
    lengths = [page - 1, page, page + 1, 5, 33, 40, step, step + 1] * 6
    texts, limit, options = [text_of(n - 2, seed=n) for n in lengths], 40, []
    if tight:
        monkeypatch.setattr(
            pages.VirtualCache, "can_admit", lambda self, n: self.groups_for(n) <= left(self)
        )
        n_steps = kvcache.blocks_for(max(lengths) + limit, step) + 1
        options = ["--kv-gb", n_steps * step * BYTES_PER_TOKEN / 1e9]
    result = run(VIRTUAL, tiny, tmp_path, texts, "--max-new-tokens", limit,
                 "--layout", layout, "--page-kb", page_kb, *options)  # fmt: skip
    plain = {text: plain_generate(tiny, tiny_prompt(text), limit) for text in set(texts)}
    assert answers(result) == [plain[text] for text in texts]
    if tight:
        assert result["kv"]["peak_reserved_bytes"] <= result["kv"]["budget_bytes"]
        assert result["preemptions"] >= 10


def left(cache):
    return cache.n_groups - sum(cache.n_needed)


def test_virtual_calls_attention_as_naive_does():
    calls = (
        re.search(r"    def attend\(.*?\n\n", (HERE / f"llama3-{name}.py").read_text(), re.S)[0]
        for name in ("naive", "virtual")
    )
    assert next(calls) == next(calls)


def resident(cache):
    """The pages of all rows behind which the kernel has memory."""
    libc, memory = ctypes.CDLL(None, use_errno=True), cache.pages.memory
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    flags = (ctypes.c_ubyte * (len(memory) // PAGE))()
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(memory)), flags) == 0
    size = cache.pages.page_bytes // PAGE
    groups = [list(flags[i : i + size]) for i in range(0, len(flags), size)]
    assert all(len({flag & 1 for flag in group}) == 1 for group in groups)
    return {i for i, group in enumerate(groups) if group[0] & 1}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_has_memory(data):
    """After each step: what the kernel says, the budget, and all that the rows hold."""
    n_steps, by_token = data.draw(st.integers(3, 12)), data.draw(st.booleans())
    size = PAGE * data.draw(st.sampled_from([1, 2]))
    shape = (2, 1, 3 * size // (64 if by_token else 16))  # A token is three quarters of a step.
    budget = n_steps * size * (1 if by_token else 4)
    cache = pages.VirtualCache(budget, size, by_token, 4, 12, shape, torch.float32, "cpu")
    held = {}  # Of each row in use the numbers in it, one a token.
    for step in range(20):
        row = data.draw(st.integers(0, 3))
        before = list(cache.n_mapped), list(cache.n_needed)
        free = left(cache)
        if row not in held:
            n = data.draw(st.integers(1, 12))
            if len(held) == 4 or cache.groups_for(n) > free:
                continue
            held[row := cache.admit(n)] = []
        elif data.draw(st.booleans()):
            cache.release(row)
            del held[row]
            assert cache.n_mapped == before[0]  # Nothing is unmapped before others need it.
            continue
        else:
            n = data.draw(st.integers(len(held[row]), 12))
            need = max(0, cache.groups_for(n) - cache.n_needed[row])
            assert cache.grow(row, n) == (need <= free)
            if need > free:
                assert (cache.n_mapped, cache.n_needed) == before
                continue
        for token in range(len(held[row]), n):
            held[row].append(100 * step + token)
            cache.kv[:, :, row, token] = held[row][-1]
        assert resident(cache) == {
            (row * cache.pieces + piece) * cache.row_groups + i
            for row in range(4)
            for piece in range(cache.pieces)
            for i in range(cache.n_mapped[row])
        }
        assert sum(cache.n_mapped) <= n_steps
        for row, numbers in held.items():
            assert cache.n_needed[row] <= cache.n_mapped[row]
            assert cache.groups_for(len(numbers)) <= cache.n_needed[row]
            for token, number in enumerate(numbers):
                assert (cache.kv[:, :, row, token] == number).all()
        assert sorted([*held, *cache.idle]) == [0, 1, 2, 3]


def test_idle_rows_are_used_again():
    """The row that fits best; others lose their pages before it, the first released at first."""
    shape = (1, 1, PAGE // 8)
    cache = pages.VirtualCache(10 * PAGE, PAGE, True, 4, 8, shape, torch.float32, "cpu")
    rows = [cache.admit(n) for n in (1, 4, 2, 1)]  # A token is a page.
    for i in (3, 1, 2, 0):
        cache.release(rows[i])
    assert [cache.n_mapped[row] for row in rows] == [1, 4, 2, 1] and left(cache) == 10
    assert cache.admit(2) == rows[2]
    assert cache.admit(5) == rows[1]  # None has five: four are the most.
    assert [cache.n_mapped[row] for row in rows] == [1, 5, 2, 1]
    assert cache.grow(rows[1], 7)  # One page was free; row 3 was released before row 0.
    assert [cache.n_mapped[row] for row in rows] == [1, 7, 2, 0]
    assert not cache.grow(rows[1], 9) and cache.n_needed[rows[1]] == 7
    cache.release(rows[1])
    cache.release(rows[2])
    assert cache.admit(4) == rows[1]  # Three too many, where the others have too few.
    assert cache.admit(6) == rows[2]  # One was free, one idle, and two that row 1 does not need.
    assert [cache.n_mapped[row] for row in rows] == [0, 4, 6, 0]
    cache.release(rows[2])
    assert cache.admit(1) == rows[2]
    cache.admit(3)  # Row 1 needs all that it has.
    assert cache.n_mapped[rows[1]] == 4 and cache.n_mapped[rows[2]] == 3


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
    for name in (
        "GetAllocationGranularity",
        "AddressReserve",
        "Create",
        "Map",
        "SetAccess",
        "Unmap",
    ):
        setattr(driver, f"cuMem{name}", function(f"cuMem{name}"))
    monkeypatch.setitem(sys.modules, "cuda", mock.MagicMock())
    monkeypatch.setitem(sys.modules, "cuda.bindings", mock.MagicMock(driver=driver))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    device = pages.CudaPages(16, 4096, 2, torch.device("cpu"))
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
        pages.CudaPages(16, 1000, 2, torch.device("cpu"))


def test_systems_without_madvise(tmp_path, tiny, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    with pytest.raises(SystemExit, match="needs madvise, as Linux and macOS have it"):
        run(VIRTUAL, tiny, tmp_path, ["a"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_pages_on_a_card():
    """Map, grow, unmap, use again; numbers stay where they were put."""
    shape = (32, 8, 128)
    cache = pages.VirtualCache(12 << 20, 2 << 20, True, 3, 64, shape, torch.float16, "cuda")
    rows = [cache.admit(n) for n in (16, 40)]
    for row, n in zip(rows, (16, 40), strict=True):
        cache.kv[:, :, row, :n] = row + 1
    assert not cache.grow(rows[0], 64) and cache.grow(rows[0], 48)
    cache.kv[:, :, rows[0], 16:48] = 5
    assert (cache.kv[:, :, rows[0], :16] == 1).all() and (cache.kv[:, :, rows[1], :40] == 2).all()
    cache.release(rows[1])
    row = cache.admit(33)
    cache.kv[:, :, row, :33] = 7
    assert (cache.kv[:, :, rows[0], 16:48] == 5).all() and (cache.kv[:, :, row, :33] == 7).all()
