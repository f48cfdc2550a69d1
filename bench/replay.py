"""Who owned which memory when: shows what a script has recorded with --trace FILE.

    python llama3-paged.py 49 --trace t && python bench/replay.py t
    python bench/replay.py naive.trace paged.trace                      two, on a common clock
    python bench/replay.py naive.trace paged.trace --html memory.html   a page that works from disk

In the terminal it plays by itself, and Ctrl-C ends it; --at SECONDS shows one moment. Memory runs
from left to right and line by line, HBM first, then DRAM as far as it was ever used. A character is
two spots of it, one above the other.
"""

import argparse
import colorsys
import json
import math
import os
import shutil
import sys
import time
from bisect import bisect_right
from pathlib import Path

SHARED, KEPT = -1, -1  # As in owners.py.
WHITE, GREY, BLACK = 231, 245, 234  # Of xterm's colors.
TEMPLATE = Path(__file__).with_suffix(".html")


class Replay:
    """A trace, and who has the cells of its tiers at the end of one of its steps."""

    def __init__(self, file):
        *lines, last = Path(file).read_text().split("\n")  # What is last was never completed.
        self.head, *self.steps = map(json.loads, lines or [last])
        if not self.steps:
            raise ValueError("no steps")
        self.times = [step["seconds"] for step in self.steps]
        self.slots = {"HBM": self.head["budget_bytes"] / self.head["bytes_per_token"]}
        if "DRAM" in self.head["tiers"]:  # Up to the last cell that is ever used.
            used = [cell + 1 for step in self.steps for cell, *_ in step["tiers"]["DRAM"]]
            self.slots |= {"DRAM": max(used) * self.head["tiers"]["DRAM"][1]} if used else {}
        self.at, self.cells = -1, {name: {} for name in self.head["tiers"]}
        self.seek(math.inf)

    def seek(self, seconds):
        """Go to the last step that had ended then, or to the first one."""
        target = max(0, bisect_right(self.times, seconds) - 1)
        if target < self.at:
            self.at, self.cells = -1, {name: {} for name in self.cells}
        for step in self.steps[self.at + 1 : target + 1]:
            for name, changes in step["tiers"].items():
                self.cells[name] |= {cell: owner for cell, *owner in changes}
        self.at, self.ended = target, seconds > self.times[-1]

    def spots(self, tier, n):
        """The colors of n spots, evenly spread over a tier."""
        size = self.head["tiers"][tier][1]
        for i in range(n):
            cell, slot = divmod((i + 0.5) * self.slots[tier] / n, size)
            yield color(slot, *(self.cells[tier].get(int(cell)) or (None, 0)))

    def readout(self):
        """What there is to know of a step, in short lines but for the command."""
        step, head = self.steps[self.at], self.head
        reserved, used = step["reserved_bytes"], step["used_bytes"]
        running = "ended" if self.ended else f"{step['running']} running"
        return [
            head["command"],
            f"step {self.at + 1} of {len(self.steps)}, {running}",
            f"reserved {reserved / 1e9:.3f} of {head['budget_bytes'] / 1e9:.3f} GB",
            f"used {used / 1e9:.3f} GB, {1 - used / (reserved or 1):.1%} fragmented",
        ]


# --- Terminal -------------------------------------------------------------------------------------


def color(slot, request, tokens):
    """For a slot in a cell: one of xterm's 256 colors."""
    if request is None:
        return GREY if tokens == KEPT else BLACK
    if request == SHARED:
        return WHITE
    light, saturation = (0.6, 0.8) if slot < tokens else (0.17, 0.7)  # Filled, reserved but empty.
    if tokens == KEPT:
        light, saturation = 0.45, 0.2
    # Steps of the golden angle: neighbors differ, however many there are.
    levels = colorsys.hls_to_rgb(request * 0.381966 % 1, light, saturation)
    red, green, blue = (round(5 * level) for level in levels)
    return 16 + 36 * red + 6 * green + blue


