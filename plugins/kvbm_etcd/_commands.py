"""The group `kvbm etcd`: lists the engines that are registered, once or as they come and go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import typer

from kvbm_core import ConfigError, CoordinatorError, load_config
from kvbm_core.command import answers, write_json
from kvbm_core.config import convert
from kvbm_etcd._client import AwayError, Client, EtcdError
from kvbm_etcd._config import EtcdConfig, read_access
from kvbm_etcd._roll import Entry, read_entries, top_prefix

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Engines that are registered in etcd.")

_HEADINGS: Final = ("ENGINE", "MEMBER", "HOST", "PID", "NAMESPACE", "STACK", "VERSIONS", "METRICS", "UP")
_SHOWN_DIGITS: Final = 12

ConfigOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The engines' YAML file, for its 'coordinator'.")
]
EndpointOption = Annotated[
    list[str] | None, typer.Option(help="http://host:port; may be given several times.")
]
PrefixOption = Annotated[str | None, typer.Option(help="Of the keys.", show_default="/kvbm")]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm etcd watch` tells of: a process that came or went, or etcd itself."""

    time: datetime
    sign: Literal["+", "-", "?"]
    """Came, went, or: nothing is known, see `text`."""
    text: str
    engine: str | None = None
    rank: int | None = None
    """None for a leader, and for etcd itself."""


@app.command("ls")
@answers(dict[str, list[Entry]])
def ls(
    config: ConfigOption = None,
    endpoint: EndpointOption = None,
    prefix: PrefixOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, by engine.")] = False,
) -> None:
    """List the engines, a line for each process."""
    settings = _config(config, endpoint, prefix)
    with _client(settings) as client:
        entries = _entries(client, settings)
    if as_json:
        engines: dict[str, list[Entry]] = {}
        for entry in entries:
            engines.setdefault(entry.engine, []).append(entry)
        write_json(engines)
    elif entries:
        rows = [_HEADINGS, *map(_row, entries)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    else:
        print(f"no engine is registered under {settings.prefix}")


@app.command("watch")
@answers(Change, lines=True)
def watch(
    config: ConfigOption = None,
    endpoint: EndpointOption = None,
    prefix: PrefixOption = None,
    interval: Annotated[float, typer.Option(metavar="S", min=0.01, help="Seconds between looks.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Each change as JSON, in a line.")] = False,
) -> None:
    """Print a line when a process comes or goes, until Ctrl-C."""
    settings = _config(config, endpoint, prefix)
    with contextlib.suppress(KeyboardInterrupt), _client(settings) as client:
        _watch(client, settings, interval, _tell_json if as_json else _tell)


def _config(file: Path | None, endpoints: Sequence[str] | None, prefix: str | None) -> EtcdConfig:
    settings: dict[str, Any] = {}
    if file:
        settings = dict(load_config(file).coordinator or {})
        if settings.pop("backend", None) != "etcd":
            raise ConfigError(f"{file}: has no coordinator with 'backend: etcd'")
    if endpoints:
        settings["endpoints"] = list(endpoints)
    if prefix:
        settings["prefix"] = prefix
    return convert(settings, EtcdConfig, "coordinator (etcd)")


@contextlib.contextmanager
def _client(config: EtcdConfig) -> Iterator[Client]:
    """Connect; an error of etcd becomes one that says where it is."""
    client = Client(read_access(config), config.timeout_s)
    try:
        yield client
    except EtcdError as error:
        raise CoordinatorError(f"etcd at {read_access(config)}: {error}") from error
    finally:
        client.close()


def _entries(client: Client, config: EtcdConfig) -> list[Entry]:
    return read_entries(client.values(top_prefix(config.prefix)))


def _row(entry: Entry) -> tuple[str, ...]:
    return (
        entry.engine,
        "leader" if entry.rank is None else f"worker {entry.rank} of {entry.world_size}",
        entry.host,
        str(entry.pid),
        entry.shared_namespace[:_SHOWN_DIGITS] or "-",
        ", ".join(entry.stack) or "-",
        ", ".join(f"{name} {version}" for name, version in entry.versions.items()) or "-",
        entry.metrics or "-",
        f"{(datetime.now(UTC) - entry.since).total_seconds():.0f} s",
    )


def _watch(client: Client, config: EtcdConfig, interval_s: float, tell: Callable[[Change], None]) -> None:
    """Tell who is there and then each change, until interrupted. Goes on when etcd goes away."""
    known: Mapping[str, Entry] = {}
    away = False
    while True:
        try:
            found = {entry.instance: entry for entry in _entries(client, config)}
        except AwayError as error:
            if not away:
                tell(Change(time=datetime.now(UTC), sign="?", text=f"etcd is away: {error}"))
            away = True
        else:
            if away:
                tell(Change(time=datetime.now(UTC), sign="?", text="etcd is back"))
            away = False
            for instance in known.keys() - found.keys():
                tell(_change("-", known[instance]))
            for instance in found.keys() - known.keys():
                tell(_change("+", found[instance]))
            known = found
        time.sleep(interval_s)


def _change(sign: Literal["+", "-"], entry: Entry) -> Change:
    return Change(
        time=datetime.now(UTC),
        sign=sign,
        text=f"{entry.engine} {entry}",
        engine=entry.engine,
        rank=entry.rank,
    )


def _tell(change: Change) -> None:
    print(f"{change.time:%H:%M:%S} {change.sign} {change.text}", flush=True)


def _tell_json(change: Change) -> None:
    write_json(change, lines=True)
