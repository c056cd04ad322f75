"""What the user sees while a load runs: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvbm_bench._chat import Load, Tell
from kvbm_bench._plan import Plan
from kvbm_bench._report import percentile

HEARTBEAT_S = 20.0
"""How often a log that nobody watches live is told how far the load is."""


@contextmanager
def watch(console: Console, plan: Plan) -> Iterator[Tell]:
    """Give a function that shows how far a load is."""
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=plan.requests)
        yield lambda load: progress.update(task, completed=len(load.requests), description=describe(load))


def describe(load: Load) -> str:
    """Say in a line how a load goes."""
    parts = [f"{load.running} running"]
    if load.failures:
        parts.append(f"{len(load.failures)} failed")
    if load.requests:
        times_s = [request.first_token_s for request in load.requests]
        parts.append(f"first token p50 {percentile(times_s, 50):.2f} s, p95 {percentile(times_s, 95):.2f} s")
    return ", ".join(parts)


def _plain(console: Console) -> Tell:
    started_s = next_s = time.monotonic()

    def tell(load: Load) -> None:
        nonlocal next_s
        now_s = time.monotonic()
        if now_s >= next_s:
            next_s = now_s + HEARTBEAT_S
            wanted = load.plan.requests
            of = f" of {wanted}" if wanted else ""
            console.print(f"{now_s - started_s:.0f} s: {len(load.requests)}{of} done, {describe(load)}")

    return tell
