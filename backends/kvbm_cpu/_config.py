"""Settings of the host-memory tier."""

from __future__ import annotations

from kvbm_core.config import ByteSize
from kvbm_core.errors import ConfigError
from kvbm_core.tier import TierConfig

__all__ = ["CpuConfig"]


class CpuConfig(TierConfig, frozen=True):
    """Settings of a `CpuTier`.

    Raises:
        ConfigError: If the capacity is not above 0.
    """

    capacity: ByteSize
    """Bytes, over all ranks; taken when the engine starts and held until it ends."""

    def __post_init__(self) -> None:
        if self.capacity <= 0:
            raise ConfigError(f"capacity: {self.capacity!r}; write a size above 0, like 8GiB")
