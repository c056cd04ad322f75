"""Device memory for blocks that a `device_direct` tier reads, on their way to the engine's."""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from collections.abc import Sequence
from typing import Any, Final

from kvbm_core.tier import PAGE_BYTES, Region
from kvbm_device._gpu import Gpu

__all__ = ["Places"]

logger = logging.getLogger("kvbm_device")

_MOST: Final = 64
_FEWEST: Final = 4
"""Blocks that a tier may be reading at once, where the memory for them allows."""


class Places:
    """Places of one size, taken when the first is asked for. Safe for several threads.

    Args:
        gpu: The accelerator.
        block_bytes: Of each KV group. A place holds the longest block, and a page for what seals it.
        nbytes: Memory to take at most, but for a few places: a block of states may have 50 MiB.
    """

    def __init__(self, gpu: Gpu, block_bytes: Sequence[int], nbytes: int) -> None:
        self._gpu = gpu
        self._nbytes = nbytes
        self._place_bytes = (-(-max(block_bytes) // PAGE_BYTES) + 1) * PAGE_BYTES
        self._lock = threading.Lock()
        self._free: list[int] | None = None
        self._memory: Any = None
        self._reading = gpu.streams.stream(urgent=True)
        self._bounce = threading.local()

    def stage(self, nbytes: int) -> Region | None:
        """See `kvbm_core.device.Stageable.stage`."""
        assert nbytes <= self._place_bytes, "a place holds a block and a page beside it"
        with self._lock:
            if self._free is None:
                self._free = self._make()
            return Region(self._free.pop(), nbytes, on_device=True) if self._free else None

    def unstage(self, region: Region) -> None:
        """See `kvbm_core.device.Stageable.unstage`."""
        with self._lock:
            assert self._free is not None
            self._free.append(region.address)

    def read(self, region: Region) -> memoryview:
        """See `kvbm_core.device.Stageable.read`. The view is the calling thread's until it calls again."""
        memory = getattr(self._bounce, "memory", None)
        if memory is None or len(memory) < region.nbytes:
            memory = self._bounce.memory = mmap.mmap(-1, region.nbytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._gpu.copies.copy_rows(self._reading, address, 0, region.address, 0, region.nbytes, 1, waits=True)
        self._gpu.events.wait_here(self._gpu.events.record(self._reading))
        return memoryview(memory)[: region.nbytes]

    def close(self) -> None:
        """Give the memory up."""
        self._memory = None

    def _make(self) -> list[int]:
        """Take memory for as many places as there is memory for."""
        count = min(_MOST, max(_FEWEST, self._nbytes // self._place_bytes))
        while count:
            try:
                start, self._memory = self._gpu.memory.allocate(count * self._place_bytes)
            except MemoryError:
                count //= 2
            else:
                return [start + at * self._place_bytes for at in range(count)]
        logger.error(
            "the accelerator has no memory for a block of %d bytes on its way from a disk: lower "
            "gpu_memory_utilization", self._place_bytes,
        )  # fmt: skip
        return []
