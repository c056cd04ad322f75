"""Runs the tests: on every core those that start no engine, then those that start one, then the rest alone.

    python tools/run_tests.py                       all
    python tools/run_tests.py -k name --durations=9 what pytest takes
    python tools/run_tests.py -m soak               long ones, which are left out else
    python tools/run_tests.py --again               what failed runs once more, alone

A test's engine computes with one thread, so that there may be one for each core; they take more memory. Ranks
wait for each other by spinning, and beside another test they take many times as long, so they are alone.
A GPU is there once. Every worker has servers of its own.

With ``--again``, as in CI, a test that failed beside others and passes alone is no failure, and its name is
printed: it depends on how busy the machine is, and that is to be mended. What is wrong fails twice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_WORKERS = 8
"""Each may have an etcd, an S3 server and a Prometheus of its own."""
MOST_ENGINES = 4
"""Workers that start engines, each of which takes 2 to 3 GiB with its children."""

LAST_FAILED = Path(".pytest_cache/v/cache/lastfailed")
"""Where pytest's own plug-in keeps it."""
NOTHING_TO_RUN = 5
"""Pytest's exit status where no test was selected."""
FAILED = 1


def main(arguments: Sequence[str]) -> int:
    """Run all parts and return the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", dest="chosen", default="")
    parser.add_argument("-n", "--numprocesses", dest="workers", default=str(workers()))
    parser.add_argument("--again", action="store_true")
    options, others = parser.parse_known_args(arguments)
    if not {"-s", "--capture=no", "--pdb", "--trace"}.isdisjoint(others):
        options.workers = "0"  # A worker has no terminal.
    engines = str(min(int(options.workers), MOST_ENGINES)) if options.workers.isdecimal() else options.workers
    parts = [
        ("not (engine or gpu)", ["-n", options.workers, "--dist", "worksteal"], ()),
        (
            "engine and not (ranks or gpu)",
            ["-n", engines, "--dist", "load", "--maxschedchunk", "1"],
            ("engine",),
        ),
        ("ranks or gpu", [], ("ranks", "gpu")),
    ]
    statuses = []
    for part, spread, marks in parts:
        expression = f"({options.chosen}) and ({part})" if options.chosen else part
        words = [*others, *([] if names_a_place(others) else files_with(marks))]
        statuses.append(pytest("-m", expression, *spread, *words))
        if options.again and statuses[-1] == FAILED:
            statuses[-1] = run_again("-m", expression, *words)
        if statuses[-1] not in (0, FAILED, NOTHING_TO_RUN):
            break  # Stopped by hand or by -x, or the command line is wrong.
    return outcome(statuses)


def workers() -> int:
    """Give the number of processes that the tests without an engine are spread over."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def names_a_place(arguments: Sequence[str]) -> bool:
    """Say whether a file, a folder or a test is among pytest's arguments."""
    return any(Path(each.split("::")[0]).exists() for each in arguments)


def files_with(marks: Sequence[str]) -> list[str]:
    """List the files of tests that name one of these marks; none for no mark.

    A process that runs a part of the tests reads them all otherwise, which takes as long as some engines.
    """
    files = sorted(Path("tests").rglob("test_*.py")) if marks else []
    return [str(file) for file in files if any(f"mark.{mark}" in file.read_text() for mark in marks)]


def outcome(statuses: Sequence[int]) -> int:
    """Return the first failure's status; nothing to run in one part is no failure."""
    failures = [status for status in statuses if status not in (0, NOTHING_TO_RUN)]
    return next(iter(failures), min(statuses))


def run_again(*arguments: str) -> int:
    """Run what failed once more, alone, and say what passes then."""
    failed = last_failed()
    status = pytest(*arguments, "--last-failed", "--last-failed-no-failures=none")
    if passed := sorted(failed - last_failed()):
        print(f"== {len(passed)} failed beside others and passed alone; they depend on a busy machine:")
        print(*passed, sep="\n", flush=True)
    return status


def last_failed() -> set[str]:
    """Give the tests that pytest has noted as failed in its last run of them."""
    try:
        return set(json.loads(LAST_FAILED.read_text()))
    except FileNotFoundError:
        return set()


def pytest(*arguments: str) -> int:
    """Run pytest in this environment and return its exit status."""
    start_s = time.monotonic()
    status = subprocess.run([sys.executable, "-m", "pytest", *arguments], check=False).returncode
    print(f"== {time.monotonic() - start_s:.0f} s: pytest -m {arguments[1]!r}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
