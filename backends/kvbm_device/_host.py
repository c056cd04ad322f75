"""Gather and scatter in host memory, by numpy.

Not by torch: its copies start a team of OpenMP threads beside the engine's, and the two fight for the
cores. ``numpy.copyto`` copies in the calling thread and lets other Python threads run meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvbm_core.device import Device, DeviceTraits, Fence, Work
from kvbm_core.errors import KvbmError
from kvbm_core.tier import Region
from kvbm_device._counts import CopyCounts
from kvbm_device._layout import Groups, Layout
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

    **Requires**: views in host memory, valid as long as the layout's tensors are referenced or until `close`.
    """

    def __init__(self, layout: Layout) -> None:
        if layout.on_device:
            raise KvbmError("a view is not in host memory", operation="open")
        self.counts = CopyCounts()
        self._layout = layout
        self._block_bytes = layout.block_bytes
        self._traits = DeviceTraits(self._block_bytes, layout.num_blocks)
        self._folds = _folds(layout)
        self._closed = False

    def __repr__(self) -> str:
        views, copies = (sum(map(len, each)) for each in (self._layout.groups, self._folds))
        state = "closed" if self._closed else f"{views} pages in {copies} copies"
        return f"<HostDevice {self._layout}, {state}>"

    @property
    def traits(self) -> DeviceTraits:
        """See `Device.traits`."""
        return self._traits

    def claim(self, blocks: Iterable[int], *, wait: bool = False) -> Fence:
        """Nothing is on its way when another call is made."""

    def gather(
        self, blocks: Sequence[int], regions: Sequence[Region], fence: Fence = None, group: int = 0
    ) -> Work:
        """Copy blocks of a KV group into regions, one each.

        Behaviour:
            - Fills the first ``block_bytes[group]`` bytes of a region and leaves the rest alone.
            - Checks all arguments before it copies anything.

        Raises:
            IndexError: If there is no such block.
            ValueError: If there is no such group, a region is too short or not in host memory, or the
                lengths differ.
            KvbmError: If the device is closed.
        """
        self._check("gather", blocks, regions, group)
        for pages, stored in self._pairs(blocks, regions, group):
            np.copyto(stored, pages)
        self.counts.gathered_bytes += len(blocks) * self._block_bytes[group]
        return _Finished()

    def scatter(
        self, regions: Sequence[Region], blocks: Sequence[int], fence: Fence = None, group: int = 0
    ) -> Work:
        """Copy the first ``block_bytes[group]`` bytes of regions into blocks. Raises as `gather`."""
        self._check("scatter", blocks, regions, group)
        for pages, stored in self._pairs(blocks, regions, group):
            np.copyto(pages, stored)
        self.counts.scattered_bytes += len(blocks) * self._block_bytes[group]
        return _Finished()

    def stream_wait(self, work: Work) -> None:
        """See `Device.stream_wait`. A scatter is complete when it returns."""

    def rebind(self, tensors: Groups) -> None:
        """Use the same layers' tensors at other addresses, as an engine has them that slept and woke.

        **Requires**: no other call is under way. The tensors before are kept until then.

        Raises:
            ConfigError: If a tensor is another one than before in anything but its address.
            KvbmError: If the device is closed.
        """
        if self._closed:
            raise KvbmError("rebind of a closed device", operation="rebind")
        self._layout = self._layout.moved(tensors)
        self._folds = _folds(self._layout)

    def close(self) -> None:
        """Let go of the engine's memory."""
        self._closed = True
        self._folds = []
        self._layout = replace(self._layout, tensors=())

    def _check(self, operation: str, blocks: Sequence[int], regions: Sequence[Region], group: int) -> None:
        if self._closed:
            raise KvbmError(f"{operation} on a closed device", operation=operation)
        self._layout.check(operation, blocks, regions, group, staged=False)

    def _pairs(
        self, blocks: Sequence[int], regions: Sequence[Region], group: int
    ) -> Iterator[tuple[_Bytes, _Bytes]]:
        """Give the two sides of each copy, both ``(views, page_bytes)``: engine's and region's."""
        if not self._block_bytes[group]:
            return
        for block, region in zip(blocks, regions, strict=True):
            stored = np.frombuffer(region.view(), dtype=np.uint8)
            for fold in self._folds[group]:
                pages = fold.pages[block]
                yield pages, stored[fold.part].reshape(pages.shape)


def _folds(layout: Layout) -> list[list[_Fold]]:
    return [_fold(views, layout.num_blocks) for views in layout.groups]


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
