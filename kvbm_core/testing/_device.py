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
    """Blocks in one bytearray; a copy is complete when the call returns.

    As in an engine, all KV groups draw their blocks from one pool: a block is as long as the longest group
    needs, and who writes it for one group overwrites what another had there::

        block 0                     block 1
        ┌───────────────────────────┬───────────────────────────┬── ─ ─
        │ group 0: all of it        │                           │
        │ group 1: ─────────►       │                           │

    Args:
        num_blocks: Number of blocks.
        block_bytes: Bytes of one block: of each KV group, or of the only one. 0 for a group of which there
            is no layer here.
    """

    def __init__(self, num_blocks: int, block_bytes: int | tuple[int, ...]) -> None:
        groups = (block_bytes,) if isinstance(block_bytes, int) else tuple(block_bytes)
        self._traits = DeviceTraits(groups, num_blocks)
        self._step_bytes = max(groups)
        self._memory = (ctypes.c_ubyte * (num_blocks * self._step_bytes))()

    @property
    def traits(self) -> DeviceTraits:
        """See `Device.traits`."""
        return self._traits

    def read(self, block: int, group: int = 0) -> bytes:
        """Give a block's bytes, as a KV group has them."""
        return bytes(self._view(block, group))

    def write(self, block: int, data: bytes, group: int = 0) -> None:
        """Set a block's bytes, as a KV group has them."""
        self._view(block, group)[:] = data

    def claim(self, blocks: Iterable[int], *, wait: bool = False) -> Fence:
        """See `Device.claim`."""

    def gather(
        self, blocks: Sequence[int], regions: Sequence[Region], fence: Fence = None, group: int = 0
    ) -> Work:
        """See `Device.gather`."""
        for block, region in zip(blocks, regions, strict=True):
            source = self._view(block, group)
            region.view()[: len(source)] = source
        return _Done()

    def scatter(
        self, regions: Sequence[Region], blocks: Sequence[int], fence: Fence = None, group: int = 0
    ) -> Work:
        """See `Device.scatter`."""
        for block, region in zip(blocks, regions, strict=True):
            target = self._view(block, group)
            target[:] = region.view()[: len(target)]
        return _Done()

    def stream_wait(self, work: Work) -> None:
        """See `Device.stream_wait`. A scatter is complete when it returns."""

    def close(self) -> None:
        """See `Device.close`."""

    def _view(self, block: int, group: int) -> memoryview:
        groups = self._traits.block_bytes
        if not 0 <= group < len(groups):
            raise ValueError(f"there is no KV group {group}: the device has {len(groups)}")
        if not 0 <= block < self._traits.num_blocks:
            raise ValueError(f"there is no block {block}: the device has {self._traits.num_blocks}")
        start = block * self._step_bytes
        return memoryview(self._memory).cast("B")[start : start + groups[group]]
