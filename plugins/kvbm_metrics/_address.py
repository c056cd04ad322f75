"""Where the metrics are served on a port of their own, from the environment."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvbm_core import ConfigError

__all__ = ["HOST", "PORT", "MetricsAddress", "read_address"]

_SWITCH: Final = "DYN_KVBM_METRICS"
PORT: Final = "DYN_KVBM_METRICS_PORT"
HOST: Final = "DYN_KVBM_METRICS_HOST"
_DEFAULT_PORT: Final = 6880
_DEFAULT_HOST: Final = "127.0.0.1"
_WORDS: Final = {
    "true": True, "1": True, "on": True, "yes": True,
    "": False, "false": False, "0": False, "off": False, "no": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """An address of this machine, and a port."""

    host: str = _DEFAULT_HOST
    """IPv4 or IPv6. ``0.0.0.0`` is every address of the first kind, ``::`` of both."""
    port: int = _DEFAULT_PORT

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """What others ask for the metrics: with this machine's name, where the address is every address."""
        anywhere = ipaddress.ip_address(self.host).is_unspecified
        return f"http://{f'{socket.gethostname()}:{self.port}' if anywhere else self}/metrics"


def read_address(environment: Mapping[str, str], engine: int = 0) -> MetricsAddress | None:
    """Read where metrics are asked for; None where they are not.

    Args:
        environment: What is set.
        engine: Number among those that share a machine for data parallelism. Their ports are in a row.

    Raises:
        ConfigError: For a word that is neither yes nor no, a number that is no port, or an address that
            is none.
    """
    word = environment.get(_SWITCH, "").strip()
    on = _WORDS.get(word.lower())
    if on is None:
        raise ConfigError(f"{_SWITCH}: {word!r} is neither yes nor no: write true or false")
    if not on:
        return None
    text = environment.get(PORT, "").strip() or str(_DEFAULT_PORT)
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise ConfigError(f"{PORT}: {text!r} is not a port: write a number from 1 to 65535")
    port = int(text) + engine
    if port >= 1 << 16:
        raise ConfigError(f"{PORT}: {text} and the {engine} of this engine are {port}, which is not a port: "
                          "write a smaller number")  # fmt: skip
    host = environment.get(HOST, "").strip() or _DEFAULT_HOST
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ConfigError(
            f"{HOST}: {host!r} is not an IP address: write {_DEFAULT_HOST} for this machine alone, 0.0.0.0 "
            "(or :: where there is IPv6) for every address it has, or one of its addresses"
        ) from None
    return MetricsAddress(str(address), port)
