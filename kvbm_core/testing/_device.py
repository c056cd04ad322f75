"""A device without an engine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence

from kvbm_core.device import Device, Fence, Work
from kvbm_core.tier import Region

__all__ = ["MemoryDevice"]


class _Done(Work):
    def done(self) -> bool:
        return True

    @property
    def given_up(self) -> frozenset[int]:
        return frozenset()


class MemoryDevice(Device):
    """Blocks in one bytearray; a copy is complete when the call returns."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self._num_blocks = num_blocks
        self._block_bytes = block_bytes
        self._memory = (ctypes.c_ubyte * (num_blocks * block_bytes))()

    @property
    def block_bytes(self) -> int:
        """See `Device.block_bytes`."""
        return self._block_bytes

    @property
    def num_blocks(self) -> int:
        """See `Device.num_blocks`."""
        return self._num_blocks

    def read(self, block: int) -> bytes:
        """Give a block's bytes."""
        return bytes(self._view(block))

    def write(self, block: int, data: bytes) -> None:
        """Set a block's bytes."""
        self._view(block)[:] = data

    @property
    def deferred(self) -> bool:
        """See `Device.deferred`."""
        return False

    def claim(self, blocks: Iterable[int], *, wait: bool = False) -> Fence:
        """See `Device.claim`."""

    def gather(self, blocks: Sequence[int], regions: Sequence[Region], fence: Fence = None) -> Work:
        """See `Device.gather`."""
        for block, region in zip(blocks, regions, strict=True):
            region.view()[: self._block_bytes] = self._view(block)
        return _Done()

    def scatter(self, regions: Sequence[Region], blocks: Sequence[int], fence: Fence = None) -> Work:
        """See `Device.scatter`."""
        for block, region in zip(blocks, regions, strict=True):
            self._view(block)[:] = region.view()[: self._block_bytes]
        return _Done()

    def pinner(self) -> Callable[[int, int], Callable[[], None]] | None:
        """See `Device.pinner`."""
        return None

    @property
    def cpus(self) -> frozenset[int] | None:
        """See `Device.cpus`."""
        return None

    def close(self) -> None:
        """See `Device.close`."""

    def _view(self, block: int) -> memoryview:
        assert 0 <= block < self._num_blocks
        start = block * self._block_bytes
        return memoryview(self._memory).cast("B")[start : start + self._block_bytes]
