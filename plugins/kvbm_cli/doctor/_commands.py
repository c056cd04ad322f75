"""The verb `kvbm doctor`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from kvbm_cli._console import make_console
from kvbm_cli.check._trial import place_of
from kvbm_cli.doctor._bundle import make_bundle, write_bundle
from kvbm_cli.doctor._findings import Finding, Health, look
from kvbm_core.command import ExitCode, answers, write_json
from kvbm_core.config import StackConfig, load_config
from kvbm_core.remedies import existing_folder

__all__ = ["Diagnosis", "doctor"]


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm doctor --json` writes."""

    findings: list[Finding]
    bundle: str | None = None
    """The file that was written."""


@answers(Diagnosis)
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A configuration file: the folders of its tiers are tried, too.")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write all that a bug report needs into one file, without secrets."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at this machine: GPU, memory limits, NUMA, disks, NIXL, versions; what will be slow, and why."""
    stack = None if config is None else load_config(config)
    found = look(Path("/"), _folders(stack) if stack else [])
    if bundle is not None:
        write_bundle(bundle, make_bundle(found, stack))
    if as_json:
        write_json(Diagnosis(findings=found, bundle=str(bundle) if bundle else None))
    else:
        _show(found)
        if bundle is not None:
            print(f"written to {bundle}; read it before you send it")
    wrong = any(each.health is Health.WRONG for each in found)
    raise typer.Exit(ExitCode.MEND if wrong else ExitCode.DONE)


def _folders(stack: StackConfig) -> list[Path]:
    """Give the folders in which tiers keep files, or the nearest that are there."""
    found: dict[Path, None] = {}
    for place in (place_of(entry.settings) for entry in stack.tiers):
        with suppress(OSError):  # `kvbm check` says so.
            if place and (folder := existing_folder(place)).is_dir():
                found[folder] = None
    return list(found)


def _show(found: list[Finding]) -> None:
    console = make_console()
    table = Table(title="This machine", title_justify="left")
    for heading in ("", "State", "Found"):
        table.add_column(heading, overflow="fold")
    for each in found:
        table.add_row(escape(each.name), each.health.value, escape(each.found))
    console.print(table)
    for each in found:
        if each.advice:
            line = f"{each.name}, {each.health.value}: {each.advice}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
