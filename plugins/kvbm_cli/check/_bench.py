"""The verb `kvbm bench tier`."""

from __future__ import annotations

import os
import statistics
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from kvbm_cli._console import make_console
from kvbm_cli.check._source import read_source
from kvbm_cli.check._trial import BareTrial, NotTriedError, Trial, try_bare, try_tier, why_not_tried
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
    bare: str | None = None
    """Its medium with no tier around it, that it is compared with in the same rounds; null: with none."""
    bare_store_bytes_per_s: float | None = None
    bare_load_bytes_per_s: float | None = None
    store_ratio: float | None = None
    load_ratio: float | None = None
    """Of the tier's speed to the bare medium's, the median of each round's; seals and codecs count."""
    not_compared: str | None = None
    """Why its medium could not be used bare."""
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
    """Measure each tier of a configuration alone, and its bare medium in turn with it, without vLLM.

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
        trials, bares, why = [], [], ""
        for _ in range(rounds):
            trials.append(try_tier(stack, entry, nbytes, objects, depth))
            try:
                # Beside each other in time, as a machine's speed drifts.
                bare = None if why else try_bare(entry, trials[-1], depth)
            except KvbmError as error:
                bare, why = None, str(error)
            if bare:
                bares.append(bare)
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
        **_compared(trials, bares, why),
    )


def _compared(trials: list[Trial], bares: list[BareTrial], why: str) -> dict[str, Any]:
    """Give what is said of the bare medium."""
    if why or not bares:
        return {"not_compared": why or "its backend gives no bare medium"}
    pairs = list(zip(trials, bares, strict=True))
    return {
        "bare": bares[0].says,
        "bare_store_bytes_per_s": statistics.median(_speed(trial, bare.store_s) for trial, bare in pairs),
        "bare_load_bytes_per_s": statistics.median(_speed(trial, bare.load_s) for trial, bare in pairs),
        "store_ratio": statistics.median(bare.store_s / max(trial.store_s, 1e-9) for trial, bare in pairs),
        "load_ratio": statistics.median(bare.load_s / max(trial.load_s, 1e-9) for trial, bare in pairs),
    }


def _speed(trial: Trial, seconds: float) -> float:
    return trial.objects * trial.object_bytes / max(seconds, 1e-9)


def _show(found: TierSpeeds) -> None:
    console = make_console()
    depth = "as many at once as it takes" if found.depth is None else f"at most {found.depth} at once"
    size = size_text(found.block_bytes, up=True)
    table = Table(
        title=f"{found.source}: objects of {size}, {depth}, median of {found.rounds}", title_justify="left"
    )
    for heading in ("Tier", "Backend", "Objects", "Store", "of bare", "Load", "of bare", "Bare medium"):
        table.add_column(
            heading, justify="left" if heading in ("Tier", "Backend", "Bare medium") else "right"
        )
    for each in found.tiers:
        speeds = [
            "-" if speed is None else f"{size_text(int(speed))}/s"
            for speed in (each.store_bytes_per_s, each.load_bytes_per_s)
        ]
        ratios = ["-" if ratio is None else f"{ratio:.2f}" for ratio in (each.store_ratio, each.load_ratio)]
        table.add_row(
            escape(each.name),
            escape(each.backend),
            str(each.objects),
            speeds[0],
            ratios[0],
            speeds[1],
            ratios[1],
            escape(each.bare or "-"),
        )
    console.print(table)
    for each in found.tiers:
        if said := each.not_tried or each.problem or each.not_compared:
            line = f"{'to mend: ' if each.problem else ''}{each.name}: {said}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