def character(upper, lower):
    """Two spots in these colors, one above the other."""
    return f"\033[38;5;{upper};48;5;{lower}m▀\033[0m"


def panel(replay, width, height):
    """A trace as `height` lines, each as wide as `width` characters."""
    lines = [line[:width].ljust(width) for line in replay.readout()]
    room = height - len(lines) - len(replay.slots)
    for tier, n in replay.slots.items():
        lines.append(f"{tier}, {n * replay.head['bytes_per_token'] / 1e9:.2f} GB".ljust(width))
        rows = max(1, math.floor(room * n / sum(replay.slots.values())))
        spots = list(replay.spots(tier, 2 * rows * width))
        for row in range(rows):
            upper, lower = (spots[i * width : (i + 1) * width] for i in (2 * row, 2 * row + 1))
            lines.append("".join(map(character, upper, lower)))
    return lines[:height] + [" " * width] * (height - len(lines))


def frame(replays, seconds):
    """All traces side by side, at a moment of their common clock."""
    columns, height = shutil.get_terminal_size()
    width = (columns - 2 * (len(replays) - 1)) // len(replays)
    for replay in replays:
        replay.seek(seconds)
    panels = [panel(replay, width, height - 2) for replay in replays]
    boxes = {
        "a request": character(color(0, 1, 1), color(0, 3, 1)),
        "reserved, but empty": character(color(0, 1, 0), color(0, 3, 0)),
        "kept, not in use": character(GREY, color(0, 1, KEPT)),
        "shared": character(WHITE, BLACK),
    }
    legend = "  ".join(f"{box} {name}" for name, box in boxes.items())
    lines = ["  ".join(parts) for parts in zip(*panels, strict=True)]
    return "\n".join([*lines, f"{seconds:6.1f} s  {legend if columns > 75 else ''}"])


def play(replays, speed):
    """Show everything, `speed` times as fast as it was; every tenth of a second, a frame."""
    end = max(replay.times[-1] for replay in replays)
    start = time.perf_counter()
    print("\033[?25l\033[2J", end="")  # Hides the cursor, clears the screen.
    try:
        seconds = 0
        while seconds < end:
            seconds = min(end, (time.perf_counter() - start) * speed)
            print("\033[H" + frame(replays, seconds), end="", flush=True)
            time.sleep(0.1)
    finally:
        print("\033[?25h")


# --- Page -----------------------------------------------------------------------------------------


def page(replays):
    """An HTML page that needs nothing else."""
    traces = json.dumps([[replay.head, *replay.steps] for replay in replays], separators=(",", ":"))
    return TEMPLATE.read_text().replace("TRACES", traces.replace("<", "\\u003c"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("traces", nargs="+", metavar="FILE", help="one or two, as --trace writes them")
    add("--html", type=Path, metavar="FILE", help="write a page instead")
    add("--at", type=float, metavar="SECONDS", help="show this moment only")
    add("--speed", type=float, metavar="X", help="times as fast as it was (all of it in 20 s)")
    args = parser.parse_args()
    if len(args.traces) > 2 or str(args.html) in args.traces:
        parser.error("one or two traces, and another file for the page")
    if not ((args.at or 0) >= 0 and (args.speed or 1) > 0 and args.speed != 0):
        parser.error("--at and --speed are numbers above 0")
    replays = []
    for file in args.traces:
        try:
            replays.append(Replay(file))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            sys.exit(f"{file} is not a trace ({type(error).__name__}: {error}).")
    if args.html:
        try:
            args.html.write_text(page(replays))
        except OSError as error:
            sys.exit(f"{args.html} cannot be written ({error.strerror}).")
        return
    sys.stdout.reconfigure(errors="replace")  # Whatever the terminal can show.
    if args.at is not None:
        print(frame(replays, args.at), flush=True)
    elif sys.stdout.isatty():
        play(replays, args.speed or max(replay.times[-1] for replay in replays) / 20)
    else:
        sys.exit("This is not a terminal to play in: give --at SECONDS or --html FILE.")


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or `| head` has seen enough.
        os._exit(130)
