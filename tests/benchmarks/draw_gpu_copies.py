"""Draws what `gpu_copies.py --json` has measured.

python tests/benchmarks/draw_gpu_copies.py copies.json picture.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

LINES = {
    "link": ("the link, one contiguous copy", "0.6", "--"),
    "staged": ("kernel + staging + DMA", "tab:blue", "-"),
    "kernel:32": ("kernel alone, 32 programs", "tab:green", "-"),
    "dma": ("DMA page by page", "tab:orange", "-"),
    "vLLM swap_blocks_batch": ("vLLM's swap_blocks_batch", "tab:red", "-"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("measured", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    found = json.loads(arguments.measured.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for way, axis in enumerate(axes):
        for name, (label, colour, style) in LINES.items():
            points = [(row["page"], (row | row["rows"]).get(name)) for row in found]
            there = [(page, rates[way]) for page, rates in points if rates]
            if there:
                axis.plot(*zip(*there, strict=True), style, color=colour, marker="o", ms=4, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["page"] for row in found], [f"{row['page'] >> 10}" for row in found])
        axis.set_xlabel("page (KiB)")
        axis.set_title(("out of the GPU", "into the GPU")[way])
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 60)
    axes[0].set_ylabel("GB/s, blocks of 2 MiB at random")
    axes[1].legend(loc="lower right", fontsize=8)
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
