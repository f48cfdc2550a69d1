"""Who owned which memory when: a page, with a slider, of what a script recorded with --trace FILE.

    python llama3-paged.py 49 --trace t && python bench/replay.py t                writes t.html
    python bench/replay.py naive.trace paged.trace --html memory.html              two, on one clock

The page (bench/replay.html, with the traces in it) needs nothing else: open it from disk. Memory
runs from left to right and line by line, HBM first, then DRAM as far as it was ever used.
"""

import argparse
import json
import sys
from pathlib import Path

PAGE = Path(__file__).with_suffix(".html")
FIGURES = ("seconds", "running", "reserved_bytes", "used_bytes")


def read(file):
    """The lines of a trace. Raises OSError or ValueError where it is none."""
    *lines, last = Path(file).read_text().split("\n")  # What is last was never completed.
    head, *steps = map(json.loads, lines or [last])
    try:
        numbers = [head["budget_bytes"], head["bytes_per_token"]]
        for step in steps:
            numbers += [step[name] for name in FIGURES] + step["waiting"]
            numbers += [cell for tier in head["tiers"] for cell, *_ in step["tiers"][tier]]
        sum(numbers)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not steps:
        raise ValueError("no steps")
    return [head, *steps]


def page(traces):
    """An HTML page that shows them side by side."""
    text = json.dumps(traces, separators=(",", ":"))
    return PAGE.read_text().replace("TRACES", text.replace("<", "\\u003c"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", metavar="FILE", help="one or two, as --trace writes")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the page (FILE.html)")
    args = parser.parse_args()
    target = args.html or Path(args.traces[0] + ".html")
    if len(args.traces) > 2 or str(target) in args.traces:
        parser.error("one or two traces, and another file for the page")
    traces = []
    for file in args.traces:
        try:
            traces.append(read(file))
        except (OSError, ValueError) as error:
            sys.exit(f"{file} is not a trace ({error}).")
    try:
        target.write_text(page(traces))
    except OSError as error:
        sys.exit(f"{target} cannot be written ({error.strerror}).")
    print(f"Open {target} in a browser.")


if __name__ == "__main__":
    main()
