"""The verb `kvbm clear`."""

from __future__ import annotations

import re
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

from kvbm_cli._console import make_console
from kvbm_cli.clear._answer import Choice, Cleared, clear_places
from kvbm_cli.inspect._places import find_places
from kvbm_core.command import ExitCode, answers, write_json
from kvbm_core.config import parse_size, size_text
from kvbm_core.errors import ConfigError

__all__ = ["clear"]

_AGE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", re.ASCII)
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_SHOWN_DIGITS: Final = 12


@answers(Cleared)
def clear(
    place: Annotated[str, typer.Argument(help="A configuration file, a tier's directory, or its URL.")],
    namespace: Annotated[
        str | None, typer.Option(metavar="DIGITS", help="Only namespaces that begin with these digits.")
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            help="Like 36h or 30d: objects of a store by their time, those on a local disk by when an engine "
            "last started with their namespace.",
        ),
    ] = None,
    down_to: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The oldest, until so much is left in each tier.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; otherwise only say what would be.")] = False,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of a URL's storage_options.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was chosen as JSON.")] = False,
) -> None:
    """Delete objects of durable and remote tiers by namespace, age or size.

    Of a local disk where no engine is; of a store also beside engines, which miss a block.
    """
    if namespace is None and older_than is None and down_to is None:
        raise ConfigError(
            "nothing is chosen; write --namespace, --older-than or --down-to (`--down-to 0B` is everything)"
        )
    if namespace is not None and not re.fullmatch(r"[0-9a-fA-F]{1,32}", namespace, re.ASCII):
        raise ConfigError(f"--namespace: {namespace!r}; write the first of its digits, see `kvbm inspect`")
    choice = Choice(
        (namespace or "").lower(),
        None if older_than is None else _age(older_than),
        None if down_to is None else int(parse_size(down_to, "--down-to")),
    )
    done = clear_places(place, find_places(place, option or ()), choice, really=yes)
    if as_json:
        write_json(done)
    else:
        _show(done)
    chosen = sum(part.objects for part in done.parts)
    less = done.removed is not None and done.removed < chosen
    raise typer.Exit(ExitCode.MEND if less or done.unknown else ExitCode.DONE)


def _age(text: str) -> float:
    match = _AGE.fullmatch(text)
    if match is None:
        raise ConfigError(f"--older-than: {text!r}; write a number and s, m, h, d or w, like 36h or 30d")
    return float(match[1]) * _SECONDS[match[2]]


def _show(done: Cleared) -> None:
    console = make_console()
    table = Table(title=f"Chosen in {done.source}", title_justify="left")
    for heading in ("Tier", "Rank", "Namespace", "Objects", "Bytes", "Left", "Bytes left"):
        table.add_column(
            heading, overflow="fold", justify="left" if heading in ("Tier", "Namespace") else "right"
        )
    for part in done.parts:
        table.add_row(
            escape(part.tier),
            str(part.rank),
            part.namespace[:_SHOWN_DIGITS],
            f"{part.objects:,}",
            size_text(part.nbytes),
            f"{part.left_objects:,}",
            size_text(part.left_bytes),
        )
    if done.parts:
        console.print(table)
    lines = [] if done.parts else [f"nothing lies in {done.source}"]
    lines += done.unknown
    chosen = sum(part.objects for part in done.parts)
    if done.removed is None:
        lines.append(f"nothing is deleted: with --yes {chosen:,} objects would be")
    else:
        lines.append(f"{done.removed:,} of {chosen:,} objects deleted")
    if done.tidied:
        would = "would be " if done.removed is None else ""
        lines.append(f"{done.tidied:,} files of dead writers and empty namespaces {would}deleted")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
