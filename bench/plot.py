"""Draws the figures from the JSON files in bench/results/, beside them, as SVG.

    pip install -r bench/requirements.txt && python bench/plot.py

A strategy has the same color and the same hatching or line in all figures, so that they can be told
apart in grey, too.
"""

import argparse
import json
import math
import statistics
import sys

from common import RESULTS
from quality import BUCKET, CONTEXT
from tiers import UCM

INK = "#444444"
STRATEGIES = {  # Color; hatching of its bars; line and marker of its curves
    "naive": ("#c3cad2", "", "-", "s"),
    "virtual": ("#e0a526", "..", "-", "D"),
    "paged": ("#1f5fa8", "", "-", "o"),
    "tiered": ("#7a4fa3", "\\\\", "-", "p"),
    "window": ("#3f9b6d", "xx", "--", "^"),
    "retrieval": ("#b8443c", "++", "-.", "P"),
    "int8": ("#5b8fcf", "//", "-", "<"),
    "int4": ("#9cc0ea", "//", "-", ">"),
    "minicache": ("#cf9fc5", "oo", "-", "X"),
    "generate": ("white", "///", ":", "v"),
    "full": ("#222222", "", "-", "s"),
    "other": ("#9aa5b0", "", ":", "v"),
}


def bars(axis, values, labels, looks):
    """Horizontal bars {name: length}, the first on top. looks: a strategy for each."""
    colors, hatches, *_ = zip(*(STRATEGIES[look] for look in looks), strict=True)
    look = {"color": colors, "hatch": hatches, "edgecolor": INK}
    drawn = axis.barh(list(values), list(values.values()), **look)
    axis.bar_label(drawn, labels, padding=3)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.margins(x=0.2)


def line(axis, strategy, xs, ys, **others):
    color, _, style, marker = STRATEGIES[strategy]
    look = {"color": color, "linestyle": style, "marker": marker, "markersize": 4}
    axis.plot(xs, ys, **{**look, **others})


# --- Figures, each by the name of its benchmark ---------------------------------------------------


def compare(plt, result):
    """bench/compare.py"""
    rows = {name: row for name, row in result["strategies"].items() if "error" not in row}
    figure, (time, memory, batch) = plt.subplots(1, 3, figsize=(15, 3.6), layout="tight")
    labels = [f"{row['token_ms']:.0f} ({row['max_batch']} at once)" for row in rows.values()]
    bars(time, {name: row["token_ms"] for name, row in rows.items()}, labels, rows)
    time.margins(x=0.6)
    time.set(xlabel="milliseconds per token of an answer, median", title="Time per token")
    used = {name: row["used_bytes"] / 1e9 for name, row in rows.items()}
    wasted = [(row["reserved_bytes"] - row["used_bytes"]) / 1e9 for row in rows.values()]
    bars(memory, used, [""] * len(rows), rows)
    more = {"left": list(used.values()), "color": "#f4f4f4", "edgecolor": INK}
    labels = [f"{row['fragmented_of_reserved']:.1%}" for row in rows.values()]
    memory.bar_label(memory.barh(list(rows), wasted, **more), labels, padding=3)
    memory.set(xlabel="GB reserved; in color: used; %: fragmented", title="Memory")
    most = {name: row["most_at_once"] for name, row in rows.items()}
    labels = [f"{n} in 1/7 of it" if name == "tiered" else n for name, n in most.items()]
    bars(batch, most, labels, most)
    batch.set(xlabel="requests, none of which waits for another's end", title="Most at once")
    return figure


def serve(plt, result):
    """bench/serve.py"""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="tight")
    for name, rounds in result["rounds"].items():
        rates = [case["rate"] for case in rounds["0"]]
        by_rate = zip(*rounds.values(), strict=True)
        ms = [[case["normalized_ms"] for case in cases] for cases in by_rate]
        line(left, name, rates, list(map(statistics.median, ms)), label=name)
        color = STRATEGIES[name][0]
        left.fill_between(rates, list(map(min, ms)), list(map(max, ms)), color=color, alpha=0.2)
        if name in ("naive", "paged"):
            xs, *counts = zip(*rounds["0"][-2]["steps"], strict=True)
            for ys, style, what in zip(counts, ("-", ":"), ("running", "waiting"), strict=True):
                right.plot(xs, ys, style, color=color, drawstyle="steps", label=f"{name}, {what}")
    left.axhline(2 * statistics.median(ms[0]), color=INK, linewidth=0.8)  # Twice the idle system.
    left.set(xlabel="requests a second", ylabel="milliseconds", yscale="log")
    left.set(title="Normalized latency: from arrival to the end, per token")
    left.set_yticks(ticks := [20, 50, 100, 200, 500], ticks)
    right.set(xlabel="seconds", ylabel="requests", title=f"At {rates[-2]} requests a second")
    return figure


def peers(plt, result):
    """bench/peers.py"""
    engines = {name: row for name, row in result["engines"].items() if "49" in row}
    looks = {"llama3-paged": "paged", "llama3-virtual": "virtual", "llama3-naive": "naive"}
    loads = list(result["prompt_tokens"])
    figure, axes = plt.subplots(1, len(loads), figsize=(13, 3.2), sharey=True, layout="tight")
    for axis, load in zip(axes, loads, strict=True):
        speeds = {name: row.get(load, {}).get("tokens_per_s", 0) for name, row in engines.items()}
        labels = [f"{speed:.0f}" if speed else "-" for speed in speeds.values()]
        bars(axis, speeds, labels, [looks.get(name, "other") for name in speeds])
        axis.set(title=f"Prompts: {load}", xlabel="generated tokens/s")
    return figure


