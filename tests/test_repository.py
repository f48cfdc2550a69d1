"""What holds of the files themselves: how long they are, what is repeated, what imports what."""

import ast
import difflib
import re
import shlex
import shutil
import subprocess

import pytest

from test_kvcache import HERE, NAMES, SCRIPTS

FILES = [f"llama3-{name}.py" for name in NAMES]
NAIVE, VIRTUAL, PAGED, TIERED = FILES


def text_of_file(name):
    return (HERE / name).read_text()


def n_lines(path):
    return len(path.read_text().splitlines())


# --- Budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "most"),
    [(NAIVE, 170), (VIRTUAL, 170), (PAGED, 170), (TIERED, 210),
     ("kvcache.py", 299), ("test_kvcache.py", 700)],
)  # fmt: skip
def test_files_stay_short(name, most):
    assert n_lines(HERE / name) <= most


def test_folders_stay_small():
    """The first two are read by those who want to know more, the third by those who measure."""
    lines = {}
    for folder in ("caches", "support", "bench"):
        lines[folder] = {path.name: n_lines(path) for path in (HERE / folder).glob("*.py")}
    beside = lines["caches"] | lines["support"]
    assert {name: n for name, n in beside.items() if n >= 200} == {}
    totals = {folder: sum(lines[folder].values()) for folder in lines}
    assert totals["caches"] + totals["support"] < 2000, totals
    assert totals["bench"] < 1600, totals


def test_the_readme_is_read_in_one_sitting():
    assert len(text_of_file("README.md").split()) <= 2000


@pytest.mark.skipif(not shutil.which("diff"), reason="needs diff")
@pytest.mark.parametrize(("old", "new", "most"), [(NAIVE, PAGED, 110), (PAGED, TIERED, 80)])
def test_a_diff_shows_the_lesson_and_little_else(old, new, most):
    """Lines that go or come. README.md tells its readers to look at these."""
    diff = subprocess.run(["diff", HERE / old, HERE / new], capture_output=True, text=True)
    changed = [line for line in diff.stdout.splitlines() if line[:1] in "<>"]
    assert 20 < len(changed) <= most


# --- Copies ---------------------------------------------------------------------------------------

REPEATED = {
    "what is not handled": r"^Not handled: .*?\n\"\"\"\n",
    "notation": r"^# Throughout this program\n(#[^\n]*\n)+",
    "Llama 3": r"^# --- Llama 3 -+\n.*?(?=^# ---)",
    "the call": r"^if __name__ == .*\Z",
}


@pytest.mark.parametrize("script", FILES[1:])
@pytest.mark.parametrize("part", REPEATED)
def test_what_is_repeated_is_the_same(script, part):
    copies = []
    for name in (NAIVE, script):
        (match,) = re.finditer(REPEATED[part], text_of_file(name), re.M | re.S)
        copies.append(match[0].splitlines(keepends=True))
    if diff := "".join(difflib.unified_diff(*copies, NAIVE, script)):
        pytest.fail(diff, pytrace=False)


# --- Imports --------------------------------------------------------------------------------------


def imported(path):
    """The modules that a file imports, at its top or anywhere else."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_run_down_only():
    """script -> caches -> kvcache.py -> support -> torch, and in support in no circle."""
    layers = [[*HERE.glob("llama3-*.py")], [*(HERE / "caches").glob("*.py")],
              [HERE / "kvcache.py"], [*(HERE / "support").glob("*.py")]]  # fmt: skip
    own = {path.name.removesuffix(".py") for path in HERE.iterdir()}
    below = [{"caches", "kvcache", "support"}] * 2 + [{"support"}] * 2
    for paths, allowed in zip(layers, below, strict=True):
        assert paths
        for path in paths:
            tops = {name.split(".")[0] for name in imported(path)}
            assert (tops & own) <= allowed, path.name
            assert "importlib" not in tops, f"{path.name} imports what this test does not see"
    uses = {f"support.{path.stem}": imported(path) for path in layers[3]}
    while uses:  # Take away who uses none of the others: in the end nobody is left.
        last = [name for name, used in uses.items() if not used & set(uses)]
        assert last, f"in a circle: {sorted(uses)}"
        uses = {name: used for name, used in uses.items() if name not in last}


def test_nothing_else_is_at_the_top():
    listed = subprocess.run(["git", "-C", HERE, "ls-files"], capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("no git checkout")
    files = {".ci", ".gitignore", "LICENSE", "README.md", "requirements.txt", "ruff.toml",
             "sharegpt-filtered.json", "kvcache.py", "test_kvcache.py", *FILES}  # fmt: skip
    folders = {"bench", "caches", "docs", "models", "support", "tests"}
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} == files | folders


# --- What the text says ---------------------------------------------------------------------------


def commands(text):
    """[file, arguments] of each command that a text tells its readers to run."""
    found = re.findall(r"python ((?:bench/|models/)?[\w-]+\.py)\b([^`#\n]*?)(?=  |`|#|\n)", text)
    return [(name, shlex.split(arguments)) for name, arguments in found]


@pytest.mark.parametrize("name", ["README.md", *FILES])
def test_commands_in_the_text_can_be_run(tmp_path, monkeypatch, name):
    found = commands(text_of_file(name))
    monkeypatch.chdir(tmp_path)  # --json and --trace open their files.
    assert len(found) >= 2
    for script, arguments in found:
        assert (HERE / script).exists()
        if script in FILES:
            SCRIPTS[FILES.index(script)].parser.parse_args(arguments)


@pytest.mark.parametrize("page", ["README.md", "bench/README.md"])
def test_links_in_the_text_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", text_of_file(page)):
        assert target.startswith("https://") or (HERE / page).parent.joinpath(target).exists()
    for file in re.findall(
        r"`((?:bench|caches|docs|models|support|tests)/[\w./-]+)`", text_of_file(page)
    ):
        assert (HERE / file).exists(), file
