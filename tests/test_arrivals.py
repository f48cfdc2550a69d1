"""Requests that arrive: --rate."""

import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from itertools import pairwise
from types import SimpleNamespace

import pytest

from support.prompts import arrive, read_requests
from test_kvcache import (
    BYTES_PER_TOKEN,
    HERE,
    NAIVE,
    NAMES,
    PAGED,
    SCRIPTS,
    TIERED,
    VIRTUAL,
    answers,
    run,
    text_of,
    tiny_prompt,
    write_prompts,
)


@pytest.fixture
def clock(monkeypatch):
    """The time, which passes only where somebody sleeps or a test says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    return clock


@pytest.fixture
def steps_of_a_second(clock, monkeypatch):
    """Makes each step of a script take a second, and requests come after these gaps."""

    def change(script, *gaps):
        def forward(*args, model=script.forward):
            clock.now += 1
            return model(*args)

        monkeypatch.setattr(script, "forward", forward)
        gaps = iter(gaps)
        monkeypatch.setattr(random.Random, "expovariate", lambda self, rate: next(gaps))

    return change


def test_who_has_come_joins_the_queue(clock):
    coming = deque(SimpleNamespace(arrived=100.0 + after) for after in (0, 0, 2, 3, 7))
    waiting = deque()
    joined = []
    for clock.now, running in ((100.0, False), (101.5, True), (103.0, True), (103.5, False)):
        arrive(coming, waiting, running)
        joined.append(len(waiting))
    assert joined == [2, 2, 4, 4] and clock.now == 103.5
    waiting.clear()
    arrive(coming, waiting, running=True)
    assert len(coming) == 1 and clock.now == 103.5
    arrive(coming, waiting, running=False)  # Nobody is here: it sleeps until somebody is.
    assert len(waiting) == 1 and clock.now == 107.0
    arrive(coming, waiting, running=False)
    assert clock.now == 107.0


def test_arrivals_are_poisson(tmp_path, clock):
    """Gaps as long, and as uneven, as those of a Poisson process; by --seed."""
    encoding = SimpleNamespace(encode=lambda *_, **__: [1], encode_ordinary=lambda text: [2])
    chat = dict.fromkeys(("begin", "user", "end", "assistant"), "")

    def gaps(rate, seed):
        prompts = write_prompts(tmp_path / "prompts.json", ["a"])
        args = SimpleNamespace(
            n=4000, prompts=prompts, max_new_tokens=9, max_seq_len=99, rate=rate, seed=seed
        )
        times = [100.0, *(request.arrived for request in read_requests(args, encoding, chat))]
        return [after - before for before, after in pairwise(times)]

    assert set(gaps(None, 0)) == {0}
    some = gaps(2.5, 0)
    assert min(some) >= 0 and some == gaps(2.5, 0) != gaps(2.5, 1)
    assert statistics.mean(some) == pytest.approx(0.4, rel=0.05)
    assert statistics.stdev(some) == pytest.approx(0.4, rel=0.08)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_the_same_answers_whenever_requests_come(tmp_path, tiny, script, steps_of_a_second):
    texts = [text_of(n, seed=n) for n in (14, 3, 9, 41, 27)]
    options = ["--kv-gb", 3 * 80 * BYTES_PER_TOKEN / 1e9, "--max-seq-len", 80]
    options += ["--max-new-tokens", 12]
    expected = [answers(run(script, tiny, tmp_path, [text], *options))[0] for text in texts]
    steps_of_a_second(script, 0.5, 3.2, 0, 4.4, 50)
    result = run(script, tiny, tmp_path, texts, *options, "--rate", 1)
    assert answers(result) == expected
    assert result["load"]["came"] == 5 and result["load"]["came_s"] == pytest.approx(57.6)
    assert result["time"]["idle_s"] > 20.5


@pytest.mark.parametrize(
    ("script", "running", "waiting", "first_tokens"),
    [
        (NAIVE, [2, 2, 2, 1, 1, 1], [0, 0, 1, 0, 0, 0], [1, 1, 2]),
        (VIRTUAL, [2, 2, 3, 3, 1], [0, 0, 0, 0, 0], [1, 1, 1]),
        (PAGED, [2, 2, 3, 3, 1], [0, 0, 0, 0, 0], [1, 1, 1]),
        (TIERED, [2, 2, 3, 3, 1], [0, 0, 0, 0, 0], [1, 1, 1]),
    ],
    ids=NAMES,
)
def test_arrivals_by_hand(
    tmp_path, tiny, steps_of_a_second, capsys, script, running, waiting, first_tokens
):
    """Two requests come after half a second, a third as their third step begins; 3 tokens each.

    A static batch lets it wait until they have ended. The others read its prompt in that step, and
    who decodes waits.
    """
    steps_of_a_second(script, 0.5, 0, 2)
    options = ["--rate", 1, "--max-new-tokens", 3, "--trace", tmp_path / "trace"]
    result = run(script, tiny, tmp_path, ["abc", "de", "fghi"], *options)
    load, clock = result["load"], result["time"]
    assert (load["running"], load["waiting"]) == (running, waiting)
    assert load["seconds"] == pytest.approx([1.5 + step for step in range(len(running))])
    assert clock["first_token_s"] == pytest.approx(first_tokens)
    assert clock["idle_s"] == pytest.approx(0.5)
    assert clock["tokens_per_s"] == pytest.approx(9 / load["seconds"][-1])
    row = f"3 in 2.0 s; {max(waiting)} waited at once at most; 0.5 s idle"
    assert f"\nArrivals           {row}\n" in capsys.readouterr().out
    _, *steps = map(json.loads, (tmp_path / "trace").read_text().splitlines())
    assert [step["waiting"] for step in steps] == [[2] * n for n in waiting]
    if script is NAIVE:  # The second batch is its own: row 0 is request 2's.
        assert steps[3]["tiers"]["HBM"] == [[0, 2, len(tiny_prompt("fghi"))], [1]]


def test_naive_refuses_only_what_never_fits(tmp_path, tiny, capsys):
    """With --rate more requests may come than there are rows, but one row there has to be."""
    options = ["--max-new-tokens", 2, "--max-seq-len", 64, "--rate", 1e6, "--kv-gb"]
    row = 64 * BYTES_PER_TOKEN / 1e9
    result = run(NAIVE, tiny, tmp_path, ["a", "b", "c"], *options, row)
    assert result["max_batch"]["peak"] == 1 and result["load"]["waited"] == 2
    with pytest.raises(SystemExit, match=r"^1 requests would reserve"):
        run(NAIVE, tiny, tmp_path, ["a", "b", "c"], *options, 0.9 * row)


@pytest.mark.parametrize("rate", ["0", "-2", "inf", "nan", "often"])
def test_rates_that_are_none(rate, capsys):
    with pytest.raises(SystemExit) as raised:
        PAGED.main(["1", f"--rate={rate}"])
    err = capsys.readouterr().err
    assert raised.value.code == 2 and err.count("\n") == 1 and "--rate: " in err


@pytest.mark.parametrize("script", ["naive", "paged"])
def test_interrupted_while_all_are_still_to_come(tmp_path, tiny, script):
    prompts = write_prompts(tmp_path / "prompts.json", ["hello"])
    command = [sys.executable, HERE / f"llama3-{script}.py", "3", "--model", tiny, "--rate", "0.01"]
    process = subprocess.Popen(
        [*command, "--prompts", prompts], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # Not so after "&".
    )  # fmt: skip
    process.stdout.readline()  # Printed before the first step.
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not err
    assert "\nArrivals           0 in 0.0 s; 0 waited at once at most; " in out
    assert out.splitlines()[-1].startswith("Fragmented Memory: ")
