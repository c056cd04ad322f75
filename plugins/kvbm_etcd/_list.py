"""Lists the engines that are registered, once or as they come and go."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from kvbm_core import ConfigError, load_config
from kvbm_core.config import convert
from kvbm_etcd._client import AwayError, Client, EtcdError
from kvbm_etcd._config import EtcdConfig, read_access
from kvbm_etcd._roll import Entry, read_entries, top_prefix

__all__ = ["main"]

_HEADINGS: Final = ("ENGINE", "MEMBER", "HOST", "PID", "NAMESPACE", "STACK", "VERSIONS", "METRICS", "UP")
_SHOWN_DIGITS: Final = 12


def main(arguments: Sequence[str]) -> int:
    """Run the command line; 0 if it went well, 2 if not."""
    options = _parser().parse_args(arguments)
    try:
        config = _config(options)
        client = Client(read_access(config), config.timeout_s)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if options.command == "watch":
            _watch(client, config, options.interval)
        else:
            _list(client, config, as_json=options.json)
    except EtcdError as error:
        print(f"etcd at {read_access(config)}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    finally:
        client.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvbm_etcd", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE", help="the engines' YAML file, for its 'coordinator'")
    common.add_argument("--endpoint", action="append", help="http://host:port; may be given several times")
    common.add_argument("--prefix", help="of the keys (default: /kvbm)")
    commands = parser.add_subparsers(dest="command", required=True)
    once = commands.add_parser("ls", parents=[common], help="list the engines, a line for each process")
    once.add_argument("--json", action="store_true", help="as JSON, by engine")
    watch = commands.add_parser("watch", parents=[common], help="print a line when a process comes or goes")
    watch.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between looks")
    return parser


def _config(options: argparse.Namespace) -> EtcdConfig:
    settings: dict[str, Any] = {}
    if options.config:
        settings = dict(load_config(options.config).coordinator or {})
        if settings.pop("backend", None) != "etcd":
            raise ConfigError(f"{options.config}: has no coordinator with 'backend: etcd'")
    if options.endpoint:
        settings["endpoints"] = options.endpoint
    if options.prefix:
        settings["prefix"] = options.prefix
    return convert(settings, EtcdConfig, "coordinator (etcd)")


def _entries(client: Client, config: EtcdConfig) -> list[Entry]:
    return read_entries(client.values(top_prefix(config.prefix)))


def _list(client: Client, config: EtcdConfig, *, as_json: bool) -> None:
    entries = _entries(client, config)
    if as_json:
        engines: dict[str, list[Any]] = {}
        for entry in entries:
            engines.setdefault(entry.engine, []).append(msgspec.to_builtins(entry))
        print(json.dumps(engines, indent=2))
    elif entries:
        rows = [_HEADINGS, *map(_row, entries)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    else:
        print(f"no engine is registered under {config.prefix}")


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


def _watch(client: Client, config: EtcdConfig, interval_s: float) -> None:
    """Print who is there and then each change, until interrupted. Goes on when etcd goes away."""
    known: Mapping[str, Entry] = {}
    away = False
    while True:
        try:
            found = {entry.instance: entry for entry in _entries(client, config)}
        except AwayError as error:
            if not away:
                _tell("?", f"etcd is away: {error}")
            away = True
        else:
            if away:
                _tell("?", "etcd is back")
            away = False
            for sign, new, old in (("-", known, found), ("+", found, known)):
                for instance in new.keys() - old.keys():
                    _tell(sign, f"{new[instance].engine} {new[instance]}")
            known = found
        time.sleep(interval_s)


def _tell(sign: str, text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {sign} {text}", flush=True)
