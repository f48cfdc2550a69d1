"""What is measured, printed and written."""

from test_kvcache import *


# --- Statistics and reports -----------------------------------------------------------------------


def test_statistics_by_hand(tmp_path, capsys, monkeypatch):
    args = SimpleNamespace(n=2, model=Path("m"), dtype="float16", device="cpu", kv_gb=1e-6,
                           max_seq_len=10, json=tmp_path / "out.json")  # fmt: skip
    stats = Stats(args, {"dim": 4, "n_heads": 2, "n_kv_heads": 1, "n_layers": 2})
    size = stats.bytes_per_token
    assert (size, stats.budget, stats.naive_fits) == (2 * 2 * 1 * 2 * 2, 1000, 6)
    for running, reserved, used in [(1, 8, 2), (2, 20, 10), (2, 20, 15), (1, 10, 10)]:
        stats.sample(running, 0, reserved, used)
    stats.seconds, stats.start = {"prefill": 1.0, "decode": 3.0, "manager": 0.5}, 10.0
    for now, requests in ((11.0, [0]), (12.0, [0]), (13.5, [0, 1])):
        monkeypatch.setattr(time, "perf_counter", lambda now=now: now)
        stats.mark(requests)
    stats.report(["a", "b"], [[1], [1, 2]], [[1, 7, 8, 0], [1, 2, 9]], str, {0})
    result = json.loads(args.json.read_text())
    assert result["kv"] == {
        "bytes_per_token": 16, "budget_bytes": 1000, "peak_reserved_bytes": 320,
        "peak_used_bytes": 240, "fragmented_bytes": 80, "fragmented_of_reserved": 0.25,
        "fragmented_of_budget": 0.08,
        "mean_fragmented_of_reserved": pytest.approx((0.75 + 0.5 + 0.25 + 0) / 4),
    }  # fmt: skip
    # 58 slots reserved over 6 request-steps: 154.7 bytes a request.
    assert result["max_batch"] == {"peak": 2, "fits": 6, "naive_fits": 6}
    assert result["time"]["tokens_per_s"] == 4 / 4.5
    assert result["responses"][0] == {"prompt_tokens": 1, "tokens": [7, 8, 0], "text": "[7, 8]"}
    # Request 0 got its three tokens 1, 2 and 3.5 seconds after the start, request 1 its one.
    assert result["time"]["first_token_s"] == [1.0, 3.5]
    assert result["time"]["per_token_s"] == [1.25, None]
    out = capsys.readouterr().out
    assert "after 2.25 s, 99% within 3.50 s; then 1250 ms a token\n" in out
    assert out.endswith("Fragmented Memory: 0.00 GB (8.00%)\n")


@pytest.mark.parametrize("script", [NAIVE, VIRTUAL, PAGED, TIERED], ids=NAMES)
def test_json_agrees_with_print(tmp_path, tiny, script, capsys):
    texts = [text_of(5 * n, seed=n) for n in range(1, 6)]
    result = run(script, tiny, tmp_path, texts, "--kv-gb", 0.03, "--max-new-tokens", 9)
    assert list(result)[:7] == ["script", "model", "device", "dtype", "torch", "commit", "args"]
    kv, batch = result["kv"], result["max_batch"]
    assert result["prompt_tokens"] == sum(len(text) + 2 for text in texts)
    assert result["generated_tokens"] == 45 == sum(map(len, answers(result)))
    assert kv["peak_reserved_bytes"] - kv["peak_used_bytes"] == kv["fragmented_bytes"]
    rows = dict(re.findall(r"^(\w[\w ]+?)(?:   +|: )(.+)$", capsys.readouterr().out, re.M))
    assert rows["Requests"] == f"5: {result['prompt_tokens']} prompt tokens, 45 generated"
    assert rows["Max batch"] == f"5 in this run, {batch['fits']} would fit on average, naive fits 7"
    assert rows["Reserved"].startswith(f"{kv['peak_reserved_bytes'] / 1e9:.3f} GB of 0.030 GB")
    assert rows["Used"] == f"{kv['peak_used_bytes'] / 1e9:.3f} GB"
    assert rows["Fragmented"].startswith(f"{kv['fragmented_of_reserved']:.2%} of reserved")
    share, gb = kv["fragmented_of_budget"], kv["fragmented_bytes"] / 1e9
    assert rows["Fragmented Memory"] == f"{gb:.2f} GB ({share:.2%})"
    if script is NAIVE:  # Five rows of 8,192 slots; the most that is used is the last step.
        assert kv["peak_reserved_bytes"] == 5 * 8192 * BYTES_PER_TOKEN
        assert kv["peak_used_bytes"] == (result["prompt_tokens"] + 5 * 8) * BYTES_PER_TOKEN
        assert kv["fragmented_of_reserved"] > 0.9


def record(monkeypatch, owner, name):
    """A list that grows by the arguments of each call of a method."""
    calls, method = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *a: calls.append(a) or method(self, *a))
    return calls


