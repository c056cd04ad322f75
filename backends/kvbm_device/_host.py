"""Gather and scatter in host memory, by numpy.

Not by torch: its copies start a team of OpenMP threads beside the engine's, and the two fight for the
cores. ``numpy.copyto`` copies in the calling thread and lets other Python threads run meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvbm_core.device import Device, DeviceTraits, Fence, Work
from kvbm_core.errors import KvbmError
from kvbm_core.tier import Region
from kvbm_device._counts import CopyCounts
from kvbm_device._views import PageView

__all__ = ["HostDevice"]

_Bytes: TypeAlias = npt.NDArray[np.uint8]


class _Finished(Work):
    """A copy that was complete when it was returned."""

    def done(self) -> bool:
        return True

    @property
    def given_up(self) -> frozenset[int]:
        return frozenset()


@dataclass(frozen=True, slots=True)
class _Fold:
    """Views of one size, at equal distances, copied by one call a block.

    views 0, 1, 2 of LBHNC:   │ b0 b1 b2 ... │ b0 b1 b2 ... │ b0 b1 b2 ... │
    block 1 of the fold:           ▲              ▲              ▲          shape (3, page)
    """

    pages: _Bytes
    """``(num_blocks, views, page_bytes)``, over the engine's memory."""
    part: slice
    """Where these pages lie in a stored block, in bytes."""


class HostDevice(Device):
    """Blocks in host memory. A copy is complete when `gather` or `scatter` returns.

    **Requires**: views in host memory, valid as long as `owner` is referenced or until `close`.
    """

    def __init__(self, views: Sequence[PageView], num_blocks: int, owner: Any = None) -> None:
        if any(view.on_device for view in views):
            raise KvbmError("a view is not in host memory", operation="open")
        self.counts = CopyCounts()
        self._num_blocks = num_blocks
        self._block_bytes = sum(view.page_bytes for view in views)
        self._traits = DeviceTraits(self._block_bytes, num_blocks)
        self._num_views = len(views)
        self._folds = _fold(views, num_blocks)
        self._owner = owner
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._num_views} pages in {len(self._folds)} copies"
        return f"<HostDevice {self._num_blocks} blocks of {self._block_bytes} bytes, {state}>"

    @property
    def traits(self) -> DeviceTraits:
        """See `Device.traits`."""
        return self._traits

    def claim(self, blocks: Iterable[int], *, wait: bool = False) -> Fence:
        """Nothing is on its way when another call is made."""

    def gather(self, blocks: Sequence[int], regions: Sequence[Region], fence: Fence = None) -> Work:
        """Copy blocks into regions, one each.

        Behaviour:
            - Fills the first `block_bytes` of a region and leaves the rest alone.
            - Checks all arguments before it copies anything.

        Raises:
            IndexError: If there is no such block.
            ValueError: If a region is too short or not in host memory, or the lengths differ.
            KvbmError: If the device is closed.
        """
        self._check("gather", blocks, regions)
        for pages, stored in self._pairs(blocks, regions):
            np.copyto(stored, pages)
        self.counts.gathered_blocks += len(blocks)
        return _Finished()

    def scatter(self, regions: Sequence[Region], blocks: Sequence[int], fence: Fence = None) -> Work:
        """Copy the first `block_bytes` of regions into blocks, one each. Checks and raises as `gather`."""
        self._check("scatter", blocks, regions)
        for pages, stored in self._pairs(blocks, regions):
            np.copyto(pages, stored)
        self.counts.scattered_blocks += len(blocks)
        return _Finished()

    def stream_wait(self, work: Work) -> None:
        """See `Device.stream_wait`. A scatter is complete when it returns."""

    def close(self) -> None:
        """Let go of the engine's memory."""
        self._closed = True
        self._folds = []
        self._owner = None

    def _check(self, operation: str, blocks: Sequence[int], regions: Sequence[Region]) -> None:
        if self._closed:
            raise KvbmError(f"{operation} on a closed device", operation=operation)
        if len(blocks) != len(regions):
            raise ValueError(f"{operation} of {len(blocks)} blocks and {len(regions)} regions")
        for block in blocks:
            if not 0 <= block < self._num_blocks:
                raise IndexError(f"{operation} of block {block}; there are {self._num_blocks}")
        for region in regions:
            if region.on_device or region.nbytes < self._block_bytes:
                raise ValueError(f"{operation} needs {self._block_bytes} bytes of host memory, got {region}")

    def _pairs(self, blocks: Sequence[int], regions: Sequence[Region]) -> Iterator[tuple[_Bytes, _Bytes]]:
        """Give the two sides of each copy, both ``(views, page_bytes)``: engine's and region's."""
        for block, region in zip(blocks, regions, strict=True):
            stored = np.frombuffer(region.view(), dtype=np.uint8)
            for fold in self._folds:
                pages = fold.pages[block]
                yield pages, stored[fold.part].reshape(pages.shape)


def _fold(views: Sequence[PageView], num_blocks: int) -> list[_Fold]:
    folds: list[_Fold] = []
    offset_bytes = first = 0
    while first < len(views):
        count = _equally_spaced(views, first)
        view = views[first]
        spacing_bytes = views[first + 1].address - view.address if count > 1 else view.page_bytes
        shape = (num_blocks, count, view.page_bytes)
        pages = _array(view.address, shape, (view.block_stride_bytes, spacing_bytes, 1))
        end_bytes = offset_bytes + count * view.page_bytes
        folds.append(_Fold(pages, slice(offset_bytes, end_bytes)))
        offset_bytes, first = end_bytes, first + count
    return folds


def _equally_spaced(views: Sequence[PageView], first: int) -> int:
    """Count the views from `first` on that are alike and at equal distances."""
    count = 1
    for before, view in zip(views[first:], views[first + 1 :], strict=False):
        alike = (before.page_bytes, before.block_stride_bytes) == (view.page_bytes, view.block_stride_bytes)
        spacing_bytes = views[first + 1].address - views[first].address
        if not alike or view.address - before.address != spacing_bytes:
            break
        count += 1
    return count


def _array(address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> _Bytes:
    """Lay an array of bytes over memory. The caller keeps the memory alive."""
    interface = {"data": (address, False), "shape": shape, "strides": strides, "typestr": "|u1", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))
