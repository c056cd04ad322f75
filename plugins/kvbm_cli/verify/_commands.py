"""The verb `kvbm verify`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn
from rich.table import Table

from kvbm_cli._console import make_console
from kvbm_cli.inspect._places import find_places
from kvbm_cli.verify._answer import Verified, verify_places
from kvbm_core.command import ExitCode, answers, write_json
from kvbm_core.config import size_text

__all__ = ["verify"]

_MOST_SHOWN: Final = 20
_SHOWN_DIGITS: Final = 12


@answers(Verified)
def verify(
    place: Annotated[str, typer.Argument(help="A configuration file, a tier's directory, or its URL.")],
    namespace: Annotated[
        str, typer.Option(metavar="DIGITS", help="Only namespaces that begin with these digits.")
    ] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Read so many objects at most, of each rank's folder or store.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Delete what is damaged, unless an engine holds the place.")
    ] = False,
    gentle: Annotated[
        bool | None,
        typer.Option(
            "--gentle/--full-speed",
            show_default="gentle where an engine holds the place",
            help="Read one object at a time, a tenth of the time, so that an engine keeps its speed.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of a URL's storage_options.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Read every object of durable and remote tiers and prove its bytes, also beside a running engine."""
    digits = namespace.lower()
    with _progress(hidden=as_json) as told:
        found = verify_places(
            place,
            find_places(place, option or ()),
            lambda each: each.namespace.hex().startswith(digits),
            limit,
            told,
            remove=remove,
            gentle=gentle,
        )
    if as_json:
        write_json(found)
    else:
        _show(found)
    bad = found.damage or found.problems or any(part.not_judged for part in found.parts)
    raise typer.Exit(ExitCode.MEND if bad else ExitCode.DONE)


@contextmanager
def _progress(*, hidden: bool) -> Iterator[Callable[[int], None]]:
    """Show how much was read, and how fast, on the standard error."""
    columns = (SpinnerColumn(), TextColumn("read"), DownloadColumn(binary_units=True), TransferSpeedColumn())
    quiet = hidden or not sys.stderr.isatty()
    with Progress(*columns, console=make_console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("read", total=None)
        yield lambda nbytes: progress.advance(task, nbytes)


def _show(found: Verified) -> None:
    console = make_console()
    if found.parts:
        console.print(_table(found))
    lines = [] if found.parts or found.problems else [f"nothing lies in {found.source}"]
    for each in found.damage[:_MOST_SHOWN]:
        state = "removed" if each.removed else "not read" if each.unread else "damaged"
        lines.append(f"{state}: {each.where}, key {each.key[:16]}: {each.what}")
    if len(found.damage) > _MOST_SHOWN:
        lines.append(f"and {len(found.damage) - _MOST_SHOWN:,} more; --json lists all")
    lines += [
        f"not judged: namespace {part.namespace}: {part.not_judged}"
        for part in found.parts
        if part.not_judged
    ]
    lines += [f"to mend: {problem}" for problem in found.problems]
    if found.held_by:
        lines.append(f"pid {', '.join(found.held_by)} used it meanwhile: what it stored is not all read")
    rate = size_text(int(found.nbytes / max(found.seconds, 1e-9)))
    lines.append(f"{size_text(found.nbytes)} read in {found.seconds:.1f} s, {rate}/s")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(found: Verified) -> Table:
    table = Table(title=f"Objects in {found.source}", title_justify="left")
    for heading in ("Tier", "Rank", "Namespace", "Objects", "Bytes", "Damaged", "Replaced", "Not read"):
        table.add_column(
            heading, overflow="fold", justify="left" if heading in ("Tier", "Namespace") else "right"
        )
    for part in found.parts:
        table.add_row(
            escape(part.tier),
            str(part.rank),
            (part.namespace or "unknown")[:_SHOWN_DIGITS],
            f"{part.objects:,}",
            size_text(part.nbytes),
            "?" if part.not_judged else f"{part.damaged:,}",
            f"{part.replaced:,}",
            f"{part.unread:,}",
        )
    return table
