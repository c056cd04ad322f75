"""The group `kvbm remote`."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer

from kvbm_core.command import ExitCode, answers, write_json
from kvbm_core.config import parse_size, size_text
from kvbm_core.errors import ConfigError, KvbmError, TierError
from kvbm_remote._config import RemoteConfig, shown_url
from kvbm_remote._faults import classify
from kvbm_remote._gc import Summary, collect

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Object stores and file servers.")

_AGE: Final = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@app.callback()
def root() -> None:
    """Object stores and file servers."""


@app.command("gc")
@answers(Summary)
def gc(
    url: Annotated[str, typer.Argument(metavar="URL", help="As in the configuration.")],
    max_age: Annotated[
        str | None, typer.Option(metavar="AGE", help="Delete what was stored longer ago: 90m, 12h, 7d, 4w.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Delete the oldest until so much is left: 500GiB.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of the storage_options.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing, say what would be.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Delete old blocks, or the oldest of too many. Safe while engines run: they miss a block."""
    if max_age is None and max_bytes is None:
        raise ConfigError("nothing to do: write --max-age, --max-bytes, or both")
    config = RemoteConfig(url=url, storage_options=_storage_options(option or ()), timeout_s=60.0)
    max_age_s = math.inf if max_age is None else _seconds(max_age)
    most_bytes = math.inf if max_bytes is None else parse_size(max_bytes, "--max-bytes")
    try:
        summary = asyncio.run(collect(config, max_age_s, most_bytes, dry_run=dry_run))
    except KvbmError:
        raise
    except Exception as error:  # noqa: BLE001 - a client's error may quote a password, so it is not chained
        raise TierError(f"{shown_url(url)}: {classify(error)}") from None
    if as_json:
        write_json(summary)
    else:
        print(_text(summary))
    raise typer.Exit(ExitCode.MEND if summary.failed else ExitCode.DONE)


def _storage_options(pairs: Sequence[str]) -> dict[str, Any]:
    if any("=" not in pair for pair in pairs):
        raise ConfigError("--option: write NAME=VALUE, like endpoint_url=http://host:9000")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def _seconds(text: str) -> float:
    match = _AGE.fullmatch(text)
    if match is None:
        raise ConfigError(f"--max-age: {text!r} is not an age; write a number and s, m, h, d or w, like 7d")
    return float(match[1]) * _UNITS_S[match[2]]


def _text(summary: Summary) -> str:
    would = "would be deleted" if summary.dry_run else "deleted"
    return (
        f"{summary.found_blocks} blocks found, {size_text(summary.found_bytes)}; "
        f"{summary.deleted_blocks} {would}, {size_text(summary.deleted_bytes)}; "
        f"{summary.deleted_litter} unfinished files {would}; {summary.failed} deletions failed"
    )
