"""Draws what `bench_store_policy.py --json` has found.

python tests/benchmarks/draw_store_policy.py rows.json picture.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOMS = {
    None: ("no limit", "tab:blue"),
    1 / 4: ("a quarter", "tab:orange"),
    1 / 16: ("a sixteenth", "tab:red"),
}
"""Room of the tier, of the bytes that dense stores: how it is called and drawn."""


_APART = 15
"""Percent of bytes between two names of points."""


def mean(rows: list[dict], model: str, room: float | None, policy: str) -> tuple[float, float]:
    """Bytes written and hits, in percent of dense without a limit, over all loads."""
    mine = [row for row in rows if (row["model"], row["room"], row["policy"]) == (model, room, policy)]
    written, hits = (statistics.mean(row[key] for row in mine) for key in ("all", "hits"))
    return 100 * written, 100 * hits


def draw(axis: plt.Axes, rows: list[dict], model: str) -> None:
    distances = sorted({int(row["policy"]) for row in rows if row["policy"].isdigit()} - {0})
    policies = ["0", *map(str, reversed(distances))]
    for room, (_, colour) in ROOMS.items():
        line = [mean(rows, model, room, policy) for policy in policies]
        axis.plot(*zip(*line, strict=True), "-", color=colour, marker="o", ms=4, lw=1, zorder=2)
        axis.plot(*mean(rows, model, room, "dense"), "s", color=colour, ms=8, mfc="white", zorder=3)
        axis.plot(*mean(rows, model, room, "default"), "*", color=colour, ms=14, zorder=4)
    shown = float("-inf")
    for policy, point in zip(policies, line, strict=True):
        if point[0] - shown > _APART:
            shown = point[0]
            axis.annotate(policy, point, textcoords="offset points", xytext=(0, -13), fontsize=7, ha="center")
    axis.set_title(model, fontsize=10)
    axis.set_ylim(0, 105)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("found", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    rows = json.loads(arguments.found.read_text())
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        1, len(models), figsize=(3.6 * len(models), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes.flat, models, strict=True):
        draw(axis, rows, model)
        axis.set_xlabel("bytes written (% of dense)")
    axes[0][0].set_ylabel("tokens found (% of dense without a limit)")
    marks = [
        plt.Line2D(
            [], [], color="0.3", marker="o", ms=4, lw=1, label="boundaries, every so many tokens (0: none)"
        ),
        plt.Line2D([], [], color="0.3", marker="*", ms=12, ls="", label="the default"),
        plt.Line2D([], [], color="0.3", marker="s", ms=8, mfc="white", ls="", label="dense"),
    ]
    marks += [
        plt.Line2D([], [], color=colour, lw=3, label=f"room: {name}") for name, colour in ROOMS.values()
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8, frameon=False)
    figure.savefig(arguments.picture, dpi=100)


if __name__ == "__main__":
    main()
