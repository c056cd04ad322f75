"""Draws what `gpu_timeline.py --json` noted of one restored prompt, and what the GPU did meanwhile.

    python tests/benchmarks/draw_timeline.py FILE.json [TRACE.json.gz] PICTURE.png
        [--name NAME] [--beside OTHER.json [OTHERTRACE.json.gz]] [--beside-name NAME]

With a trace, of the folder given to `--profile`, it is the prompt asked under torch's profiler; without one,
the quickest of the restored ones. Prints what the trace says in numbers, too.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

_LEAST_BYTES = 64 << 10  # Smaller copies are the model's inputs and outputs, not pages.
_SHOWN = _IN, _OUT, _PAGES, _MODEL = "copies into the GPU", "copies out", "page kernels", "model's kernels"
_OTHER = "other"
_GPU = (*_SHOWN, _OTHER)
_HOST = ("engine's thread", "connector,\nengine's thread", "mover's thread")
_STEPS = ("schedule", "execute", "sample", "update")
COLOURS = {
    "schedule": "#f2c14e", "execute": "#a9c4e6", "sample": "#b8dba5", "update": "#d9bfe0",
    "match": "#8c6d31", "allocated": "#c9a15a", "plan": "#e07b39", "outcomes": "#9467bd",
    "begin": "#5f9fdb", "enqueue in": "#f08a80", "enqueue out": "#c0504d",
    "collect": "#a3a3a3", "wait": "#d3d3d3", "poll": "#6cbcb9",
    _IN: "#d1495b", _OUT: "#7b4fa3", _PAGES: "#e8a33d", _MODEL: "#3f8f4f",
}  # fmt: skip
"""Of a span by what follows its "ours: " or "native: ", and of a row of the GPU."""


class Bar(NamedTuple):
    start: float  # Both in ms after the question.
    stop: float
    what: str
    bytes: int = 0


class Panel(NamedTuple):
    title: str
    answer: float
    rows: dict[str, list[Bar]]


def on_gpu(trace: Path, clock: int) -> dict[str, list[Bar]]:
    """Everything a trace says ran on the GPU, by row; `clock` is the Unix time of the question, in ns."""
    with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as file:
        found = json.load(file)
    offset_ns = int(found.get("baseTimeNanoseconds", 0)) - clock
    rows: dict[str, list[Bar]] = {row: [] for row in _GPU}
    for event in found["traceEvents"]:
        kind = event.get("cat")
        if event.get("ph") != "X" or kind not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        name, size = event["name"], int(event.get("args", {}).get("bytes", 0))
        row = _OTHER
        if kind == "kernel":
            row = _PAGES if "move_pages_kernel" in name else _MODEL
        elif size >= _LEAST_BYTES:
            row = _IN if "HtoD" in name else _OUT if "DtoH" in name else _OTHER
        start = (event["ts"] * 1000 + offset_ns) / 1e6
        rows[row].append(Bar(start, start + event["dur"] / 1e3, name, size))
    return {row: sorted(bars) for row, bars in rows.items()}


def load(paths: list[Path], name: str | None) -> Panel:
    """One prompt, of a file of `gpu_timeline.py` and maybe the trace of the same prompt."""
    file, *trace = paths
    kinds = json.loads(file.read_text())
    kind = "profiled" if trace else "restored"
    if not kinds.get(kind):
        raise SystemExit(f"{file} has no {kind!r} prompt" + (", which its trace belongs to" if trace else ""))
    chosen = min(kinds[kind], key=lambda found: found["end"] - found["begin"])
    begin, answer = chosen["begin"], (chosen["end"] - chosen["begin"]) / 1e6
    steps, threads = [], {"MainThread": [], "kvbm-transfer": []}
    for what, thread, start, stop in sorted(chosen["spans"], key=lambda span: (span[2], -span[3])):
        owner, _, part = what.rpartition(": ")
        bar = Bar((start - begin) / 1e6, (stop - begin) / 1e6, part)
        if thread == "MainThread" and part in _STEPS:
            steps.append(bar)
        elif owner in ("ours", "native") and thread in threads:
            threads[thread].append(bar)
    rows = dict(zip(_HOST, (steps, *threads.values()), strict=True))
    if trace:
        rows |= on_gpu(trace[0], chosen["clock"])
    how = "under torch's profiler" if trace else f"quickest of {len(kinds[kind])}"
    return Panel(f"{name or file.stem}: {answer:.1f} ms to the first token ({how})", answer, rows)


def union(bars: list[Bar], until: float) -> list[tuple[float, float]]:
    """The times between the question and `until` in which any of them ran."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted((max(bar.start, 0.0), min(bar.stop, until)) for bar in bars):
        if merged and start <= merged[-1][1]:
            start, stop = merged[-1][0], max(stop, merged.pop()[1])
        if start < stop:
            merged.append((start, stop))
    return merged


