"""The verb `kvbm inspect`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kvbm_cli._console import make_console
from kvbm_cli.inspect._answer import Inspected, inspect_places
from kvbm_cli.inspect._places import find_places
from kvbm_core.command import answers, write_json
from kvbm_core.config import size_text

__all__ = ["inspect"]

_SHOWN_DIGITS = 12
_DAY_S = 86_400.0


@answers(Inspected)
def inspect(
    place: Annotated[str, typer.Argument(help="A configuration file, a tier's directory, or its URL.")],
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Say which facts of two namespaces differ, by their first digits."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of a URL's storage_options.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """List the namespaces in a tier's place: model, layout, age, objects, bytes, and who holds it."""
    found = inspect_places(place, find_places(place, option or ()), diff)
    if as_json:
        write_json(found)
        return
    console = make_console()
    if found.namespaces:
        console.print(_table(found))
    lines = [] if found.namespaces or found.unknown else [f"nothing lies in {place}"]
    lines += found.unknown
    if found.differences is not None:
        lines += found.differences or ["the facts of the two are alike"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(found: Inspected) -> Table:
    table = Table(title=f"Namespaces in {found.source}", title_justify="left")
    for heading in ("Tier", "Rank", "Namespace", "Model", "Layout", "Used", "Objects", "Bytes", "Held by"):
        table.add_column(
            heading, overflow="fold", justify="right" if heading in ("Objects", "Bytes") else "left"
        )
    for each in found.namespaces:
        table.add_row(
            escape(each.tier),
            str(each.rank) if each.world_size is None else f"{each.rank} of {each.world_size}",
            each.namespace[:_SHOWN_DIGITS],
            escape(each.model or "not written"),
            escape(each.layout or "-"),
            _age(each.age_s),
            "?" if each.objects is None else f"{each.objects:,}",
            "?" if each.nbytes is None else size_text(each.nbytes),
            escape(f"pid {each.held_by}" if each.held_by else "nobody"),
        )
    return table


def _age(age_s: float | None) -> str:
    if age_s is None:
        return "-"
    for seconds, word in ((_DAY_S, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if age_s >= 2 * seconds:
            return f"{age_s / seconds:.0f} {word} ago"
    return f"{age_s:.0f} seconds ago"
