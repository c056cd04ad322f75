"""The verb `kvbm bench tier`."""

from __future__ import annotations

import os
import statistics
from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from kvbm_cli._console import make_console
from kvbm_cli.check._source import read_source
from kvbm_cli.check._trial import NotTriedError, Trial, try_tier, why_not_tried
from kvbm_core.command import ExitCode, answers, write_json
from kvbm_core.config import StackConfig, TierEntry, parse_size, size_text
from kvbm_core.errors import ConfigError, KvbmError
from kvbm_core.registry import Registry

__all__ = ["tier"]


class TierSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """One tier. Speeds are the median of the rounds, in bytes a second; null where it was not measured."""

    name: str
    backend: str
    objects: int
    """Written and read in a round: fewer than asked for where the tier holds no more."""
    store_bytes_per_s: float | None = None
    load_bytes_per_s: float | None = None
    stores: list[float] = []
    """Of each round."""
    loads: list[float] = []
    problem: str | None = None
    not_tried: str | None = None


class TierSpeeds(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm bench tier --json` writes."""

    source: str
    block_bytes: int
    depth: int | None
    """Objects on their way at once at most; null: as many as each tier takes."""
    rounds: int
    tiers: list[TierSpeed]


@answers(TierSpeeds)
def tier(
    config: Annotated[
        str | None, typer.Argument(help="As of `kvbm check`; without it, DYN_KVBM_* is read.")
    ] = None,
    block_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Of an object.")] = "2MiB",
    objects: Annotated[int, typer.Option(min=1, help="Written and read in a round.")] = 64,
    depth: Annotated[
        int | None,
        typer.Option(min=1, help="Objects on their way at once.", show_default="as many as the tier takes"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="The median of so many is shown.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the speeds as JSON.")] = False,
) -> None:
    """Measure each tier of a configuration alone, without vLLM: seconds to store objects and to load them.

    All objects of a round are in memory, and the same are read that were written: a disk may answer from the
    page cache.
    """
    nbytes = int(parse_size(block_bytes, "--block-bytes"))
    if nbytes < 1:
        raise ConfigError(f"--block-bytes: {block_bytes!r}; write a size above 0, like 2MiB")
    stack, source = read_source(config, os.environ, lambda: None, 1)
    speeds = [_measure(stack, entry, nbytes, objects, depth, rounds) for entry in stack.tiers]
    found = TierSpeeds(source=source, block_bytes=nbytes, depth=depth, rounds=rounds, tiers=speeds)
    if as_json:
        write_json(found)
    else:
        _show(found)
    raise typer.Exit(ExitCode.MEND if any(each.problem for each in speeds) else ExitCode.DONE)


def _measure(
    stack: StackConfig, entry: TierEntry, nbytes: int, objects: int, depth: int | None, rounds: int
) -> TierSpeed:
    found = TierSpeed(name=entry.name, backend=entry.backend, objects=0)
    try:
        if reason := why_not_tried(entry, shared=Registry().backend(entry.backend).shared):
            return msgspec.structs.replace(found, not_tried=reason)
        trials = [try_tier(stack, entry, nbytes, objects, depth) for _ in range(rounds)]
    except NotTriedError as error:
        return msgspec.structs.replace(found, not_tried=str(error))
    except KvbmError as error:
        return msgspec.structs.replace(found, problem=str(error))
    stores = [_speed(trial, trial.store_s) for trial in trials]
    loads = [_speed(trial, trial.load_s) for trial in trials]
    return msgspec.structs.replace(
        found,
        objects=trials[0].objects,
        store_bytes_per_s=statistics.median(stores),
        load_bytes_per_s=statistics.median(loads),
        stores=stores,
        loads=loads,
    )


def _speed(trial: Trial, seconds: float) -> float:
    return trial.objects * trial.object_bytes / max(seconds, 1e-9)


def _show(found: TierSpeeds) -> None:
    console = make_console()
    depth = "as many at once as it takes" if found.depth is None else f"at most {found.depth} at once"
    size = size_text(found.block_bytes, up=True)
    table = Table(
        title=f"{found.source}: objects of {size}, {depth}, median of {found.rounds}", title_justify="left"
    )
    for heading in ("Tier", "Backend", "Objects", "Store", "Load"):
        table.add_column(heading, justify="left" if heading in ("Tier", "Backend") else "right")
    for each in found.tiers:
        speeds = [
            "-" if speed is None else f"{size_text(int(speed))}/s"
            for speed in (each.store_bytes_per_s, each.load_bytes_per_s)
        ]
        table.add_row(escape(each.name), escape(each.backend), str(each.objects), *speeds)
    console.print(table)
    for each in found.tiers:
        if said := each.not_tried or each.problem:
            line = f"{'to mend: ' if each.problem else ''}{each.name}: {said}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
