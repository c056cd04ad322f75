"""Settings of the remote tier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from kvbm_core.errors import ConfigError
from kvbm_core.tier import TierConfig

__all__ = ["RemoteConfig", "shown_url"]

_MAX_IN_FLIGHT = 256
_MAX_ATTEMPTS = 10
_EXAMPLE = "write one like s3://bucket/folder, gs://bucket/folder, sftp://host/folder or file:///folder"


class RemoteConfig(TierConfig, frozen=True):
    """Settings of a `RemoteTier`. Its repr shows no option's value, and no password in the URL.

    Raises:
        ConfigError: If a value is out of range; names the key, the value and what to write.
    """

    url: str
    """Where the blocks are. All engines that share them write the same."""
    storage_options: Any = msgspec.field(default_factory=dict)
    """For the file system library, like ``endpoint_url``. Leave credentials to the environment."""
    client: Literal["auto", "obstore", "fsspec"] = "auto"
    """The library for s3. ``auto``: obstore, if it is installed and knows all the options."""
    max_in_flight: int = 16
    """Requests at once, 1 to 256."""
    connect_timeout_s: float = 2.0
    """A server that does not take a connection for so long counts as unreachable. Seconds."""
    timeout_s: float = 5.0
    """An operation, with all its attempts, is given up after so long. Seconds."""
    attempts: int = 2
    """How often an operation is tried whose connection broke, 1 to 10."""
    read_only: bool = False
    """Serve what is there, store nothing. Always so for http and https."""

    def __post_init__(self) -> None:
        _check_url(self.url)
        if not isinstance(self.storage_options, Mapping):
            # Its type is checked here, because a message of the core's would show the value.
            kind = type(self.storage_options).__name__
            raise ConfigError(f"storage_options: a {kind}; write a mapping, like {{endpoint_url: ...}}")
        if not 1 <= self.max_in_flight <= _MAX_IN_FLIGHT:
            raise ConfigError(f"max_in_flight: {self.max_in_flight!r}; write 1 to {_MAX_IN_FLIGHT}")
        if not 0 < self.connect_timeout_s < math.inf:
            raise ConfigError(f"connect_timeout_s: {self.connect_timeout_s!r}; write seconds above 0, like 2")
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(f"timeout_s: {self.timeout_s!r}; write seconds above 0, like 5")
        if not 1 <= self.attempts <= _MAX_ATTEMPTS:
            raise ConfigError(f"attempts: {self.attempts!r}; write 1 to {_MAX_ATTEMPTS}")

    def __repr__(self) -> str:
        options = ", ".join(sorted(map(str, self.storage_options)))
        return (
            f"RemoteConfig(url={shown_url(self.url)!r}, storage_options=<{options}>, client={self.client!r}, "
            f"max_in_flight={self.max_in_flight}, connect_timeout_s={self.connect_timeout_s}, "
            f"timeout_s={self.timeout_s}, attempts={self.attempts}, read_only={self.read_only})"
        )

    @property
    def protocol(self) -> str:
        """What stands before ``://``."""
        return self.url.partition("://")[0].lower()


def shown_url(url: str) -> str:
    """Give a URL without the user, password and query it may carry, also where these are not encoded."""
    protocol, mark, rest = url.partition("://")
    place = rest.partition("?")[0].partition("#")[0]
    user, at, where = place.rpartition("@")
    if ":" in user:
        # A password may have a slash in it.
        return f"{protocol}{mark}***@{where}"
    host, slash, path = place.partition("/")
    if not at and "@" in rest and ":" in host:
        # Or a question mark: then what is before it is a part of the password.
        return f"{protocol}{mark}***"
    # In abfs the part before the @ is the container.
    if "@" in host and protocol.lower() not in ("abfs", "abfss", "az"):
        host = "***@" + host.rpartition("@")[2]
    return protocol + mark + host + slash + path


def _check_url(url: str) -> None:
    shown = shown_url(url)
    protocol, mark, _ = url.partition("://")
    if "::" in url:
        raise ConfigError(f"url: {shown!r} chains file systems; write one alone, like s3://bucket/folder")
    if not mark or not protocol or not protocol.replace("+", "").isalnum():
        raise ConfigError(f"url: {shown!r} is not a URL; {_EXAMPLE}")
    try:
        parts = urlsplit(url)
    except ValueError:
        # Not chained: the message may quote a password.
        raise ConfigError(f"url: {shown!r} is not a URL; {_EXAMPLE}") from None
    if protocol.lower() in ("file", "local"):
        if parts.netloc or not parts.path.strip("/"):
            raise ConfigError(f"url: {shown!r}; write an absolute directory after file://, like file:///kvbm")
    elif not (parts.netloc or protocol.lower() == "memory"):
        raise ConfigError(f"url: {shown!r} names no bucket or host; {_EXAMPLE}")
