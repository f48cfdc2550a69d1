"""The command line, and how a run ends before its time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from support import arguments
from test_kvcache import CHAT, HERE, NAMES, PAGED, SCRIPTS, make_checkpoint, write_prompts


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "-0.1", "1e9", "warm"])
def test_temperatures_that_are_none(tmp_path, script, number, capsys):
    with pytest.raises(SystemExit) as raised:
        script.main(["1", f"--temperature={number}"])
    err = capsys.readouterr().err
    assert raised.value.code == 2 and err.count("\n") == 1 and "--temperature: " in err


def test_a_mistake_leaves_files_as_they_are(tmp_path):
    """Those to be written are opened early, to see whether they can be; nothing is in them yet."""
    file = write_prompts(tmp_path / "prompts.json", ["hello"])
    before = file.read_bytes()
    for mistake in (["--temperature", "nan"], ["--prompts", str(file)]):
        with pytest.raises(SystemExit):
            PAGED.main(["1", "--json", str(file), "--trace", str(tmp_path / "trace"), *mistake])
        assert file.read_bytes() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_runs_that_end_early_have_no_traceback(monkeypatch, error):
    """Ctrl-C, and a pipe that nobody reads any more."""
    exits, before = [], signal.getsignal(signal.SIGTERM)

    def main():
        raise error

    monkeypatch.setattr(os, "_exit", exits.append)
    try:
        arguments.run(main)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert exits == [130]


def test_a_killed_run_reports(tmp_path):
    """kill in the middle of a run: statistics and answers so far, as after Ctrl-C."""
    endless = make_checkpoint(tmp_path / "model", chat={**CHAT, "stop": []})
    prompts = write_prompts(tmp_path / "prompts.json", ["hello"])
    command = [sys.executable, HERE / "llama3-paged.py", "3", "--model", endless]
    command += ["--prompts", prompts, "--json", tmp_path / "out.json", "--max-new-tokens", "8000"]
    command += ["--trace", tmp_path / "trace"]
    (tmp_path / "trace").touch()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while (tmp_path / "trace").read_text().count("\n") < 9:  # Until it is in its eighth step.
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert out.splitlines()[-1].startswith("Fragmented Memory: ")
    result = json.loads((tmp_path / "out.json").read_text())
    lengths = [len(response["tokens"]) for response in result["responses"]]
    assert sum(lengths) == result["generated_tokens"] and 7 <= min(lengths) <= max(lengths) < 8000
