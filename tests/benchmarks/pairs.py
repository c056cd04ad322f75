"""Compares a benchmark of two checkouts in alternating runs, and gives an interval for each row's ratio.

    git worktree add ../before COMMIT
    python tests/benchmarks/pairs.py [--pairs 20] [--seconds 480] ../before . BENCHMARK.py [-- ARGUMENTS]

Three runs a round, in turning order: before, before again, after. A ratio is taken within a round, so that a
machine that slows down slows all three. The interval is that of the mean logarithm of the ratios (Student's
t, 95 %); the row of before against before shows the part of it that is noise. A row of a benchmark is a line
with a name and, two spaces or more behind it, numbers with a decimal point, of which one column is compared.
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
import time
from pathlib import Path

_NUMBER = re.compile(r"(?<=\s\s)\d+\.\d+(?=\s|$)|(?<=\s)\d+\.\d+(?=\s*$)")
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11,
        2.10, 2.09)  # fmt: skip
"""Student's t of 1 to 19 degrees of freedom, two-sided."""


def rows_of(tree: Path, benchmark: str, arguments: list[str], column: int) -> dict[str, float]:
    """Run a checkout's benchmark with the checkout's code, and read a column of its rows.

    A row is named by the last line above it that is none, and by the text ahead of its first number.
    """
    paths = [tree, tree / "backends", tree / "plugins", tree / "tests" / "backends"]
    path = [str(path.resolve()) for path in paths] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, str(tree.resolve() / "tests" / "benchmarks" / benchmark), *arguments]
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd=tree
    ).stdout
    rows: dict[str, float] = {}
    section = ""
    for line in said.splitlines():
        numbers = list(_NUMBER.finditer(line))
        if not numbers:
            section = line.strip()[:24]
        elif len(numbers) >= column and (value := float(numbers[column - 1][0])) > 0:
            rows[f"{section}: {' '.join(line[: numbers[0].start()].split())}"] = value
    return rows


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
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no round after so many")
    parser.add_argument("--column", type=int, default=1, help="which of a row's numbers, from 1")
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    runs: list[dict[str, dict[str, float]]] = []
    order = ["before", "again", "after"]
    began_s = time.monotonic()
    for round_number in range(options.pairs):
        if round_number >= 2 and time.monotonic() - began_s > options.seconds:
            break
        trees = {"before": options.before, "again": options.before, "after": options.after}
        runs.append(
            {
                name: rows_of(trees[name], options.benchmark, options.arguments, options.column)
                for name in order
            }
        )
        order = [*order[1:], order[0]]
    print(f"{options.benchmark}, {len(runs)} rounds, python {platform.python_version()}")
    print(f"{'ratio (95 % interval)':64}{'after / before':>26}{'before / before':>26}")
    names = [name for name in runs[0]["before"] if all(name in each for run in runs for each in run.values())]
    for name in names:
        cells = []
        for above in ("after", "again"):
            mean, low, high = interval([run[above][name] / run["before"][name] for run in runs])
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        print(f"{name[:62]:64}{cells[0]:>26}{cells[1]:>26}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
