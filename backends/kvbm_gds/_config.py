"""Settings of the NVMe tier."""

from __future__ import annotations

import math
from typing import Literal

from kvbm_core.config import ByteSize
from kvbm_core.errors import ConfigError
from kvbm_core.tier import TierConfig

__all__ = ["GdsConfig"]

_MAX_QUEUE_DEPTH = 1024


class GdsConfig(TierConfig, frozen=True):
    """Settings of a `GdsTier`.

    Raises:
        ConfigError: If a value is out of range; names the key, the value and what to write.
    """

    path: str
    """Directory on a local file system; rank r uses ``<path>/rank<r>``. Made if it is not there."""
    capacity: ByteSize
    """Bytes on the disk, over all ranks, taken when the tier opens. The directory never measures more."""
    engine: Literal["auto", "gds", "posix", "threads"] = "auto"
    """What moves the bytes. auto: the fastest that the probe proves here, and GPUDirect Storage where
    the kernel has nvidia-fs. gds: NIXL's GPUDirect Storage, or its opening fails. posix: NIXL with
    io_uring or libaio. threads: preadv and pwritev in threads."""
    queue_depth: int = 64
    """Blocks on their way at once, 1 to 1024."""
    probe_deadline_s: float = 20.0
    """An engine that has not moved a few blocks correctly by then is not used. Seconds."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path: ''; write a directory on a local disk, like /nvme/kvbm")
        if self.capacity <= 0:
            raise ConfigError(f"capacity: {self.capacity!r}; write a size above 0, like 200GiB")
        if not 1 <= self.queue_depth <= _MAX_QUEUE_DEPTH:
            raise ConfigError(
                f"queue_depth: {self.queue_depth!r}; write a number from 1 to {_MAX_QUEUE_DEPTH}"
            )
        if not 0 < self.probe_deadline_s < math.inf:
            raise ConfigError(f"probe_deadline_s: {self.probe_deadline_s!r}; write seconds above 0, like 20")
