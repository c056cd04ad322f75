"""Plans as tables, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from kvbm_core.printable import printable
from kvbm_core.sizes import size_text
from kvbm_replay._planning import MEMORY, PlanAnswer
from kvbm_replay._sizes import tokens_text
from kvbm_replay._sizing import SizeAnswer
from kvbm_replay._table import figure_class

__all__ = ["advice_lines", "draw_plan", "make_tables"]

_MS = 1e3


def make_tables(answer: PlanAnswer) -> list[Table]:
    """Draw what memory alone saves by size, and what a disk does below the memory that is advised."""
    trace = answer.trace
    load = (
        f"{printable(trace.name)}: {trace.requests:,} requests in {trace.duration_s / 60:,.0f} minutes, "
        f"{100 * trace.reuse_ratio:.1f} % of {trace.blocks:,} blocks seen before"
    )
    tables = [_table(f"{load}\nMemory alone, policy {printable(answer.policy)}", answer.memory)]
    if answer.advice.disk:
        memory = _size(answer.advice.memory)
        tables.append(_table(f"A disk below {memory} of memory, which has what the memory has", answer.disk))
    return tables


def _table(title: str, sizes: Sequence[SizeAnswer]) -> Table:
    table = Table(title=title)
    for heading in ("size", "tokens", "hits %", "mean first token (ms)", "saves (s an hour)"):
        table.add_column(heading, justify="right")
    table.add_column("a further GiB saves (s an hour)", justify="right")
    for size in sizes:
        rate = size.next_gib_saves_s_per_hour
        table.add_row(
            _size(size), tokens_text(size.tokens), f"{100 * size.hit_ratio:.1f}",
            f"{_MS * size.mean_first_token_s:,.0f}", f"{size.saved_s_per_hour:,.0f}",
            "" if rate is None else f"{rate:.3g}",
        )  # fmt: skip
    return table


def _size(size: SizeAnswer) -> str:
    return size_text(size.nbytes, up=True)


def advice_lines(answer: PlanAnswer) -> list[str]:
    """Say what is advised, what a replay of it gave, and what to write in the configuration."""
    advice, row = answer.advice, answer.replayed
    needs = [f"{_size(advice.memory)} of memory"] if advice.memory.blocks else []
    needs += [f"{_size(advice.disk)} of disk"] if advice.disk else []
    predicted = advice.disk or advice.memory
    per_day = size_text(answer.stored_bytes_per_day)
    lines = [
        f"{' and '.join(needs)} save {100 * advice.reaches:.0f} % of what memory without an end would "
        f"(goal {100 * answer.goal:g} %; a GiB of memory costs as much as {answer.price:g} of disk).",
        f"Expected: {100 * predicted.hit_ratio:.1f} % hits, mean first token "
        f"{_MS * predicted.mean_first_token_s:,.0f} ms; without tiers "
        f"{_MS * answer.uncached_first_token_s:,.0f} ms.",
        f"Replayed{_seen(answer)}: {100 * (row.hit_ratio - row.engine_hit_ratio):.1f} % hits, mean first "
        f"token {_MS * row.mean_first_token_s:,.0f} ms.",
    ]
    place = row.tiers[-1]
    written = f"{printable(place.name)}: {per_day} written a day"
    if place.capacity_blocks and place.name != MEMORY:
        capacity_bytes = answer.config["tiers"][-1]["capacity"]
        written += f", {answer.stored_bytes_per_day / capacity_bytes:.1f} times its size"
    tiers = [{**tier, "capacity": size_text(tier["capacity"], up=True)} for tier in answer.config["tiers"]]
    return [*lines, f"{written}.", "Configuration: " + json.dumps({"tiers": tiers})]


def _seen(answer: PlanAnswer) -> str:
    return f" with {100 * answer.part:.2g} % of the blocks" if answer.part < 1 else ""


def draw_plan(answer: PlanAnswer, file: Path) -> None:
    """Draw hits and the mean time to the first token by size."""
    figure = figure_class()(figsize=(11, 4.2), layout="constrained")
    hits, times = figure.subplots(1, 2)
    kinds = [("memory alone", answer.memory)]
    if answer.advice.disk:
        kinds.append((f"disk below {_size(answer.advice.memory)} of memory", answer.disk))
    for label, sizes in kinds:
        gib = [size.nbytes / 2**30 for size in sizes]
        hits.plot(gib, [100 * size.hit_ratio for size in sizes], marker="o", label=label)
        times.plot(gib, [_MS * size.mean_first_token_s for size in sizes], marker="o", label=label)
    times.axhline(_MS * answer.uncached_first_token_s, color="black", linewidth=0.7, label="no tiers")
    for size in filter(None, (answer.advice.memory, answer.advice.disk)):
        for panel in (hits, times):
            panel.axvline(size.nbytes / 2**30, color="gray", linestyle=":", linewidth=1)
    hits.set(xlabel="GiB", ylabel="blocks hit (%)", xscale="log")
    times.set(xlabel="GiB", ylabel="mean time to first token (ms)", xscale="log")
    for panel in (hits, times):
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
        panel.legend()
    figure.savefig(file)
