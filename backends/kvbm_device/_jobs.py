"""Lists of what a kernel shall move, on their way to the accelerator."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvbm_device._gpu import Event, Gpu

__all__ = ["JOB_BYTES", "Jobs"]

JOB_BYTES: Final = 16
"""Of a block's number and its flat address."""


class Jobs:
    """Pairs (block, flat address) on their way to the kernels, in a ring that both sides have.

    A part of the ring is used again when the kernel that read it has run. Parts are not divided over the
    ring's end; with three times the room that is needed, one is always free without waiting.

    Args:
        gpu: The accelerator.
        most: Pairs that can be on their way at once.
    """

    def __init__(self, gpu: Gpu, most: int) -> None:
        self._events = gpu.events
        self._mover = gpu.copies
        self._rows = rows = 3 * most
        nbytes = -(-rows * JOB_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, nbytes)
        self._host = np.frombuffer(memory, dtype=np.int64)[: 2 * rows].reshape(rows, 2)
        # The page lock last: where there is no memory, nothing is left locked.
        self._device, self._owner = gpu.memory.allocate(nbytes)
        self._address = self._host.ctypes.data
        self._unpin: Callable[[], None] | None = gpu.memory.pin(self._address, nbytes)
        self._head = 0
        self._used: deque[tuple[int, int, Event]] = deque()
        self._sent: tuple[int, int] | None = None

    def send(self, stream: Any, blocks: Sequence[int], flats: npt.NDArray[np.int64]) -> int:
        """Put pairs on their way to the accelerator, and give their address there."""
        count = len(blocks)
        start = self._head if self._head + count <= self._rows else 0
        stop = start + count
        self._wait_for(start, stop)
        self._head = stop
        self._host[start:stop, 0] = blocks
        self._host[start:stop, 1] = flats
        address, nbytes = self._device + start * JOB_BYTES, count * JOB_BYTES
        self._mover.copy_rows(stream, address, 0, self._address + start * JOB_BYTES, 0, nbytes, 1)
        self._sent = (start, stop)
        return address

    def used_until(self, event: Event) -> None:
        """Say when the pairs sent last have been read."""
        assert self._sent is not None
        self._used.append((*self._sent, event))

    def close(self) -> None:
        """Undo the page lock."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None

    def _wait_for(self, start: int, stop: int) -> None:
        """See to it that nothing reads a part of the ring."""
        while self._used and self._events.passed(self._used[0][2]):
            self._used.popleft()
        for first, last, event in self._used:
            if first < stop and start < last:
                self._events.wait_here(event)
