"""A device without an engine."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

from kvbm_core.device import Device, DeviceTraits, Fence, Work
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
        self._traits = DeviceTraits(block_bytes, num_blocks)
        self._block_bytes = block_bytes
        self._memory = (ctypes.c_ubyte * (num_blocks * block_bytes))()

    @property
    def traits(self) -> DeviceTraits:
        """See `Device.traits`."""
        return self._traits

    def read(self, block: int) -> bytes:
        """Give a block's bytes."""
        return bytes(self._view(block))

    def write(self, block: int, data: bytes) -> None:
        """Set a block's bytes."""
        self._view(block)[:] = data

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

    def stream_wait(self, work: Work) -> None:
        """See `Device.stream_wait`. A scatter is complete when it returns."""

    def close(self) -> None:
        """See `Device.close`."""

    def _view(self, block: int) -> memoryview:
        assert 0 <= block < self._traits.num_blocks
        start = block * self._block_bytes
        return memoryview(self._memory).cast("B")[start : start + self._block_bytes]
