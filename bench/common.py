"""What the benchmarks share: scripts as modules, facts about the machine, saved results."""

import importlib.util
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "bench" / "results"
sys.path.insert(0, str(REPO))


def load_script(name):
    """The module in a script whose name cannot be imported."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), REPO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def save(path, result):
    """Write the result, with the facts at its head, as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whoever is interrupted has the old file or the new one.
    whole = path.with_name(path.name + ".new")
    whole.write_text(json.dumps({**facts(), **result}, indent=1) + "\n")
    whole.replace(path)
