"""What holds of the files themselves."""

from test_kvcache import *


# --- The repository -------------------------------------------------------------------------------


def sections(script):
    """A script's text by section, split at its banners."""
    parts = re.split(r"^# --- (.+?) -+$", (HERE / script).read_text(), flags=re.M)
    return dict(zip(["top", *parts[1::2]], parts[::2], strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("section", ["Arguments", "Llama 3"])
def test_repeated_sections_are_the_same(script, section):
    expected, found = sections("llama3-naive.py")[section], sections(script)[section]
    diff = difflib.unified_diff(
        expected.splitlines(), found.splitlines(), "llama3-naive.py", script, lineterm=""
    )
    assert expected == found, "\n".join(diff)


def test_files_stay_short():
    lines = {path.name: len(path.read_text().splitlines()) for path in HERE.glob("*.py")}
    assert lines["kvcache.py"] < 300
    assert all(lines[script] < 250 for script in SCRIPTS)
