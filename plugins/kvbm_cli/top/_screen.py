"""Shows what servers' metrics say: a table on a terminal, a line a tier elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvbm_cli.top._answer import EngineState, ServerState, Span, Status, TierState
from kvbm_core.config import size_text
from kvbm_core.printable import printable

__all__ = ["lines", "screen"]

_COLORS: Final = {"works": "green", "fails": "yellow", "left alone": "red"}
_COLUMNS: Final = (
    "Tier", "State", "Hits", "Saved tokens/s", "Used", "In/s", "Out/s", "Load p50", "p95", "Queue in/out",
    "Failed", "Dropped", "Evicted",
)  # fmt: skip
_WORDS: Final = frozenset({"Tier", "State", "Failed", "Dropped"})
_WIDE: Final = 155
"""Columns of a terminal that the table needs with a tier a row."""
_ONCE: Final = "Failed, dropped and evicted, and what is in brackets: since the start."
_NOT_YET: Final = "no engine has reported yet: each does with its first request"


def screen(status: Status, width: int) -> RenderableType:
    """Draw what to mend, and a table an engine.

    Args:
        status: What is shown.
        width: Of the terminal, in columns: on a narrow one each tier is a column of the table, not a row.
    """
    parts: list[RenderableType] = [
        Text(f"to mend: {printable(line)}", style="bold") for line in status.to_mend
    ]
    for server in status.servers:
        if not server.engines and not server.problem:
            parts.append(Text(f"{printable(server.url)}: {_NOT_YET}"))
        parts += [_table(server, engine, wide=width >= _WIDE) for engine in server.engines]
    return Group(*parts)


def lines(status: Status) -> Iterator[str]:
    """Write a line for each thing to mend, and one a tier."""
    yield from (f"to mend: {printable(line)}" for line in status.to_mend)
    for server in status.servers:
        if not server.engines and not server.problem:
            yield f"{printable(server.url)}: {_NOT_YET}"
        for engine in server.engines:
            for tier in engine.tiers:
                cells = zip(_COLUMNS[1:], _cells(tier, server.seconds), strict=True)
                said = ", ".join(f"{name} {' and '.join(cell.split(chr(10)))}" for name, cell in cells)
                yield f"{_title(server, engine)} {printable(tier.tier)}: {said}"


def _title(server: ServerState, engine: EngineState) -> str:
    number = f" engine {engine.engine}" if engine.engine else ""
    return printable(f"{server.url}{number}")


def _table(server: ServerState, engine: EngineState, *, wide: bool) -> Table:
    when = _ONCE if server.seconds is None else f"Of the last {server.seconds:.2g} s. {_ONCE}"
    model = f", {printable(engine.model)}" if engine.model else ""
    table = Table(
        title=escape(f"{_title(server, engine)}{model}"), title_justify="left",
        caption=when, caption_justify="left",
    )  # fmt: skip
    rows = [_row(tier, server.seconds) for tier in engine.tiers]
    if wide:
        for heading in _COLUMNS:
            table.add_column(heading, justify="left" if heading in _WORDS else "right", overflow="fold")
    else:
        table.add_column(_COLUMNS[0])
        for tier in engine.tiers:
            table.add_column(Text(printable(tier.tier)), justify="right", overflow="fold")
        names = map(Text, _COLUMNS[1:])
        rows = [list(row) for row in zip(names, *(cells[1:] for cells in rows), strict=True)]
    for row in rows:
        table.add_row(*row)
    return table


def _row(tier: TierState, seconds: float | None) -> list[Text]:
    state, *cells = _cells(tier, seconds)
    return [Text(printable(tier.tier)), Text(state, style=_COLORS[tier.state]), *map(Text, cells)]


def _cells(tier: TierState, seconds: float | None) -> list[str]:
    """Give the cells behind the tier's name."""
    start, lately = tier.since_start, tier.lately

    def rate(value: Callable[[Span], int], write: Callable[[float], str]) -> str:
        return "-" if lately is None or not seconds else write(value(lately) / seconds)

    return [
        f"{tier.state}\n{printable(tier.left_alone_for)}" if tier.left_alone_for else tier.state,
        _latest(tier, lambda span: span.hit_ratio, lambda share: f"{share:.0%}"),
        rate(lambda span: span.saved_tokens, lambda tokens: f"{tokens:,.0f}"),
        _used(tier),
        rate(lambda span: span.stored_bytes, lambda nbytes: size_text(int(nbytes))),
        rate(lambda span: span.loaded_bytes, lambda nbytes: size_text(int(nbytes))),
        _latest(tier, lambda span: span.load_p50_s, _time),
        _latest(tier, lambda span: span.load_p95_s, _time),
        f"{tier.queued_stores:,}/{tier.queued_loads:,}",
        _reasons(start.failed),
        _reasons(start.dropped),
        f"{start.evicted_blocks:,}",
    ]


def _latest(tier: TierState, value: Callable[[Span], float | None], write: Callable[[float], str]) -> str:
    """Write a value as it was lately; in brackets since the start, where nothing happened lately."""
    late = None if tier.lately is None else value(tier.lately)
    if late is not None:
        return write(late)
    ever = value(tier.since_start)
    return "-" if ever is None else f"({write(ever)})"


def _used(tier: TierState) -> str:
    used = size_text(tier.used_bytes)
    if not tier.capacity_bytes:
        return used
    return f"{tier.used_bytes / tier.capacity_bytes:.0%} of {size_text(tier.capacity_bytes)}"


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _reasons(counts: dict[str, int]) -> str:
    return "\n".join(f"{printable(word)} {count:,}" for word, count in counts.items()) or "0"
