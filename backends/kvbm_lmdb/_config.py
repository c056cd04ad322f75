"""Settings of the LMDB tier."""

from __future__ import annotations

import math

from kvbm_core.config import ByteSize
from kvbm_core.errors import ConfigError
from kvbm_core.tier import TierConfig

__all__ = ["LmdbConfig"]

_MAX_READERS = 16


class LmdbConfig(TierConfig, frozen=True):
    """Settings of an `LmdbTier`.

    Raises:
        ConfigError: If a value is out of range; names the key, the value and what to write.
    """

    path: str
    """Directory on a local file system; rank r uses ``<path>/rank<r>``. Made if it is not there."""
    capacity: ByteSize
    """Bytes on the disk, over all ranks. The directory never measures more."""
    sync_interval_s: float = 1.0
    """While there is something new, what was stored is flushed to the disk this often. Seconds."""
    readers: int = 2
    """Threads that load, 1 to 16."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path: ''; write a directory on a local disk, like /nvme/kvbm")
        if self.capacity <= 0:
            raise ConfigError(f"capacity: {self.capacity!r}; write a size above 0, like 200GiB")
        if not 0 < self.sync_interval_s < math.inf:
            raise ConfigError(f"sync_interval_s: {self.sync_interval_s!r}; write seconds above 0, like 1.0")
        if not 1 <= self.readers <= _MAX_READERS:
            raise ConfigError(f"readers: {self.readers!r}; write a number of threads, 1 to {_MAX_READERS}")
