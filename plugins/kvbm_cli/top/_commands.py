"""The verbs `kvbm top` and `kvbm status`."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Final

import typer
from rich.live import Live

from kvbm_cli._console import make_console
from kvbm_cli.top._answer import ServerState, Status, describe
from kvbm_cli.top._answer import status as put_together
from kvbm_cli.top._scrape import Scrape, fetch, parse, read_url
from kvbm_cli.top._screen import lines, screen
from kvbm_core.command import ExitCode, answers, write_json
from kvbm_core.errors import KvbmError

__all__ = ["status", "top"]

_LATELY_S: Final = 10.0
"""`top` shows the last so many seconds, or the last interval if that is longer."""
_LONGEST_S: Final = 3600.0

_Urls = Annotated[
    list[str],
    typer.Argument(metavar="URL ...", help="Servers, like 127.0.0.1:8000: vLLM's port, or kvbm's own."),
]


def read_interval(value: float) -> float:
    """Return a time to wait between looks."""
    if not 0.1 <= value <= _LONGEST_S:
        raise typer.BadParameter(f"{value!r} cannot be used; write seconds from 0.1 to {_LONGEST_S:.0f}")
    return value


@dataclass(slots=True)
class _Watch:
    """Looks at one server again and again."""

    url: str
    lately_s: float
    """How far back a look is compared, at least."""
    seen: deque[tuple[float, Scrape]] = field(default_factory=deque)
    """When, by the monotonic clock, and what; the first is at least `lately_s` old, if any is."""

    def look(self) -> ServerState:
        """Ask the server. One that does not answer is told, and its past is forgotten."""
        try:
            now = parse(fetch(self.url), self.url)
        except KvbmError as error:
            self.seen.clear()
            return ServerState(url=self.url, problem=str(error), seconds=None, engines=[])
        now_s = time.monotonic()
        while len(self.seen) > 1 and now_s - self.seen[1][0] >= self.lately_s:
            self.seen.popleft()
        before_s, before = self.seen[0] if self.seen else (None, None)
        self.seen.append((now_s, now))
        return describe(self.url, now, before, None if before_s is None else now_s - before_s)


@answers(Status)
def status(
    urls: _Urls,
    interval: Annotated[
        float,
        typer.Option(callback=read_interval, help="Seconds between the two looks that speeds are from."),
    ] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say once how each tier of running servers does: for scripts and health checks.

    Ends with 0 if all is well, with 1 if a tier is left alone or transfers fail by its fault, and with 3 if a
    server does not answer or has no metrics of kvbm.
    """
    watches = _watches(urls, interval)
    found = next(_looks(watches, interval, 2, skip=1))
    if as_json:
        write_json(found)
    else:
        console = make_console()
        console.print(screen(found, console.width))
    raise typer.Exit(_code(found))


@answers(Status, lines=True)
def top(
    urls: _Urls,
    interval: Annotated[float, typer.Option(callback=read_interval, help="Seconds between looks.")] = 2.0,
    count: Annotated[int | None, typer.Option(min=1, help="Looks; without it, until Ctrl-C.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each look as a line of JSON.")] = False,
) -> None:
    """Watch the tiers of running servers: hits, tokens saved, fill, speeds, queues, and what fails.

    Where the output is no terminal, each look prints a line a tier. A server that goes away is shown as such
    until it is back; at the first look one must answer.
    """
    watches = _watches(urls, max(interval, _LATELY_S))
    console = make_console()
    live = (
        None if as_json or not console.is_terminal else Live(console=console, screen=True, auto_refresh=False)
    )
    with live or nullcontext():
        for number, found in enumerate(_looks(watches, interval, count)):
            if not number and all(server.problem for server in found.servers):
                raise KvbmError("; ".join(found.to_mend))
            if as_json:
                write_json(found, lines=True)
            elif live:
                live.update(screen(found, console.width), refresh=True)
            else:
                print(*lines(found), sep="\n", flush=True)


def _watches(urls: Sequence[str], lately_s: float) -> list[_Watch]:
    return [_Watch(url, lately_s) for url in dict.fromkeys(map(read_url, urls))]


def _looks(
    watches: Sequence[_Watch], interval_s: float, count: int | None, *, skip: int = 0
) -> Iterator[Status]:
    """Look at all servers at once, again and again; the first looks can be left out."""
    with ThreadPoolExecutor(len(watches)) as threads:
        for number in itertools.count() if count is None else range(count):
            if number:
                time.sleep(interval_s)
            servers = list(threads.map(_Watch.look, watches))
            if number >= skip:
                yield put_together(servers)


def _code(found: Status) -> ExitCode:
    if any(server.problem for server in found.servers):
        return ExitCode.UNUSABLE
    return ExitCode.MEND if found.to_mend else ExitCode.DONE
