"""Reads a server's `/metrics`, and keeps of it what the table of `kvbm_metrics` has."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias
from urllib.parse import urlsplit

from kvbm_core.errors import ConfigError, KvbmError
from kvbm_metrics import Kind, read_page

__all__ = ["Engine", "Labels", "Scrape", "fetch", "parse", "read_url"]

ANSWER_LIMIT_S: Final = 5.0
_MOST_BYTES: Final = 64 << 20

Labels: TypeAlias = tuple[str, ...]
"""Values, in the order of the metric's row in the table; behind them the bound, of a histogram's bucket."""
Engine: TypeAlias = tuple[str, str]
"""The model's name, and the engine's number. Empty where the server names none."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """What a server said at one moment."""

    engines: Mapping[Engine, Mapping[str, Mapping[Labels, float]]] = field(default_factory=dict)
    """Of each engine the values, by the metric's name in the table and its labels."""


def read_url(text: str) -> str:
    """Give the address of the metrics: a host and a port are enough.

    Raises:
        ConfigError: It is no such address.
    """
    example = "write one like http://127.0.0.1:8000"
    address = text if "://" in text else f"http://{text}"
    try:
        url = urlsplit(address)
        known = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        known = False
    if not known or not address.isascii() or not address.isprintable() or " " in address:
        raise ConfigError(f"{text!r} is no address of a server; {example}")
    if url.username is not None:
        raise ConfigError(f"the address of {url.hostname} has a user's name, which is not sent; {example}")
    path = "/metrics" if url.path.rstrip("/") in ("", "/v1") else url.path
    return url._replace(path=path, fragment="").geturl()


def fetch(url: str) -> str:
    """Ask a server for its metrics, past any proxy, as Prometheus does.

    Raises:
        KvbmError: It does not answer, or with something else; says what to do.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=ANSWER_LIMIT_S) as answer:
            text: bytes = answer.read(_MOST_BYTES + 1)
            if answer.length and len(text) <= _MOST_BYTES:  # Of what was announced, so much is missing.
                raise http.client.IncompleteRead(text, answer.length)
    except urllib.error.HTTPError as error:
        error.close()
        raise KvbmError(
            f"{url} answers {error.code} {error.reason}; name the address where the server has its metrics"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        what = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise KvbmError(
            f"{url} does not answer: {what}; is the server running, at this address and port?"
        ) from error
    if len(text) > _MOST_BYTES:
        raise KvbmError(f"{url} answers more than {_MOST_BYTES >> 20} MiB, which no server's metrics are")
    return text.decode(errors="replace")


def parse(text: str, url: str) -> Scrape:
    """Read metrics from Prometheus's text format.

    Returns:
        Without engines where none has reported yet: each does with its first step.

    Raises:
        KvbmError: The text is something else, or none of the metrics is ours; says what to do.
    """
    try:
        page = read_page(text)
    except ValueError as error:
        raise KvbmError(f"{url} answers something that is no metrics; name a server's /metrics") from error
    if not page.has_ours:
        raise KvbmError(
            f"{url} has no metrics of kvbm; start vLLM with KvbmConnector in --kv-transfer-config and "
            "without --disable-log-stats, or with DYN_KVBM_METRICS=true and name that port, 6880 by default"
        )
    engines: dict[Engine, dict[str, dict[Labels, float]]] = {}
    for _, labels, value, metric in page.samples:
        if metric is not None:
            engine = (labels.get("model_name", ""), labels.get("engine", ""))
            names = (*metric.labels, "le") if metric.kind is Kind.HISTOGRAM else metric.labels
            key = tuple(labels.get(name, "") for name in names)
            values = engines.setdefault(engine, {}).setdefault(metric.name, {})
            values[key] = values.get(key, 0.0) + value
    return Scrape(engines)
