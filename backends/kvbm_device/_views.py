"""An engine's KV tensors, whatever their shape, as byte views ``(num_blocks, page_bytes)``.

A view is one page of every block, at a constant distance:

    address                  + stride                 + 2 * stride
    ├─ page of block 0 ─┤    ├─ page of block 1 ─┤    ├─ page of block 2 ─┤   ...

    LBHNC, layers outermost: one view a layer, stride == page
        │ L0: b0 b1 b2 ... │ L1: b0 b1 b2 ... │
    BLHNC, blocks outermost: all layers of a block are neighbours, one view in all
        │ b0: L0 L1 ... │ b1: L0 L1 ... │
    ROCM_ATTN (2, B, N, H, D): K and V apart, two views a layer
        │ K: b0 b1 b2 ... │ V: b0 b1 b2 ... │

A stored block is the pages in the order of the views. That order must be the same in every process,
so it is: allocations in the order the layers name them, then the offset within the allocation. An
address decides nothing but which tensors share an allocation.

Each KV group has views of its own layers. Groups lie over each other, since an engine draws their blocks
from one pool: a block's number says which memory it has, and its group what is in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from kvbm_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["Layers", "PageView", "group_views", "page_views"]

Layers: TypeAlias = "Mapping[str, torch.Tensor | Sequence[torch.Tensor]]"
"""An engine's KV tensors, by layer, in the engine's order."""

_MAX_PIECES: Final = 65_536
"""Of one block in one tensor. More means that channels are not contiguous, and a copy would crawl."""


@dataclass(frozen=True, slots=True)
class PageView:
    """One page of every block: block ``b`` has it at ``address + b * block_stride_bytes``."""

    address: int
    """Of block 0's page."""
    page_bytes: int
    block_stride_bytes: int
    """From one block's page to the next one's, at least `page_bytes`."""
    on_device: bool
    """False: host memory. True: memory of an accelerator."""


@dataclass(frozen=True, slots=True)
class _Storage:
    """One allocation of the engine's."""

    index: int
    """Its place among the allocations, in the order in which the layers name them."""
    address: int
    nbytes: int
    on_device: bool


@dataclass(frozen=True, slots=True)
class _Piece:
    """Contiguous bytes of each block in one allocation."""

    storage: _Storage
    offset_bytes: int
    """Of block 0's piece, from the start of the allocation."""
    stride_bytes: int
    nbytes: int
    source: str = field(compare=False)
    """The tensor it came from, for messages."""

    @property
    def address(self) -> int:
        return self.storage.address + self.offset_bytes

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.nbytes


def page_views(tensors: Layers, num_blocks: int) -> list[PageView]:
    """Find the pages of a block in the tensors of all layers of one KV group.

    Behaviour:
        - The first dimension counts the blocks, or the kernel blocks a block is split into. Where it
          cannot, the second does.
        - Bytes that several layers share are one page.
        - Pieces of one allocation that lie directly behind one another are one page.
        - The order depends on the order of the layers and on their geometry, never on addresses.

    Args:
        tensors: By layer, in the engine's order; of any shape that the README lists.
        num_blocks: Blocks the engine has, counted as its scheduler counts them.

    Raises:
        ConfigError: If a tensor's blocks cannot be told apart.
    """
    return group_views([tensors], num_blocks)[0]


def group_views(groups: Sequence[Layers], num_blocks: int) -> list[list[PageView]]:
    """Find the pages of a block of each KV group, each as `page_views` finds them.

    Behaviour:
        - A group without layers has no pages.
        - Pages of two groups may share bytes if they are of one block.

    Raises:
        ConfigError: If a tensor's blocks cannot be told apart, or share bytes with another block.
    """
    grouped = [_merge(_pieces(tensors, num_blocks)) for tensors in groups]
    pieces = list(itertools.chain(*grouped))
    if not pieces:
        raise ConfigError("the engine registered no KV memory", operation="page_views")
    for piece in pieces:
        _check_bounds(piece, num_blocks)
    _check_disjoint(pieces, num_blocks)
    return [
        [PageView(p.address, p.nbytes, p.stride_bytes, p.storage.on_device) for p in pieces]
        for pieces in grouped
    ]