def tell(panel: Panel) -> None:
    print(panel.title)
    until, rows = panel.answer, panel.rows
    meant = {row: [bar for bar in rows.get(row, ()) if bar.stop > 0 and bar.start < until] for row in _GPU}
    active = union([bar for bars in meant.values() for bar in bars], until)
    if not active:
        return print("  nothing known of the GPU: no trace, or that of another prompt")
    for row in filter(meant.get, _SHOWN):
        first, last = meant[row][0].start, max(bar.stop for bar in meant[row])
        busy = sum(stop - start for start, stop in union(meant[row], until))
        size = sum(bar.bytes for bar in meant[row])
        rate = f"; {size / 1e6:.1f} MB at {size / (last - first) / 1e6:.1f} GB/s" if size else ""
        print(f"  {row}: {len(meant[row])}, first began at {first:.2f}, last ended at {last:.2f} ms{rate};")
        print(f"    busy for {busy:.2f} ms, {busy / until:.0%} of the time from question to answer")
    small = [bar.stop - bar.start for bar in meant[_OTHER] if "HtoD" in bar.what or "DtoH" in bar.what]
    print(f"  left out, as under {_LEAST_BYTES >> 10} KiB: {len(small)} copies, {sum(small):.2f} ms")
    edges = [0.0, *(edge for times in active for edge in times), until]
    told = [f"{a:.2f} to {b:.2f} ms" for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 1]
    return print("  GPU idle for over 1 ms:", ", ".join(told) or "never")


def nested(bars: list[Bar]) -> list[list[Bar]]:
    """Bars by how many others they run inside of, all in the order of their starts."""
    levels: list[list[Bar]] = [[]]
    for bar in bars:
        depth = sum(bool(level) and level[-1].stop > bar.start for level in levels)
        levels[depth:] = levels[depth:] or [[]]
        levels[depth].append(bar)
    return levels


def draw(axis: plt.Axes, panel: Panel, width: float) -> None:
    rows = {row: bars for row, bars in panel.rows.items() if row != _OTHER}
    for at, (row, bars) in enumerate(rows.items()):
        shown = [bar for bar in bars if bar.stop > 0 and bar.start < width]
        levels = nested(shown) if row in _HOST else [shown]
        height, edge = 0.84 / len(levels), 0.2 if row in (_IN, _OUT, _MODEL) else 0.9
        if not shown:
            axis.text(width * 0.004, at, "none", va="center", color="0.5", fontsize=8)
        for depth, level in enumerate(levels):
            top = at - 0.42 + depth * height
            times = [(bar.start, bar.stop - bar.start) for bar in level]
            colours = [COLOURS.get(row) or COLOURS.get(bar.what, "0.3") for bar in level]
            axis.broken_barh(times, (top, height), fc=colours, ec=colours, lw=edge, zorder=1.6)
            for start, stop, what, _ in level if row in _HOST else ():
                seen = min(stop, width) - start
                if seen > width * 0.005 * (len(what) + 1):
                    axis.text(start + seen / 2, top + height / 2, what, ha="center", va="center", fontsize=8)
    axis.axvline(panel.answer, color="0.2", lw=1, ls="--")
    axis.text(panel.answer, -0.62, "answer", ha="center", va="bottom", fontsize=8)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_title(panel.title, loc="left", fontsize=11)
    axis.tick_params("both", left=False, labelbottom=True)
    axis.grid(axis="x", alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="what gpu_timeline.py --json wrote")
    parser.add_argument("trace", type=Path, nargs="?", help="*.pt.trace.json.gz that --profile wrote with it")
    parser.add_argument("picture", type=Path, help="where to draw, *.png")
    parser.add_argument("--name", help="what to call it; the file's name if left out")
    parser.add_argument("--beside", type=Path, nargs="+", metavar=("FILE", "TRACE"), help="one to draw below")
    parser.add_argument("--beside-name", metavar="NAME", help="what to call that one")
    arguments = parser.parse_args()
    if arguments.picture.suffix != ".png" or len(arguments.beside or ()) > 2:
        parser.error("give FILE, maybe its TRACE, PICTURE.png, and only then --beside FILE, maybe its TRACE")
    panels = [load([path for path in (arguments.file, arguments.trace) if path], arguments.name)]
    if arguments.beside:
        panels.append(load(arguments.beside, arguments.beside_name))
    width = max(panel.answer for panel in panels) * 1.03
    heights = [len(panel.rows) - (_OTHER in panel.rows) + 1 for panel in panels]
    size = (15, 1.4 + 0.5 * sum(heights))
    figure, axes = plt.subplots(
        len(panels), sharex=True, squeeze=False, figsize=size, height_ratios=heights, layout="constrained"
    )
    for panel, axis in zip(panels, axes.flat, strict=True):
        tell(panel)
        draw(axis, panel, width)
    axis.set(xlim=(0, width), xlabel="ms after the question")
    named = {bar.what for panel in panels for row in _HOST for bar in panel.rows[row] if bar.start < width}
    known = [Patch(color=COLOURS[what], label=what) for what in COLOURS if what in named]
    figure.legend(handles=known, loc="outside lower center", ncols=len(known), fontsize=8, frameon=False)
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
