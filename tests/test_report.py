"""What is measured, printed and written, and in which order requests are answered."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvcache import PagedCache
from support.checkpoint import multiplies_bfloat16
from support.prompts import Request, next_tokens
from support.report import Stats
from test_kvcache import (
    BYTES_PER_TOKEN,
    HERE,
    NAIVE,
    PAGED,
    answers,
    record,
    run,
    text_of,
    write_prompts,
)


def test_statistics_by_hand(tmp_path, capsys, monkeypatch):
    args = SimpleNamespace(
        n=2, model=Path("m"), dtype="float16", device="cpu", kv_gb=1e-6, max_new_tokens=9,
        max_seq_len=10, json=tmp_path / "out.json",
    )  # fmt: skip
    stats = Stats(args, {"dim": 4, "n_heads": 2, "n_kv_heads": 1, "n_layers": 2})
    size = stats.bytes_per_token
    assert (size, stats.budget, stats.naive_fits) == (2 * 2 * 1 * 2 * 2, 1000, 6)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for running, reserved, used in [(1, 8, 2), (2, 20, 10), (2, 20, 15), (1, 10, 10)]:
        stats.sample([[5] * 3, [6]], running, 0, reserved, used)
    assert capsys.readouterr().err.endswith("step 4: 16 tokens computed, 1 running, 0 waiting")
    stats.seconds = {"prefill": 1.0, "decode": 3.0, "manager": 0.5, "idle": 0.0}
    clock = SimpleNamespace(now=10.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    a, b = Request((0, 0), "a", [1], [], args), Request((1, 0), "b", [1, 2], [], args)
    for clock.now, request, token in ((11.0, a, 7), (12.0, a, 8), (13.5, a, 0), (13.5, b, 9)):
        request.add(token)
    stats.report([a, b], str, {0})
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
    # a got its three tokens 1, 2 and 3.5 seconds after it arrived, b its one.
    assert result["time"]["first_token_s"] == [1.0, 3.5]
    assert result["time"]["per_token_s"] == [1.25, None]
    out = capsys.readouterr().out
    assert "after 2.25 s, 99% within 3.50 s; then 1250 ms a token\n" in out
    assert out.endswith("Fragmented Memory: 0.00 GB (8.00%)\n")


def test_json_is_complete_where_nobody_reads_what_is_printed(tmp_path, tiny, monkeypatch):
    def show(*args):
        raise BrokenPipeError

    monkeypatch.setattr(Stats, "show", show)
    with pytest.raises(BrokenPipeError):
        run(PAGED, tiny, tmp_path, ["a"], "--max-new-tokens", 3)
    (response,) = json.loads((tmp_path / "out.json").read_text())["responses"]
    assert len(response["tokens"]) == 3


def test_what_is_sampled(tmp_path, tiny, monkeypatch):
    """Each step, after the model and before anything is freed. The last token gets no slot."""
    texts = [text_of(n, seed=n) for n in (14, 3, 9)]
    limits = [len(text) + 2 + 6 for text in texts]
    stored = [[len(text) + 2 + step for text in texts] for step in range(6)]
    calls = record(monkeypatch, PAGED.Stats, "sample")
    options = ["--max-new-tokens", 6, "--max-seq-len", 64]
    run(NAIVE, tiny, tmp_path, texts, *options)
    assert [call[1:] for call in calls] == [(3, 0, 3 * 64, sum(step)) for step in stored]
    assert [list(map(len, new)) for new, *_ in calls] == [[16, 5, 11]] + [[1, 1, 1]] * 5
    calls.clear()
    run(PAGED, tiny, tmp_path, texts, "--block-size", 4, *options)
    reserved = [sum(-(-n // 4) * 4 for n in step) for step in stored]
    expected = [(3, 0, n, sum(step)) for n, step in zip(reserved, stored, strict=True)]
    assert [call[1:] for call in calls] == expected
    calls.clear()
    # Limited by --max-seq-len, request 0 ends two steps early: in the naive batch its row stays.
    run(NAIVE, tiny, tmp_path, texts, "--max-new-tokens", 6, "--max-seq-len", limits[0] - 2)
    live = [[n for n in step if n < limits[0] - 2] for step in stored]
    expected = [(3, 0, 3 * (limits[0] - 2), sum(step)) for step in live]
    assert [call[1:] for call in calls] == expected


def test_prompts_first():
    """Prompts are cut only if they are longer than a step; who decodes waits for all of them."""

    def chosen(positions, *lengths, chunk=1024):
        running = {i: SimpleNamespace(tokens=[i] * n) for i, n in enumerate(lengths)}
        new = next_tokens(running, positions, chunk)
        assert all(set(tokens) == {row} for row, tokens in new.items())
        return {row: len(tokens) for row, tokens in new.items()}

    assert chosen([4, 9], 5, 10) == {0: 1, 1: 1}
    assert chosen([4, 0, 0], 5, 1000, 24) == {1: 1000, 2: 24}
    assert chosen([4, 0, 0], 5, 1000, 25) == {1: 1000}
    assert chosen([0, 0, 0], 1000, 30, 24) == {0: 1000, 2: 24}
    assert chosen([0, 0], 2500, 3) == {0: 1024}
    assert chosen([2048, 0], 2500, 3) == {0: 452, 1: 3}
    assert chosen([2499, 2], 2500, 3) == {0: 1, 1: 1}
    assert chosen([0, 0], 300, 300, chunk=100) == {0: 100, 1: 100}
    assert chosen([4] * 1100, *[5] * 1100) == dict.fromkeys(range(1100), 1)


@pytest.mark.parametrize(("slots", "overlap"), [(300, False), (420, True)])
def test_order_of_admission(tmp_path, tiny, monkeypatch, slots, overlap):
    """First come, first served, the preempted first; others start while some still run."""
    texts = [text_of(40 * n + 3, seed=n) for n in range(6)]  # A row of n tokens is request n // 40.
    admitted, sampled = (
        record(monkeypatch, *x) for x in ((PagedCache, "admit"), (PAGED.Stats, "sample"))
    )
    budget = ["--kv-gb", slots * BYTES_PER_TOKEN / 1e9, "--block-size", 3]
    result = run(PAGED, tiny, tmp_path, texts, "--max-new-tokens", 30, *budget)
    requests = [len(tokens) // 40 for (tokens,) in admitted]
    assert result["preemptions"] == len(requests) - 6 > 0
    for i, request in enumerate(requests):  # Later ones were here before only to be preempted.
        assert all(later in requests[i:] for later in requests[:i] if later > request)
    assert any(now[1] > old[2] - now[2] > 0 for old, now in pairwise(sampled)) == overlap


def test_all_that_fit_run_at_once_though_some_could_end_early(tmp_path, tiny):
    """Prompts of two steps; those of the first one wait for the others before they decode."""
    texts = ["a", "b", *[text_of(500, seed=n) for n in range(3)]]
    result = run(PAGED, tiny, tmp_path, texts, "--max-new-tokens", 2)
    assert result["max_batch"]["peak"] == 5 and result["time"]["steps"] == 3


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
@pytest.mark.parametrize("gb", [0.016, 1.4])
def test_peak_memory(tmp_path, smollm2, gb):
    """Weights, what is used of the budget, and 500 MB: also where that is nearly all of it."""
    command = (
        "import pathlib, runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print(pathlib.Path('/proc/self/status').read_text())"  # ru_maxrss counts the parent's.
    )
    prompts = write_prompts(tmp_path / "prompts.json", ["word " * 600])
    options = ["--prompts", prompts, "--kv-gb", str(gb), "--max-new-tokens", "1"]
    run = [sys.executable, "-c", command, HERE / "llama3-paged.py", "1", *options]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", out)[1]) * 1024
    weights = (smollm2 / "consolidated.00.pth").stat().st_size
    weights *= 1 if multiplies_bfloat16() else 2  # Or they are in float32.
    assert weights < peak < weights + 0.016e9 + 500e6


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
    assert PAGED.choose(logits, 0) == [1]
    assert PAGED.choose(logits, 1e-45) == PAGED.choose(logits, 5e-324) == [1]
    draws = Counter(PAGED.choose(logits.expand(20000, 3), 2.0))
    for token, share in enumerate((logits[0] / 2).softmax(0).tolist()):
        assert draws[token] / 20000 == pytest.approx(share, abs=0.015)


def test_manager_does_the_same_work_for_any_context_and_batch():
    """Counts Python calls and torch operations of a step in which no row needs a block."""

    def work(rows, context):
        cache = PagedCache(rows * 501, 16, rows, 8016, (1, 1, 1), torch.float32, "cpu")
        for _ in range(rows):
            cache.admit([0] * context)
        cache.advance({row: [0] * (context - 1) for row in range(rows)})
        new, calls = {row: [0] for row in range(rows)}, Counter()
        sys.setprofile(lambda frame, event, arg: calls.update([event]))
        cache.can_grow()
        cache.grow()
        cache.tables(list(new))
        cache.usage()
        sys.setprofile(None)
        return calls

    assert work(8, 100) == work(512, 100) == work(8, 8000)