def test_what_is_sampled(tmp_path, tiny, monkeypatch):
    """Each step, after the model and before anything is freed. The last token gets no slot."""
    texts = [text_of(n, seed=n) for n in (14, 3, 9)]
    limits = [len(text) + 2 + 6 for text in texts]
    stored = [[len(text) + 2 + step for text in texts] for step in range(6)]
    calls = record(monkeypatch, Stats, "sample")
    options = ["--max-new-tokens", 6, "--max-seq-len", 64]
    run(NAIVE, tiny, tmp_path, texts, *options)
    assert calls == [(3, 0, 3 * 64, sum(step)) for step in stored]
    calls.clear()
    run(PAGED, tiny, tmp_path, texts, "--block-size", 4, *options)
    assert calls == [(3, 0, sum(-(-n // 4) * 4 for n in step), sum(step)) for step in stored]
    calls.clear()
    # Limited by --max-seq-len, request 0 ends two steps early: in the naive batch its row stays.
    run(NAIVE, tiny, tmp_path, texts, "--max-new-tokens", 6, "--max-seq-len", limits[0] - 2)
    live = [[n for n in step if n < limits[0] - 2] for step in stored]
    assert calls == [(3, 0, 3 * (limits[0] - 2), sum(step)) for step in live]


@pytest.mark.parametrize(("slots", "overlap"), [(300, False), (420, True)])
def test_order_of_admission(tmp_path, tiny, monkeypatch, slots, overlap):
    """First come, first served, the preempted first; others start while some still run."""
    texts = [text_of(40 * n + 3, seed=n) for n in range(6)]  # A row of n tokens is request n // 40.
    admitted, sampled = (
        record(monkeypatch, *x) for x in ((PagedCache, "admit"), (Stats, "sample"))
    )
    budget = ["--kv-gb", slots * BYTES_PER_TOKEN / 1e9, "--block-size", 3]
    result = run(PAGED, tiny, tmp_path, texts, "--max-new-tokens", 30, *budget)
    requests = [n // 40 for (n,) in admitted]
    assert result["preemptions"] == len(requests) - 6 > 0
    # A preempted request keeps its answer: each running row adds one token in each step.
    assert sum(running for running, *_ in sampled) == result["generated_tokens"]
    for i, request in enumerate(requests):  # Later ones were here before only to be preempted.
        assert all(later in requests[i:] for later in requests[:i] if later > request)
    assert any(now[0] > old[1] - now[1] > 0 for old, now in pairwise(sampled)) == overlap


def test_a_step_that_reads_prompts_has_1024_tokens(tmp_path, tiny, monkeypatch):
    """What is left of a prompt is read by the next step, before others are admitted."""
    texts = [text_of(n, seed=n) for n in (246, 247, 2398, 248)]
    steps = record(monkeypatch, PagedCache, "advance")
    result = run(PAGED, tiny, tmp_path, texts, "--max-new-tokens", 3)
    expected = [[248, 249, 527], [1, 1, 1022], [1, 1, 851, 171], [1, 79], [1, 1], [1]]
    assert [new for (new,) in steps] == expected
    assert answers(result) == answers(run(NAIVE, tiny, tmp_path, texts, "--max-new-tokens", 3))


def test_more_rows_than_a_step_has_tokens(tmp_path, tiny):
    result = run(PAGED, tiny, tmp_path, ["a"] * 1100, "--max-new-tokens", 12)
    assert result["max_batch"]["peak"] == 1100


def test_exactly_enough_memory_is_enough(tmp_path, tiny):
    """17 tokens in and 16 out: the last one is never stored, so 32 slots do, and 31 do not."""
    for script, slots, options in ((PAGED, 32, ["--block-size", 1]), (NAIVE, 33, [])):
        options = [*options, "--max-new-tokens", 16, "--max-seq-len", 33, "--kv-gb"]
        enough = slots * BYTES_PER_TOKEN / 1e9
        assert len(answers(run(script, tiny, tmp_path, ["a" * 15], *options, enough))[0]) == 16
        with pytest.raises(SystemExit):
            run(script, tiny, tmp_path, ["a" * 15], *options, enough - 1e-9)


def test_budget_and_commit_by_default(tmp_path, tiny):
    result = run(PAGED, tiny, tmp_path, ["a"], "--max-new-tokens", 1)
    assert result["kv"]["budget_bytes"] == 1_400_000_000
    assert re.fullmatch("[0-9a-f]{7,}|", result["commit"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("gb", [0.05, 1.4])
def test_peak_memory(smollm2, gb):
    """The resident set stays within weights + budget + 500 MB, where the budget is used up, too."""
    command = (
        "import pathlib, runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print(pathlib.Path('/proc/self/status').read_text())"  # ru_maxrss counts the parent's.
    )
    options = ["--kv-gb", str(gb), "--max-new-tokens", "8", "--max-seq-len", "2000"]
    run = [sys.executable, "-c", command, HERE / "llama3-paged.py", "49", *options]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", out)[1]) * 1024
    assert 300e6 < peak < (smollm2 / "consolidated.00.pth").stat().st_size + gb * 1e9 + 500e6


def test_clocks_add_up():
    args = SimpleNamespace(dtype="float32", device="cpu", kv_gb=1, max_seq_len=8)
    stats = Stats(args, {"dim": 4, "n_heads": 2, "n_kv_heads": 1, "n_layers": 2})
    for _ in range(3):
        with stats.clock("decode"):
            time.sleep(0.01)
    assert stats.seconds["decode"] >= 0.03 and stats.seconds["prefill"] == 0


def test_temperature():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert PAGED.choose(logits, 0) == PAGED.choose(logits, 1e-45) == [1]
    draws = Counter(PAGED.choose(logits.expand(20000, 3), 2.0))
    for token, share in enumerate((logits[0] / 2).softmax(0).tolist()):
        assert draws[token] / 20000 == pytest.approx(share, abs=0.015)