def _pieces(tensors: Layers, num_blocks: int) -> Iterator[_Piece]:
    storages: dict[tuple[str, int], _Storage] = {}
    for layer, value in tensors.items():
        for tensor in value if isinstance(value, Sequence) else [value]:
            if tensor.numel():  # A Mamba state may be empty: nothing to keep.
                yield from _tensor_pieces(layer, tensor, num_blocks, _storage(tensor, storages))


def _storage(tensor: torch.Tensor, known: dict[tuple[str, int], _Storage]) -> _Storage:
    """Find the tensor's allocation among those known, or add it to them."""
    memory = tensor.untyped_storage()
    key = (str(tensor.device), memory.data_ptr())
    on_device = tensor.device.type != "cpu"
    return known.setdefault(key, _Storage(len(known), memory.data_ptr(), memory.nbytes(), on_device))


def _tensor_pieces(layer: str, tensor: torch.Tensor, num_blocks: int, storage: _Storage) -> Iterator[_Piece]:
    """Split one tensor's block into the longest contiguous pieces, outer dimensions first."""
    source = _describe(layer, tensor, num_blocks)
    stride_bytes, dims = _split_blocks(tensor, num_blocks, source)
    run_bytes, outer = _inner_run(dims, tensor.element_size())
    count = int(np.prod([size for size, _ in outer], dtype=np.int64))
    if count > _MAX_PIECES:
        raise ConfigError(f"{source}: a block is {count} pieces of {run_bytes} bytes, too many to copy")
    start_bytes = tensor.storage_offset() * tensor.element_size()
    for index in itertools.product(*(range(size) for size, _ in outer)):
        offset_bytes = start_bytes + sum(i * stride for i, (_, stride) in zip(index, outer, strict=True))
        yield _Piece(storage, offset_bytes, stride_bytes, run_bytes, source)


def _describe(layer: str, tensor: torch.Tensor, num_blocks: int) -> str:
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    return f"layer {layer!r} of shape {shape}, strides {strides}, num_blocks {num_blocks}"


