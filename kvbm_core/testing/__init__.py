"""What tests of backends and engines need: a device in plain memory, and tiers that misbehave."""

from kvbm_core.testing._device import MemoryDevice
from kvbm_core.testing._faults import FaultyTier

__all__ = ["FaultyTier", "MemoryDevice"]
