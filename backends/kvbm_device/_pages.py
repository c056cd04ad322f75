"""Pages to flat memory and back, by a kernel on the accelerator.

    page of view v, block b:   bases[v] + b * stride             flat memory of a job: address + offsets[v]

A table holds the views that are alike, so one launch moves all their pages. Each program copies chunks of
a page: program p takes the chunks p, p + programs, p + 2 * programs, ... of all there are.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvbm_device._views import PageView

__all__ = ["Addresses", "PageMover", "PageSet", "PageTable", "make_page_mover", "page_table"]

Addresses: TypeAlias = npt.NDArray[np.uint64]

_CHUNK_BYTES: Final = 16_384
"""What one program copies at once. Enough loads on their way to hide their latency, few enough registers."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class PageSet:
    """Views of one page size and one stride."""

    bases: tuple[int, ...]
    """Address of block 0's page, of each view."""
    offsets: tuple[int, ...]
    """Where the page lies in a stored block, of each view, in bytes."""
    stride_bytes: int
    page_bytes: int
    word_bytes: int
    """Largest power of two, at most 16, that divides every address and size of the set."""


@dataclass(frozen=True, slots=True)
class PageTable:
    """All pages of a block of one KV group."""

    sets: tuple[PageSet, ...]
    block_bytes: int
    num_blocks: int


def page_table(views: Sequence[PageView], num_blocks: int) -> PageTable:
    """Put views together that one launch can serve.

    Args:
        views: Of one KV group, in the order in which a stored block holds their pages; may be empty.
        num_blocks: Blocks the engine has.
    """
    kinds: dict[tuple[int, int], list[tuple[int, int]]] = {}
    offset_bytes = 0
    for view in views:
        kinds.setdefault((view.block_stride_bytes, view.page_bytes), []).append((view.address, offset_bytes))
        offset_bytes += view.page_bytes
    sets = []
    for (stride_bytes, page_bytes), places in kinds.items():
        bases, offsets = zip(*places, strict=True)
        # One block more than once: the flat memory of neighbouring blocks is one block apart.
        word_bytes = math.gcd(16, stride_bytes, page_bytes, offset_bytes, *bases, *offsets)
        sets.append(PageSet(bases, offsets, stride_bytes, page_bytes, word_bytes))
    return PageTable(tuple(sets), offset_bytes, num_blocks)


class PageMover(Protocol):
    """Moves the pages of blocks, on torch's current stream."""

    reaches_host: bool
    """True if flat addresses may be in host memory, and `programs` counts."""

    def __call__(
        self, table: PageTable, jobs: int, count: int, flat: int, *, gather: bool, programs: int
    ) -> None:
        """See `kvbm_device._gpu.Copies.move_pages`."""


def make_page_mover(device: str = "cuda") -> PageMover:
    """Make the mover: a Triton kernel, or torch's indexing where Triton is missing.

    Args:
        device: Where tables are put; ``cpu`` for Triton's interpreter and for tests.
    """
    try:
        import triton  # noqa: F401 - only to see whether it is there
    except ImportError:
        return TorchMover(device)
    return TritonMover(device)


class TritonMover:
    """One launch for each set of views."""

    reaches_host = True

    def __init__(self, device: str) -> None:
        from kvbm_device._kernel import move_pages_kernel

        self._kernel = move_pages_kernel
        self._device = device
        self._tables: MutableMapping[PageSet, Any] = weakref.WeakKeyDictionary()
        """Weak: an engine that wakes has its pages elsewhere."""

    def __call__(
        self, table: PageTable, jobs: int, count: int, flat: int, *, gather: bool, programs: int
    ) -> None:
        """See `PageMover`."""
        for pages in table.sets:
            word_bytes = min(pages.word_bytes, 8)
            words = min(_CHUNK_BYTES, _power_of_two(pages.page_bytes)) // word_bytes
            chunks = -(-pages.page_bytes // (words * word_bytes))
            total = count * len(pages.bases) * chunks
            self._kernel[(min(total, programs or total),)](
                self._table(pages), jobs, pages.stride_bytes, pages.page_bytes // word_bytes, total,
                VIEWS=len(pages.bases), CHUNKS=chunks, WORDS=words, WORD_BYTES=word_bytes,
                ALIGNED=pages.word_bytes == 16, GATHER=gather, num_warps=8 if programs else 4,
            )  # fmt: skip

    def _table(self, pages: PageSet) -> Any:
        """Give the pairs (base, offset) of a set, on the device."""
        if pages not in self._tables:
            import torch

            pairs = [list(pair) for pair in zip(pages.bases, pages.offsets, strict=True)]
            self._tables[pages] = torch.tensor(pairs, dtype=torch.int64).to(self._device)
        return self._tables[pages]


class TorchMover:
    """torch's own indexing, view by view. Flat memory must be on the device, block after block."""

    reaches_host = False

    def __init__(self, device: str) -> None:
        self._device = device

    def __call__(
        self, table: PageTable, jobs: int, count: int, flat: int, *, gather: bool, programs: int
    ) -> None:
        """See `PageMover`."""
        import torch

        blocks = self._over(jobs, (count, 2), (16, 8), torch.int64)[:, 0]
        for pages in table.sets:
            word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(pages.word_bytes, torch.int64)
            words = pages.page_bytes // word.itemsize
            for base, offset in zip(pages.bases, pages.offsets, strict=True):
                paged = self._over(base, (table.num_blocks, words), (pages.stride_bytes, word.itemsize), word)
                part = self._over(flat + offset, (count, words), (table.block_bytes, word.itemsize), word)
                if gather:
                    part.copy_(paged.index_select(0, blocks))
                else:
                    paged.index_copy_(0, blocks, part)

    def _over(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> Any:
        """Lay a tensor over memory."""
        import torch

        kind = "|u1" if dtype is torch.uint8 else f"<i{dtype.itemsize}"
        interface = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": kind,
            "version": 3,
        }
        if self._device == "cpu":
            return torch.from_numpy(np.asarray(SimpleNamespace(__array_interface__=interface)))
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=self._device)


def _power_of_two(value: int) -> int:
    """Round up to a power of two."""
    return 1 << (value - 1).bit_length()
