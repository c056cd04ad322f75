"""The metrics on a port of their own, as KVBM has them."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from functools import partial
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from kvbm_core import ConfigError
from kvbm_metrics._exporter import Exporter

__all__ = ["MetricsServer", "read_port"]

_SWITCH: Final = "DYN_KVBM_METRICS"
_PORT: Final = "DYN_KVBM_METRICS_PORT"
_DEFAULT_PORT: Final = 6880
_WORDS: Final = {"true": True, "1": True, "on": True, "yes": True}
_WORDS_OFF: Final = {"": False, "false": False, "0": False, "off": False, "no": False}


def read_port(environment: Mapping[str, str]) -> int | None:
    """Read which port is asked for; None where none is.

    Raises:
        ConfigError: For a word that is neither yes nor no, or a number that is no port.
    """
    word = environment.get(_SWITCH, "")
    on = (_WORDS | _WORDS_OFF).get(word.strip().lower())
    if on is None:
        raise ConfigError(f"{_SWITCH}: {word!r} is neither yes nor no: write true or false")
    if not on:
        return None
    text = environment.get(_PORT) or str(_DEFAULT_PORT)
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise ConfigError(f"{_PORT}: {text!r} is not a port: write a number from 1 to 65535")
    return int(text)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Keep each scrape out of the engine's log."""


class MetricsServer:
    """Serves one engine's readings on a port, in a thread of its own.

    Args:
        port: On all interfaces, as the engine's own server.
        label_names: As the engine labels its own metrics.
        label_values: Their values for this engine.
        prefix: Begins every name, see `Exporter`.

    Raises:
        ConfigError: If the port cannot be had.
    """

    def __init__(
        self, port: int, label_names: Sequence[str], label_values: Sequence[object], prefix: str
    ) -> None:
        registry = CollectorRegistry()
        types: dict[Any, Any] = {
            kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)
        }
        self._port = port
        self._exporter = Exporter(types, label_names, {0: label_values}, prefix)
        try:
            self._server = make_server("", port, partial(_answer, make_wsgi_app(registry)), _Server, _Handler)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is in use on this machine" if taken else f"cannot be served: {error}"
            raise ConfigError(f"{_PORT}: {port} {why}: write another port") from error
        self._thread = Thread(target=self._server.serve_forever, name="kvbm-metrics", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<MetricsServer port {self._port}; {self._exporter!r}>"

    def observe(self, readings: Mapping[str, Any]) -> None:
        """Add readings."""
        self._exporter.observe(readings)

    def close(self) -> None:
        """Stop serving. May be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _answer(app: Any, environment: dict[str, Any], start: Any) -> Any:
    """Answer in Prometheus's text format, as vLLM does, whatever else is asked for.

    In OpenMetrics the library writes the colon of vLLM's names as an underscore.
    """
    return app({**environment, "HTTP_ACCEPT": ""}, start)
