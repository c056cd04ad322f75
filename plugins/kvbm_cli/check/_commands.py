"""The verb `kvbm check`."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kvbm_cli._console import make_console
from kvbm_cli.check._answer import CheckedStack, CheckedTier, check_all
from kvbm_cli.check._source import read_source
from kvbm_cli.size._answer import Sizes, measure
from kvbm_cli.size._commands import element_bytes_of
from kvbm_cli.size._groups import Ranks
from kvbm_core.command import ExitCode, answers, write_json
from kvbm_core.config import parse_size, size_text
from kvbm_core.errors import ConfigError

__all__ = ["check"]


@answers(CheckedStack)
def check(
    config: Annotated[
        str | None,
        typer.Argument(
            help="A YAML file, or JSON as `--kv-transfer-config` takes it; without it, DYN_KVBM_* is read."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model's folder or config.json: says how many tokens fit.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="Ranks.")] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option("--pipeline-parallel-size", "-pp", min=1, help="Stages.")
    ] = 1,
    kv_cache_dtype: Annotated[str, typer.Option(help="As vLLM is told, see `kvbm size`.")] = "auto",
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens of a block.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of prompts, see `kvbm size`.")] = 8192,
    block_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="Of the objects that are written, without --model.")
    ] = "2MiB",
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Open and write nothing: only look at the settings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Read a configuration as the connector would, and try every tier and the coordinator, without vLLM."""
    ranks = Ranks(tensor_parallel, pipeline_parallel)
    sizes: Sizes | None = None
    if model is not None:
        sizes = measure(model, ranks, element_bytes_of(kv_cache_dtype), block_size, prompt_tokens)
    stack, source = read_source(config, os.environ, lambda: sizes.block_bytes if sizes else None, ranks.count)
    nbytes = (
        int(parse_size(block_bytes, "--block-bytes")) if sizes is None else sizes.block_bytes // ranks.count
    )
    if nbytes < 1:
        raise ConfigError(f"--block-bytes: {block_bytes!r}; write a size above 0, like 2MiB")
    found = check_all(stack, source, nbytes, ranks.count, sizes, try_tiers=not read_only)
    if as_json:
        write_json(found)
    else:
        _show(found)
    bad: object = found.problems or any(tier.problem for tier in found.tiers)
    bad = bad or (found.coordinator and found.coordinator.problem)
    raise typer.Exit(ExitCode.MEND if bad else ExitCode.DONE)


def _show(found: CheckedStack) -> None:
    console = make_console()
    console.print(_table(found))
    lines = [
        *(f"note: {note}" for note in found.notes),
        *(f"{tier.name}: {tier.detail}" for tier in found.tiers if tier.detail),
        *(f"{tier.name}: {tier.not_tried}" for tier in found.tiers if tier.not_tried),
        *(f"warning: {warning}" for tier in found.tiers for warning in tier.warnings),
        *(f"warning: {warning}" for warning in found.warnings),
        *(f"to mend: {tier.problem}" for tier in found.tiers if tier.problem),
        *(f"to mend: {problem}" for problem in found.problems),
    ]
    if at := found.coordinator:
        name = f"coordinator {at.backend}"
        lines += [f"{name}: {said}" for said in (at.detail, at.not_tried) if said]
        lines += [f"warning: {warning}" for warning in at.warnings]
        lines += [f"to mend: {at.problem}"] if at.problem else []
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(found: CheckedStack) -> Table:
    size = size_text(found.block_bytes, up=True)
    table = Table(title=f"{found.source}, with objects of {size}, fastest first", title_justify="left")
    for heading in ("Tier", "Backend", "Capacity", "Free there", "Tokens that fit", "Store", "Load", "Found"):
        table.add_column(heading, justify="left" if heading in ("Tier", "Backend", "Found") else "right")
    for tier in found.tiers:
        table.add_row(
            escape(tier.name),
            escape(", ".join([tier.backend, *tier.codecs])),
            _size(tier.capacity_bytes),
            _size(tier.free_bytes),
            "-" if tier.fits_tokens is None else f"{tier.fits_tokens:,}",
            _speed(tier.store_bytes_per_s),
            _speed(tier.load_bytes_per_s),
            _state(tier),
        )
    return table


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else size_text(nbytes)


def _speed(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else f"{size_text(int(bytes_per_s))}/s"


def _state(tier: CheckedTier) -> str:
    return "to mend" if tier.problem else "not tried" if tier.not_tried else "works"
