"""Traces: who has which memory, step by step."""

import json
from itertools import pairwise

import pytest

from support import trace
from test_kvcache import BYTES_PER_TOKEN, NAIVE, PAGED, SCRIPTS, TIERED, VIRTUAL, run, text_of


def replayed(file):
    """The head of a trace, and each of its steps with all cells of its tiers."""
    head, *steps = map(json.loads, file.read_text().splitlines())
    cells = {name: {} for name in head["tiers"]}
    for step in steps:
        for name, changes in step["tiers"].items():
            for cell, *owner in changes:
                assert cells[name].get(cell) != tuple(owner), "nothing has changed here"
                cells[name][cell] = tuple(owner)
                if not owner:
                    del cells[name][cell]
        step["tiers"] = {name: dict(some) for name, some in cells.items()}
    return head, steps


TRACED = {
    "naive": (NAIVE, ["--max-seq-len", 50]),  # One request ends before the others.
    "virtual": (VIRTUAL, ["--kv-gb", 110 * 512 / 1e9, "--page-kb", 4]),
    "paged": (PAGED, ["--kv-gb", 110 * 512 / 1e9, "--block-size", 4]),
    "tiered": (TIERED, ["--kv-gb", 110 * 512 / 1e9, "--block-size", 4, "--turns", 2]),
    "window": (TIERED, ["--window", 9, "--sink", 4, "--block-size", 4]),
    "retrieval": (TIERED, ["--window", 9, "--top-k", 8, "--block-size", 4]),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_agrees_with_the_statistics(tmp_path, tiny, name):
    """In each step, what the cells add up to is what was sampled, however tight memory is."""
    said = [[text_of(n, seed=n), text_of(5, seed=n)] for n in (30, 3, 9, 41, 18)]
    script, options = TRACED[name]
    options = ["--trace", tmp_path / "trace", "--max-new-tokens", 20, *options]
    result = run(script, tiny, tmp_path, said, *options)
    assert bool(result["preemptions"]) == (name in ("virtual", "paged", "tiered"))
    head, steps = replayed(tmp_path / "trace")
    assert head["bytes_per_token"] == BYTES_PER_TOKEN and len(steps) == result["time"]["steps"]
    assert head["budget_bytes"] == result["kv"]["budget_bytes"]
    assert max(step["reserved_bytes"] for step in steps) == result["kv"]["peak_reserved_bytes"]
    assert all(now["seconds"] > old["seconds"] for old, now in pairwise(steps))
    in_dram = any(step["tiers"].get("DRAM") for step in steps)
    assert in_dram == (name in ("tiered", "retrieval"))
    for step in steps:
        for tier, (n_cells, size) in head["tiers"].items():
            assert all(0 <= cell < n_cells for cell in step["tiers"][tier])
            assert all(-1 <= tokens <= size for _, tokens in step["tiers"][tier].values())
        size, cells = head["tiers"]["HBM"][1], step["tiers"]["HBM"].values()
        in_use = [(request, tokens) for request, tokens in cells if tokens != trace.KEPT]
        reserved, used = (len(in_use) * size, sum(tokens for _, tokens in in_use))
        assert reserved * BYTES_PER_TOKEN == pytest.approx(step["reserved_bytes"])
        assert used * BYTES_PER_TOKEN == pytest.approx(step["used_bytes"], abs=9 * len(in_use))
        assert len({request for request, _ in in_use} - {trace.SHARED}) == step["running"]


def test_a_trace_by_hand(tmp_path, tiny):
    """Two requests of 5 and 4 tokens, three tokens each, in blocks of 4."""
    options = ["--trace", tmp_path / "trace", "--max-new-tokens", 3, "--block-size", 4]
    run(PAGED, tiny, tmp_path, ["abc", "de"], "--kv-gb", 8 * 512 * 4 / 1e9, *options)
    lines = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    assert lines[0]["tiers"] == {"HBM": [8, 4]}
    assert [line["tiers"]["HBM"] for line in lines[1:]] == [
        [[0, 0, 4], [1, 0, 1], [2, 1, 4]],
        [[1, 0, 2], [3, 1, 1]],
        [[1, 0, 3], [3, 1, 2]],
    ]


def test_a_trace_of_pages_by_hand(tmp_path, tiny):
    """Pages of 8 tokens; the second of request 0 comes before that of request 1."""
    options = ["--trace", tmp_path / "trace", "--max-new-tokens", 3, "--page-kb", 4]
    run(VIRTUAL, tiny, tmp_path, ["abcde", "fg"], *options)
    lines = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    assert [sorted(line["tiers"]["HBM"]) for line in lines[1:]] == [
        [[0, 0, 7], [1, 1, 4]],
        [[0, 0, 8], [1, 1, 5]],
        [[1, 0, 1], [2, 1, 6]],
    ]


def test_a_trace_of_shared_and_kept_blocks(tmp_path, tiny):
    """Two requests of 10 equal tokens in blocks of 4; the second conversation has another turn."""
    said, options = ["abcdefgh", ["abcdefgh", "i"]], ["--turns", 2, "--block-size", 4]
    options += ["--trace", tmp_path / "trace", "--max-new-tokens", 2]
    run(TIERED, tiny, tmp_path, said, *options)
    _, steps = replayed(tmp_path / "trace")
    first, second, third, later = (step["tiers"]["HBM"] for step in steps[:4])
    assert first == {0: (0, 4), 1: (0, 4), 2: (0, 2)}  # The second request waits for these two.
    assert second == {0: (trace.SHARED, 4), 1: (trace.SHARED, 4), 2: (0, 2), 3: (1, 2)}
    assert third == {**second, 2: (0, 3), 3: (1, 3)}
    assert later[0] == later[1] == (1, 4)


def test_a_trace_shows_who_waits_for_what_is_in_dram(tmp_path, tiny):
    """A preempted request's blocks have its number in DRAM, until nobody wants them any more."""
    said = [text_of(n, seed=n) for n in (30, 40, 35)]
    options = ["--trace", tmp_path / "trace", "--max-new-tokens", 40, "--block-size", 4]
    result = run(TIERED, tiny, tmp_path, said, "--kv-gb", 110 * 512 / 1e9, *options)
    assert result["preemptions"] and result["tiers"]["fetched"]
    _, steps = replayed(tmp_path / "trace")
    running = [
        {request for request, tokens in step["tiers"]["HBM"].values() if tokens != trace.KEPT}
        for step in steps
    ]
    waiting = [
        {request for request, _ in step["tiers"]["DRAM"].values()} - active - {trace.SHARED, None}
        for step, active in zip(steps, running, strict=True)
    ]
    assert any(waiting)
    assert any((None, trace.KEPT) in step["tiers"]["HBM"].values() for step in steps)
    for requests, later in zip(waiting, range(1, len(steps)), strict=False):
        assert all(any(r in active for active in running[later:]) for r in requests)


def test_untraced_runs_look_at_nothing(tmp_path, tiny, monkeypatch):
    for name in ("rows", "blocks", "pages", "tiers"):
        monkeypatch.setattr(trace, name, None)
    for script in SCRIPTS:
        run(script, tiny, tmp_path, ["a"], "--max-new-tokens", 2)
