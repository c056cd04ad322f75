"""Where an engine's blocks lie: the pages of each KV group, and the tensors that they were found in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from kvbm_core.errors import ConfigError
from kvbm_core.tier import Region
from kvbm_device._views import Layers, PageView, group_views

if TYPE_CHECKING:
    import torch

__all__ = ["Groups", "Layout", "layout_of"]

Groups: TypeAlias = "Layers | Sequence[Layers]"
"""The tensors of each KV group, in the order of the groups' numbers; of one group also as they are."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The pages of every block."""

    groups: tuple[tuple[PageView, ...], ...]
    """Of each KV group, in the order in which a stored block holds them. None for a group without layers."""
    num_blocks: int
    tensors: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)
    """Keep the addresses valid."""
    shapes: tuple[str, ...] = field(default=(), repr=False)
    """What each tensor is, all but its address."""

    block_bytes: tuple[int, ...] = field(init=False)
    """Bytes of one block of each KV group."""
    alike: tuple[int, ...] = field(init=False)
    """Of each KV group the first that has the same pages: a copy need not tell their blocks apart."""

    def __post_init__(self) -> None:
        sizes = tuple(sum(view.page_bytes for view in views) for views in self.groups)
        object.__setattr__(self, "block_bytes", sizes)
        object.__setattr__(self, "alike", tuple(map(self.groups.index, self.groups)))

    @property
    def on_device(self) -> bool:
        """True if a page is in memory of an accelerator."""
        return any(view.on_device for views in self.groups for view in views)

    def __str__(self) -> str:
        held = " or ".join(str(nbytes) for nbytes in dict.fromkeys(self.block_bytes) if nbytes)
        return f"{self.num_blocks} blocks of {held} bytes"

    def check(
        self, operation: str, blocks: Sequence[int], regions: Sequence[Region], group: int, *, staged: bool
    ) -> None:
        """Look at what a copy is asked for. `staged`: its regions may be in device memory.

        Raises:
            IndexError: If there is no such block.
            ValueError: If there is no such KV group, the lengths differ, or a region is too short.
        """
        if not 0 <= group < len(self.groups):
            raise ValueError(f"{operation} of KV group {group}; there are {len(self.groups)}")
        if len(blocks) != len(regions):
            raise ValueError(f"{operation} of {len(blocks)} blocks and {len(regions)} regions")
        numbers = np.asarray(blocks, dtype=np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < self.num_blocks):
            worst = numbers.max() if numbers.min() >= 0 else numbers.min()
            raise IndexError(f"{operation} of block {worst}; there are {self.num_blocks}")
        nbytes = self.block_bytes[group]
        for region in regions:
            if region.nbytes < nbytes or (region.on_device and not staged):
                raise ValueError(f"{operation} needs {nbytes} bytes of host memory, got {region}")

    def moved(self, tensors: Groups) -> Layout:
        """Find the same layers' pages in other tensors of the same shapes.

        Raises:
            ConfigError: If a tensor is another one than before in anything but its address.
        """
        layout = layout_of(tensors, self.num_blocks)
        changed = "the KV tensors have changed: there {}, and there {}; open the tiers anew"
        for before, after in zip_longest(self.shapes, layout.shapes, fillvalue="no tensor"):
            if before != after:
                raise ConfigError(changed.format(f"was {before}", f"is {after}"), operation="rebind")
        if len(self.groups) != len(layout.groups):
            was, now = f"were {len(self.groups)} KV groups", f"are {len(layout.groups)}"
            raise ConfigError(changed.format(was, now), operation="rebind")
        return layout


def layout_of(tensors: Groups, num_blocks: int) -> Layout:
    """Find the pages of a block of each KV group.

    Args:
        tensors: Of each group, by layer, in the engine's order.
        num_blocks: Blocks the engine has, for all groups together.

    Raises:
        ConfigError: If a tensor's blocks cannot be told apart, or share bytes with another block.
    """
    groups = [tensors] if isinstance(tensors, Mapping) else list(tensors)
    views = group_views(groups, num_blocks)
    # The tensors, not the mappings: the caller may change those.
    flat = tuple(tensor for layers in groups for _, tensor in _tensors(layers))
    shapes = tuple(shape for number, layers in enumerate(groups) for shape in _shapes(number, layers))
    return Layout(tuple(map(tuple, views)), num_blocks, flat, shapes)


def _tensors(layers: Layers) -> Iterator[tuple[str, torch.Tensor]]:
    for layer, value in layers.items():
        for tensor in value if isinstance(value, Sequence) else [value]:
            yield layer, tensor


def _shapes(number: int, layers: Layers) -> Iterator[str]:
    """Say what each tensor is, and in which allocation: those decide the order of the pages."""
    allocations: dict[int, int] = {}
    for layer, tensor in _tensors(layers):
        place = allocations.setdefault(tensor.untyped_storage().data_ptr(), len(allocations))
        yield (
            f"layer {layer!r} of group {number}, {tensor.dtype} of shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}, from element {tensor.storage_offset()} "
            f"of allocation {place} on {tensor.device}"
        )
