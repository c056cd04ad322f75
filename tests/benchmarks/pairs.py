"""Compares a benchmark of two checkouts in alternating runs, and gives an interval for each row's ratio.

    git worktree add ../before COMMIT
    python tests/benchmarks/pairs.py [--pairs 20] ../before . bench_planner.py [-- ARGUMENTS]

Three runs a round, in turning order: before, before again, after. A ratio is taken within a round, so that a
machine that slows down slows all three. The interval is that of the mean logarithm of the ratios (Student's
t, 95 %); the row of before against before shows the part of it that is noise. A row of a benchmark is a line
with a name and a number behind it.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

_ROW = re.compile(r"(\S.*?)\s{2,}(\d+(?:\.\d+)?)(?:\s|$)")
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11,
        2.10, 2.09)  # fmt: skip
"""Student's t of 1 to 19 degrees of freedom, two-sided."""


def rows_of(tree: Path, benchmark: str, arguments: list[str]) -> dict[str, float]:
    """Run a checkout's benchmark with the checkout's code, and read its rows."""
    paths = [tree, tree / "backends", tree / "plugins", tree / "tests" / "backends"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(path.resolve()) for path in paths)}
    command = [sys.executable, str(tree / "tests" / "benchmarks" / benchmark), *arguments]
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd=tree
    ).stdout
    found = (_ROW.match(line) for line in said.splitlines())
    return {match[1]: float(match[2]) for match in found if match and float(match[2]) > 0}


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Give the geometric mean, and the 95 % interval around it."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    half = _T95[len(logs) - 2] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a benchmark of two checkouts.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("benchmark")
    parser.add_argument("--pairs", type=int, default=20, choices=range(2, 21), metavar="2..20")
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    runs: list[dict[str, dict[str, float]]] = []
    order = ["before", "again", "after"]
    for _ in range(options.pairs):
        trees = {"before": options.before, "again": options.before, "after": options.after}
        runs.append({name: rows_of(trees[name], options.benchmark, options.arguments) for name in order})
        order = [*order[1:], order[0]]
    print(f"{options.benchmark}, {options.pairs} rounds, python {platform.python_version()}")
    print(f"{'ratio (95 % interval)':56}{'after / before':>26}{'before / before':>26}")
    names = [name for name in runs[0]["before"] if all(name in each for run in runs for each in run.values())]
    for name in names:
        cells = []
        for above in ("after", "again"):
            mean, low, high = interval([run[above][name] / run["before"][name] for run in runs])
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        print(f"{name[:54]:56}{cells[0]:>26}{cells[1]:>26}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
