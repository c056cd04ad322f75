"""The metrics on a port of their own, as KVBM has them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from threading import Thread
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest

from kvbm_core import ConfigError
from kvbm_core.log_limit import LogLimit
from kvbm_metrics._address import HOST, PORT, MetricsAddress
from kvbm_metrics._totals import Totals

__all__ = ["MetricsServer"]

logger = logging.getLogger("kvbm_metrics")

_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_MAX_CONNECTIONS: Final = 32
"""With one more the oldest is closed: a scraper asks at once, and who only holds connections must not keep
it out."""
_MAX_HEAD_BYTES: Final = 16384
_EXCHANGE_LIMIT_S: Final = 5.0
"""A request that has not come, or an answer that has not been taken, is given up after so long."""
_ACCEPT_PAUSE_S: Final = 0.1


class MetricsServer:
    """Serves one engine's readings, in one thread.

    Behaviour:
        - Every GET is answered in Prometheus's text format, which vLLM answers in too. In OpenMetrics some
          releases of the library write the colon of vLLM's names as an underscore.
        - A connection has one answer, and lasts at most `_EXCHANGE_LIMIT_S`.
        - Of more than `_MAX_CONNECTIONS` the oldest is closed.

    Args:
        address: Where it listens.
        label_names: As the engine labels its own metrics.
        label_values: Their values for this engine.
        prefix: Begins every name, see `Exporter`.

    Raises:
        ConfigError: If the address or the port cannot be had.
    """

    def __init__(
        self, address: MetricsAddress, label_names: Sequence[str], label_values: Sequence[object], prefix: str
    ) -> None:
        self._address = address
        self._totals = Totals(label_names, label_values, prefix)
        self._registry = CollectorRegistry()
        self._registry.register(self._totals)
        self._lines = LogLimit(logger)
        self._open: list[asyncio.Task[None]] = []
        """A task for each connection, the oldest first."""
        self._listener = _listen(address)
        self._listener.setblocking(False)
        self._loop = asyncio.SelectorEventLoop()
        self._stop = asyncio.Event()
        self._thread = Thread(target=self._run, name="kvbm-metrics", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<MetricsServer {self._address}; {self._totals!r}; {len(self._open)} connections>"

    @property
    def url(self) -> str:
        """Where others of this machine's network ask for the metrics."""
        return self._address.url

    def observe(self, readings: Mapping[str, Any]) -> None:
        """Add readings."""
        self._totals.observe(readings)

    def close(self) -> None:
        """Stop serving. May be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    # In the thread.

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        with self._listener:
            self._listen_on()
            await self._stop.wait()
            self._loop.remove_reader(self._listener)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _listen_on(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # Whoever it was has gone.
            return
        except OSError as error:  # The process has no descriptor left.
            self._lines.lasts(
                "deaf", self._loop.time(), "the metrics at %s are not served for now: %s; the engine goes on",
                self.url, error.strerror,
            )  # fmt: skip
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_ACCEPT_PAUSE_S, self._listen_on)
            return
        text = "the metrics at %s are served again; they were not %s"
        self._lines.over("deaf", self._loop.time(), text, self.url)
        task = self._loop.create_task(self._answer(connection))
        task.add_done_callback(partial(self._ended, connection))
        self._open.append(task)
        if len(self._open) > _MAX_CONNECTIONS:
            self._open.pop(0).cancel()

    def _ended(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        connection.close()
        if task in self._open:
            self._open.remove(task)

    async def _answer(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        # Whoever does not ask in time, does not take the answer or is gone gets none.
        with contextlib.suppress(OSError):
            async with asyncio.timeout(_EXCHANGE_LIMIT_S):
                head = await _read_head(connection)
                if head:
                    await asyncio.get_running_loop().sock_sendall(connection, self._answer_to(head))

    def _answer_to(self, head: bytes) -> bytes:
        if head.startswith(b"GET "):
            status, body = "200 OK", generate_latest(self._registry)
        else:
            status, body = "405 Method Not Allowed\r\nAllow: GET", b""
        return (
            f"HTTP/1.1 {status}\r\nContent-Type: {_CONTENT_TYPE}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        ).encode() + body


async def _read_head(connection: socket.socket) -> bytes:
    """Read to the end of a request's head. Empty, if that does not come or is too far."""
    head = b""
    while b"\r\n\r\n" not in head:
        got = await asyncio.get_running_loop().sock_recv(connection, _MAX_HEAD_BYTES)
        head += got
        if not got or len(head) > _MAX_HEAD_BYTES:
            return b""
    return head


def _listen(address: MetricsAddress) -> socket.socket:
    place = (address.host, address.port)
    try:
        if ":" not in address.host:
            return socket.create_server(place)
        both = address.host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(place, family=socket.AF_INET6, dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            said = f"{PORT}: {address.port} is in use on this machine: write another port"
        elif error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            said = (
                f"{HOST}: this machine does not have the address {address.host}: write one that `ip address` "
                "lists, or 0.0.0.0 for all of them"
            )
        else:
            said = f"{PORT}: {address} cannot be served: {error.strerror}: write another port"
        raise ConfigError(said) from error
