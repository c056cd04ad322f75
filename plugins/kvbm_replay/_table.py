"""Replays as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from kvbm_core.errors import KvbmError
from kvbm_core.printable import printable
from kvbm_core.sizes import size_text
from kvbm_replay._answer import LoadAnswer, PolicyAnswer, Row, gain
from kvbm_replay._sizes import tokens_text

__all__ = ["draw_replay", "figure_class", "make_comparison", "make_table", "remarks"]

_MS = 1e3


def make_table(answer: LoadAnswer) -> Table:
    """Draw one row a replay."""
    trace = answer.trace
    title = (
        f"{printable(trace.name)}: {trace.requests:,} requests, {trace.blocks:,} blocks of "
        f"{trace.block_tokens} tokens, {100 * trace.reuse_ratio:.1f} % seen before"
    )
    table = Table(title=title)
    tiers = [*dict.fromkeys(tier.name for row in answer.rows for tier in row.tiers)]
    several = len({row.stack for row in answer.rows}) > 1
    for heading in ("tokens", "GiB", *(["stack"] if several else []), "policy", "hits %", "engine %"):
        table.add_column(heading, justify="left" if heading in ("stack", "policy") else "right")
    for name in tiers:
        table.add_column(f"{printable(name)} %", justify="right")
        table.add_column("GiB written", justify="right")
        table.add_column("evicted", justify="right")
    for heading in ("LRU %", "Belady %", "gain %", "first token: mean", "p50", "p95 (ms)"):
        table.add_column(heading, justify="right")
    for row in answer.rows:
        size, *cells = _cells(row, tiers)
        stack = [printable(row.stack)] if several else []
        table.add_row(size, _gib(row, answer.machine.token_bytes), *stack, *cells)
    return table


def _cells(row: Row, tiers: Sequence[str]) -> list[str]:
    tokens = row.capacity_tokens
    cells = ["no bound" if tokens is None else tokens_text(tokens)]
    cells += [printable(row.policy), _percent(row.hit_ratio), _percent(row.engine_hit_ratio)]
    found = {tier.name: tier for tier in row.tiers}
    for name in tiers:
        tier = found.get(name)
        cells += (
            [_percent(tier.hit_ratio), f"{tier.stored_bytes / 2**30:,.0f}", f"{tier.evicted_blocks:,}"]
            if tier
            else [""] * 3
        )
    cells += [_percent(row.lru_hit_ratio), _percent(row.belady_hit_ratio), _percent(gain(row))]
    times_s = (row.mean_first_token_s, row.p50_first_token_s, row.p95_first_token_s)
    return [*cells, *(f"{_MS * time_s:,.0f}" for time_s in times_s)]


def _gib(row: Row, token_bytes: int) -> str:
    tokens = row.capacity_tokens
    return "" if tokens is None else f"{tokens * token_bytes / 2**30:,.0f}"


def _percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{100 * ratio:.1f}"


def make_comparison(policies: Sequence[PolicyAnswer]) -> Table:
    """Draw one row a policy, over all replays."""
    table = Table(title="Against LRU and Belady, over all replays")
    for heading in ("policy", "replays", "hits over LRU, at worst (points)", "of Belady's gain, mean %"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for each in policies:
        worst = f"{100 * each.worst_over_lru:+.2f}"
        table.add_row(printable(each.policy), f"{each.replays}", worst, _percent(each.mean_gain))
    return table


def remarks(answer: LoadAnswer) -> list[str]:
    """Say what the numbers rest on, a line each."""
    machine, trace, rows = answer.machine, answer.trace, answer.rows
    lines = [
        f"Machine: {machine.prefill_tokens_per_s:,.0f} tokens/s computed, {size_text(machine.token_bytes)} a "
        f"token, link {machine.link_bytes_per_s / 1e9:g} GB/s; "
        + "; ".join(f"{printable(name)} {speed.text()}" for name, speed in machine.tiers.items()),
        f"Without any cache the mean first token takes {_MS * answer.uncached_first_token_s:,.0f} ms, on an "
        "engine that nobody else uses; nobody waits for others here.",
    ]
    declined = sum(tier.declined_blocks for row in rows for tier in row.tiers)
    dropped = sum(tier.dropped_blocks for row in rows for tier in row.tiers)
    if declined:
        lines.append(f"{declined:,} blocks were found and computed all the same, because that is faster.")
    if dropped:
        lines.append(f"{dropped:,} blocks were not stored, because a tier was too slow to take them.")
    if trace.lost_requests:
        lines.append(f"The recording has lost {trace.lost_requests:,} requests: it could not follow.")
    took_s = sum(row.replay_s for row in rows)
    if took_s:
        lines.append(f"Replayed {len(rows) * trace.blocks / took_s:,.0f} blocks a second.")
    return lines


def figure_class() -> type:
    """Give matplotlib's figure.

    Raises:
        KvbmError: If it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise KvbmError(
            "--plot needs matplotlib, which is not installed: pip install 'kvbm-core[replay]'"
        ) from error
    return Figure


def draw_replay(answer: LoadAnswer, file: Path) -> None:
    """Draw hits, and the mean time to the first token, by size."""
    figure = figure_class()(figsize=(11, 4.2), layout="constrained")
    hits, times = figure.subplots(1, 2)
    rows = [row for row in answer.rows if row.capacity_tokens]
    for stack, policy in dict.fromkeys((row.stack, row.policy) for row in rows):
        own = [row for row in rows if (row.stack, row.policy) == (stack, policy)]
        own.sort(key=lambda row: row.capacity_tokens or 0)
        several = len({row.stack for row in rows}) > 1
        label = f"{stack}: {policy}" if several else policy
        sizes = [(row.capacity_tokens or 0) / 1e6 for row in own]
        hits.plot(sizes, [100 * row.hit_ratio for row in own], marker="o", label=label)
        times.plot(sizes, [_MS * row.mean_first_token_s for row in own], marker="o", label=label)
    by_size = sorted({row.capacity_tokens or 0: row for row in rows}.items())
    sizes = [tokens / 1e6 for tokens, _ in by_size]
    lru = [row.lru_hit_ratio for _, row in by_size]
    belady = [row.belady_hit_ratio for _, row in by_size]
    for label, style, ratios in (("LRU, one tier", "--", lru), ("Belady, one tier", ":", belady)):
        if None not in ratios:
            hits.plot(sizes, [100 * (ratio or 0) for ratio in ratios], style, color="gray", label=label)
    hits.axhline(100 * answer.trace.reuse_ratio, color="black", linewidth=0.7, label="seen before")
    times.axhline(_MS * answer.uncached_first_token_s, color="black", linewidth=0.7, label="no cache")
    hits.set(xlabel="millions of tokens kept", ylabel="blocks hit (%)", xscale="log")
    times.set(xlabel="millions of tokens kept", ylabel="mean time to first token (ms)", xscale="log")
    for panel in (hits, times):
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
        panel.legend()
    figure.savefig(file)
