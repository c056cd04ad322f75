"""Settings, and what they are together with the environment."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from kvbm_core import ConfigError

__all__ = ["Access", "EtcdConfig", "init_timeout_s", "read_access"]

_ENDPOINT: Final = re.compile(r"(?:(?P<scheme>https?)://)?(?P<target>[^/@\s,]+:\d+)/?")
_LEAST_LEASE_S: Final = 2
_INIT_TIMEOUT_S: Final = 120.0
_INIT_TIMEOUT_VARIABLE: Final = "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS"


class EtcdConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of an `EtcdCoordinator`. It holds no secret: these are in the environment.

    Raises:
        ConfigError: If a value is out of range; names the key, the value and what to write.
    """

    endpoints: tuple[str, ...] = ()
    """Of one cluster, tried in turn. Empty: ``ETCD_ENDPOINTS``, or ``http://127.0.0.1:2379``."""
    prefix: str = "/kvbm"
    """Under which all keys are."""
    lease_s: int = 10
    """A process that dies is listed so much longer. Seconds, at least 2."""
    timeout_s: float = 2.0
    """An endpoint that has not answered by then counts as away. Seconds."""
    init_timeout_s: float | None = None
    """How long the leader waits for its workers. None: ``DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS``,
    or 120. Seconds."""
    ca_file: str | None = None
    """Certificate of who signed the servers' certificates. None: ``ETCD_AUTH_CA``, or the usual ones."""
    cert_file: str | None = None
    """The client's certificate. None: ``ETCD_AUTH_CLIENT_CERT``, or none."""
    key_file: str | None = None
    """Its key. None: ``ETCD_AUTH_CLIENT_KEY``, or none."""
    metrics_address: str | None = None
    """Listed as the address of this engine's metrics. None: what the engine says."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(/[\w.-]+)+", self.prefix):
            raise ConfigError(f"prefix: {self.prefix!r}; write a path like /kvbm")
        if self.lease_s < _LEAST_LEASE_S:
            raise ConfigError(f"lease_s: {self.lease_s!r}; write at least {_LEAST_LEASE_S}")
        for key in ("timeout_s", "init_timeout_s"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{key}: {value!r}; write seconds above 0")


@dataclass(frozen=True, slots=True)
class Access:
    """How etcd is reached. Its repr shows no secret."""

    targets: tuple[str, ...]
    """Each ``host:port``."""
    tls: bool = False
    ca: bytes | None = field(default=None, repr=False)
    cert: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        scheme = "https" if self.tls else "http"
        return ", ".join(f"{scheme}://{target}" for target in self.targets)


def read_access(config: EtcdConfig) -> Access:
    """Join the settings with the environment and read the files they name.

    Raises:
        ConfigError: If something is wrong or does not fit together. No message has a secret in it.
    """
    written = config.endpoints or os.environ.get("ETCD_ENDPOINTS", "http://127.0.0.1:2379").split(",")
    found = [_ENDPOINT.fullmatch(endpoint.strip()) for endpoint in written]
    schemes = {match["scheme"] or "http" for match in found if match}
    if None in found or len(schemes) != 1:
        # The value is not shown: it may have a password in it.
        raise ConfigError(
            f"endpoints: number {found.index(None) + 1 if None in found else 1} of {len(found)}; write "
            "http://host:port, or https://host:port for all of them, and no user or password"
        )
    tls = schemes == {"https"}
    ca, cert, key = (
        _read(name, getattr(config, name) or os.environ.get(variable))
        for name, variable in (
            ("ca_file", "ETCD_AUTH_CA"),
            ("cert_file", "ETCD_AUTH_CLIENT_CERT"),
            ("key_file", "ETCD_AUTH_CLIENT_KEY"),
        )
    )
    if (cert is None) != (key is None):
        raise ConfigError("cert_file and key_file: only one of them is given; write both, or neither")
    if (ca or cert) and not tls:
        raise ConfigError("ca_file, cert_file: given, but the endpoints begin with http://; write https://")
    user, password = os.environ.get("ETCD_AUTH_USERNAME"), os.environ.get("ETCD_AUTH_PASSWORD")
    if bool(user) != bool(password):
        raise ConfigError(
            "ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD: only one of them is set; set both, or neither"
        )
    targets = tuple(match["target"] for match in found if match)
    return Access(targets, tls, ca, cert, key, user or None, password or None)


def init_timeout_s(config: EtcdConfig) -> float:
    """Give how long the leader waits for its workers.

    Raises:
        ConfigError: If the environment has something else than seconds.
    """
    if config.init_timeout_s is not None:
        return config.init_timeout_s
    written = os.environ.get(_INIT_TIMEOUT_VARIABLE)
    if written is None:
        return _INIT_TIMEOUT_S
    if not re.fullmatch(r"\d+(\.\d+)?", written) or not float(written):
        raise ConfigError(f"{_INIT_TIMEOUT_VARIABLE}: {written!r}; write seconds above 0, like 120")
    return float(written)


def _read(name: str, path: str | None) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: {path}: {error.strerror}; write the path of a PEM file") from error