def _split_blocks(tensor: torch.Tensor, num_blocks: int, source: str) -> tuple[int, list[tuple[int, int]]]:
    """Take the dimension that counts blocks apart.

    Kernel blocks (an attention kernel may work on a fraction of the engine's block) make it
    ``num_blocks * k`` long; ``k`` then becomes one more dimension inside the block.

    Returns:
        The block stride in bytes, and ``(size, stride in bytes)`` of every other dimension.
    """
    itemsize = tensor.element_size()
    dims = [(n, stride * itemsize) for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    size, stride_bytes = dims.pop(_block_dim(tuple(tensor.shape), num_blocks, source))
    kernel_blocks = size // num_blocks
    return stride_bytes * kernel_blocks, [*dims, (kernel_blocks, stride_bytes)]


def _block_dim(shape: tuple[int, ...], num_blocks: int, source: str) -> int:
    """Say which dimension counts the blocks: 0, or 1 behind K and V as ROCM_ATTN has it."""
    if num_blocks < 1:
        raise ConfigError(f"{source}: num_blocks must be at least 1")
    if len(shape) < 2:
        raise ConfigError(f"{source}: one dimension says nothing of where blocks lie; pass the layer's view")
    first, second = (size % num_blocks == 0 for size in shape[:2])
    # With five dimensions K and V may stand before the blocks or behind them; two blocks look like K
    # and V. With fewer the blocks always come first. One block is the whole tensor either way.
    if first and second and len(shape) == 5 and num_blocks > 1:
        raise ConfigError(f"{source}: dimension 0 and 1 may both count the blocks; use another num_blocks")
    if not first and not second:
        raise ConfigError(f"{source}: neither dimension 0 nor 1 is a multiple of num_blocks")
    return 0 if first else 1


def _inner_run(dims: Iterable[tuple[int, int]], itemsize: int) -> tuple[int, list[tuple[int, int]]]:
    """Grow a contiguous run from the smallest stride outwards, in memory order whatever the logical order.

    Returns:
        The run in bytes, and ``(size, stride in bytes)`` of the dimensions left over, outermost first.
    """
    run_bytes = itemsize
    outer: list[tuple[int, int]] = []
    # A stride of 0 (an expanded dimension) is the same bytes again.
    for size, stride in sorted((d for d in dims if d[0] > 1 and d[1] > 0), key=lambda d: d[1]):
        if stride == run_bytes and not outer:
            run_bytes *= size
        else:
            outer.append((size, stride))
    return run_bytes, outer[::-1]


def _merge(pieces: Iterable[_Piece]) -> list[_Piece]:
    """Join pieces that touch or overlap, within one allocation and one stride, and put them in order.

    Overlapping ones are layers that share memory. Whether the page then fits the stride is checked later.
    """
    merged: list[_Piece] = []
    distinct = dict.fromkeys(pieces)
    for piece in sorted(distinct, key=lambda p: (p.storage.index, p.stride_bytes, p.offset_bytes)):
        last = merged[-1] if merged else None
        same = last and (last.storage, last.stride_bytes) == (piece.storage, piece.stride_bytes)
        if last and same and piece.offset_bytes <= last.end_bytes:
            nbytes = max(last.end_bytes, piece.end_bytes) - last.offset_bytes
            merged[-1] = replace(last, nbytes=nbytes)
        else:
            merged.append(piece)
    return sorted(merged, key=lambda p: (p.storage.index, p.offset_bytes, p.stride_bytes))


def _check_bounds(piece: _Piece, num_blocks: int) -> None:
    """Refuse pages that overlap the next block's, or leave the allocation."""
    if num_blocks > 1 and piece.stride_bytes < piece.nbytes:
        raise ConfigError(
            f"{piece.source}: blocks overlap: pages of {piece.nbytes} bytes every {piece.stride_bytes} bytes"
        )
    last_bytes = piece.end_bytes + (num_blocks - 1) * piece.stride_bytes
    if last_bytes > piece.storage.nbytes:
        raise ConfigError(
            f"{piece.source}: reaches byte {last_bytes} of an allocation of {piece.storage.nbytes}; "
            "was the memory released?"
        )


def _check_disjoint(pieces: Sequence[_Piece], num_blocks: int) -> None:
    """Refuse blocks that share bytes: writing one would change another.

    Only views whose whole ranges cross are compared block by block; with layers outermost none do, and of
    groups only those whose pages differ.
    """
    cluster: list[_Piece] = []
    end = 0
    distinct = {(p.address, p.stride_bytes, p.nbytes): p for p in pieces}
    for piece in sorted(distinct.values(), key=lambda p: p.address):
        if cluster and piece.address >= end:
            _check_cluster(cluster, num_blocks)
            cluster = []
        cluster.append(piece)
        end = max(end, piece.address + (num_blocks - 1) * piece.stride_bytes + piece.nbytes)
    _check_cluster(cluster, num_blocks)


def _check_cluster(cluster: Sequence[_Piece], num_blocks: int) -> None:
    """Compare all pages of views whose ranges cross: ``len(cluster) * num_blocks`` of them."""
    if len(cluster) < 2:
        return
    columns = np.array([(p.address, p.stride_bytes, p.nbytes) for p in cluster], dtype=np.uint64)
    blocks = np.arange(num_blocks, dtype=np.uint64)
    starts = (columns[:, 0, None] + columns[:, 1, None] * blocks).ravel()
    ends = starts + np.repeat(columns[:, 2], num_blocks)
    order = np.argsort(starts)
    ends = ends[order]
    furthest = np.maximum.accumulate(ends)
    # Of the pages before each, the one that reaches furthest. If any overlaps a page of another block, so
    # does this one, there or earlier.
    last = np.maximum.accumulate(np.where(ends == furthest, np.arange(len(ends)), 0))[:-1]
    shared = furthest[:-1] > starts[order][1:]
    crossing = np.flatnonzero(shared & (order[last] % num_blocks != order[1:] % num_blocks))
    if crossing.size:
        first = crossing[0]
        one, other = (cluster[order[at] // num_blocks].source for at in (last[first], first + 1))
        raise ConfigError(f"{one}: blocks overlap with those of {other}")
