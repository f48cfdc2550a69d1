"""What the benchmarks share: scripts as modules, processes apart, medians, tables, results."""

import argparse
import importlib.util
import json
import multiprocessing.util
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "bench" / "results"
sys.path.insert(0, str(REPO))


def arguments(doc, name):
    """A parser of what every benchmark takes; it writes bench/results/NAME.json."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", metavar="FILE")
    parser.add_argument("--show", action="store_true", help="print what FILE has, measure nothing")
    return parser


# --- Scripts --------------------------------------------------------------------------------------


def load_script(name):
    """The module in a script whose name cannot be imported."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), REPO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(script, n, *options):
    """What a script, a module, writes as JSON about n requests."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        script.main([str(option) for option in (n, *options, "--json", out)])
        return json.loads(out.read_text())


# --- Measuring ------------------------------------------------------------------------------------


def apart(function, *args):
    """What function(*args) returns in a process of its own, which is silent, and its peak memory.

    In bytes. (A process counts as at least as large as its parent was when it began: those who call
    this stay small.) Raises RuntimeError if the function fails or its process dies.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(child, function, *args).result()
        except SystemExit as refused:
            raise RuntimeError(str(refused)) from refused
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def child(function, *args):
    """The other side of apart()."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    # Some engines' threads do not end by themselves.
    multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=100)
    result = function(*args)
    unit = 1 if sys.platform == "darwin" else 1024
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def median(values):
    """Of numbers, of an even number of them the lower of the two in the middle; of dicts with the
    same keys, a dict of medians; of others, the first."""
    if isinstance(values[0], dict):
        return {key: median([value[key] for value in values]) for key in values[0]}
    return statistics.median_low(values) if isinstance(values[0], int | float) else values[0]


def in_turn(ways, rounds, measure):
    """{way: median of measure(way)}. They take turns: a slow minute does not meet one alone."""
    measured = {way: [] for way in ways}
    for _ in range(rounds):
        for way, values in measured.items():
            values.append(measure(way))
    return {way: median(values) for way, values in measured.items()}


# --- Results --------------------------------------------------------------------------------------


def facts():
    """Machine, versions, commit and date, for the head of every result."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(": ")[1] for x in lines if x.startswith("model name")), cpu)
    git = ["git", "-C", REPO, "rev-parse", "--short", "HEAD"]
    return {
        "machine": f"{cpu}, {torch.get_num_threads()} cores, {platform.system()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "date": str(date.today()),
    }


def earlier(path, asked=None):
    """What an earlier run wrote there; ends the program where it was not asked for the same."""
    result = json.loads(path.read_text()) if path.exists() else {"asked": asked}
    if asked and result["asked"] != asked:
        sys.exit(f"{path} is about {result['asked']}: give another --json.")
    return result


def save(path, result):
    """Write the result, with the facts at its head, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whoever is interrupted has the old file or the new one.
    whole = path.with_name(path.name + ".new")
    whole.write_text(json.dumps({**facts(), **result}, indent=1) + "\n")
    whole.replace(path)


def table(rows):
    """Print dicts as rows below their keys: numbers that are not whole with three digits."""
    if not rows:
        return print("Not measured.")
    titles = [*dict.fromkeys(title for row in rows for title in row)]
    lines = [titles, *([cell(row.get(title)) for title in titles] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *padded]))


def cell(value):
    if isinstance(value, float):
        return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else value
