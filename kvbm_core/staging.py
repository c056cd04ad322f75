"""Host memory for objects on their way: a fixed number of equal, page-aligned slots."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Callable

from kvbm_core.errors import KvbmError
from kvbm_core.tier import Region

__all__ = ["Staging"]

logger = logging.getLogger("kvbm_core")


class Staging:
    """A bounded pool of regions. What nobody has used yet costs no memory.

    Args:
        nbytes: Memory to take at most; at least one slot is made.
        region_bytes: Bytes of each region: the longest object.
        pin: Page-locks ``(address, nbytes)``, see `TierContext.pin`.
    """

    def __init__(
        self, nbytes: int, region_bytes: int, pin: Callable[[int, int], Callable[[], None]] | None = None
    ) -> None:
        slot_bytes = -(-region_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.count = max(1, nbytes // slot_bytes)
        """Slots."""
        self._memory = mmap.mmap(-1, self.count * slot_bytes)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._unpin: Callable[[], None] | None = None
        try:
            self._unpin = pin(base, self.count * slot_bytes) if pin else None
        except KvbmError as error:
            logger.warning("staging goes on with pageable memory; raise the limit, ulimit -l: %s", error)
        # Last in, first out: a slot just used is warm in the processor's cache.
        self._free = [
            Region(base + i * slot_bytes, region_bytes, owner=self._memory)
            for i in reversed(range(self.count))
        ]

    def __repr__(self) -> str:
        return f"<Staging {self.count - len(self._free)}/{self.count} in use>"

    def take(self) -> Region | None:
        """Give a region, or None if all are in use."""
        return self._free.pop() if self._free else None

    def give_back(self, region: Region) -> None:
        """Take back a region that nobody reads or writes any more."""
        self._free.append(region)

    def close(self) -> None:
        """Undo the page lock. The memory goes with the last region."""
        if self._unpin:
            self._unpin()
            self._unpin = None