def tiers(plt, result):
    """bench/tiers.py"""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="tight")
    cases = result["first_token"]
    seconds = [case["seconds"] for case in cases]
    ucm = [1 + UCM.get((case["tokens"], case["requests"]), -1) for case in cases]
    series = {
        "80% in DRAM": ("tiered", [s["computed"] / s["DRAM"] for s in seconds]),
        "80% in HBM, the limit": ("generate", [s["computed"] / s["HBM"] for s in seconds]),
        "UCM's DRAM store": ("other", ucm),
    }
    for i, (label, (look, values)) in enumerate(series.items()):
        color, hatch, *_ = STRATEGIES[look]
        at = [x + 0.27 * (i - 1) for x in range(len(cases))]
        left.bar(at, values, 0.27, label=label, color=color, hatch=hatch, edgecolor=INK)
    left.set(ylabel="times sooner", xlabel="tokens x requests", title="First token", ylim=(0, 5.2))
    names = [f"{case['tokens'] // 1000}k x {case['requests']}" for case in cases]
    left.set_xticks(range(len(names)), names, fontsize=8)
    left.axhline(1, color=INK, linewidth=0.8)
    contexts = [case["context"] for case in result["resume"]]
    for way, look, style in (("swap", "tiered", "-"), ("recompute", "paged", "--")):
        ms = [case[way] * 1000 for case in result["resume"]]
        line(right, look, contexts, ms, label=way, linestyle=style)
    right.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="milliseconds")
    right.set(title="A preempted request's next token")
    right.set_xticks(contexts, [f"{n:,}" for n in contexts], fontsize=8)
    return figure


def quality(plt, result):
    """bench/quality.py"""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="tight")
    (text, kept), (needle, speed) = axes
    looks = {"full": "full", "window": "other", "4 sinks + window": "window",
             "sink + window": "window", "retrieval": "retrieval"}  # fmt: skip
    for case in result["perplexity"]:
        name = case["policy"]
        if case["window"] in (None, 512) and name in looks:
            xs = [BUCKET * (i + 1) for i in range(len(case["nats"]))]
            line(text, looks[name], xs, [math.exp(nats) for nats in case["nats"]], label=name)
    text.axvline(CONTEXT, color=INK, linewidth=0.8)  # The model's context ends.
    text.set(xlabel="tokens read", ylabel="perplexity", yscale="log")
    text.set(title="Text, HBM for 512 + sink")
    for name in dict.fromkeys(case["policy"] for case in result["kept"]):
        cases = [case for case in result["kept"] if case["policy"] == name]
        cases.sort(key=lambda case: case["bytes_a_token"])
        xs = [case["bytes_a_token"] for case in cases]
        line(kept, looks.get(name, name), xs, [case["kl"] for case in cases], label=name)
    kept.set(xlabel="bytes a token in HBM, of 4,096 tokens", ylabel="KL divergence, nats")
    kept.set(title="Next token against full attention", xscale="log", yscale="log")
    kept.set_xticks(ticks := [1500, 3000, 6000, 12000, 23040], [f"{n:,}" for n in ticks])
    for name, share in (("full", 1), ("sink + window", 4), ("retrieval", 4), ("retrieval", 8)):
        cases = [c for c in result["needle"] if (c["policy"], c["share"]) == (name, share)]
        within = sorted((c for c in cases if c["tokens"] <= CONTEXT), key=lambda c: c["tokens"])
        label = name if share == 1 else f"{name}, 1/{share} in HBM"
        more = {"linestyle": ":", "marker": "o", "markerfacecolor": "white"} if share == 8 else {}
        found = [statistics.mean(case["found"]) for case in within]
        line(needle, looks[name], [c["tokens"] for c in within], found, label=label, **more)
    needle.set(title="Needles in noise", xlabel="tokens", ylabel="found", ylim=(-0.05, 1.05))
    for name in ("full", "sink + window", "retrieval"):
        cases = [c for c in result["speed"] if (c["policy"], c["rows"]) == (name, 1)]
        xs = [case["context"] for case in cases]
        line(speed, looks[name], xs, [case["ms"] for case in cases], label=name)
    speed.set(xlabel="tokens of context", ylabel="milliseconds", xscale="log", yscale="log")
    speed.set(title="A decode step, HBM for 1,024 tokens")
    speed.set_xticks(xs, [f"{n // 1024}k" for n in xs])
    speed.set_yticks(ms := [25, 50, 100, 200, 400, 800], ms)
    return figure


FIGURES = {"compare": compare, "serve": serve, "peers": peers, "tiers": tiers, "quality": quality}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    try:
        import matplotlib
        from matplotlib import pyplot as plt
    except ImportError as error:
        sys.exit(f"{error}: pip install -r bench/requirements.txt")
    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "kv",  # The same figures are the same files.
        "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6,
    }  # fmt: skip
    for name, draw in FIGURES.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            figure = draw(plt, json.loads(file.read_text()))
            for axis in figure.axes:
                axis.minorticks_off()
                if axis.get_legend_handles_labels()[0]:
                    axis.legend(frameon=False, fontsize=8)
            figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
