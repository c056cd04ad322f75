"""What tests of backends and engines need.

`MemoryDevice` stands for an engine's memory, `FaultyTier` misbehaves on command, `KilledChild` dies in
the midst of stores, `broken_files` has a local medium fail. The conformance suite is
`kvbm_core.testing.suite`: it needs pytest and hypothesis (the extra ``testing``), this module does not.
"""

from kvbm_core.testing import _asserts as _asserts
from kvbm_core.testing._broken_files import broken_files
from kvbm_core.testing._child import KilledChild
from kvbm_core.testing._device import MemoryDevice
from kvbm_core.testing._faults import FaultyTier

__all__ = ["FaultyTier", "KilledChild", "MemoryDevice", "broken_files"]
