"""A configured stack without its media: what each tier would tell the planner, had it been opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from kvbm_core.config import PartEntry, StackConfig, TierEntry, convert, load_config
from kvbm_core.errors import ConfigError
from kvbm_core.layers import SEAL_BYTES
from kvbm_core.plan import TierStatus
from kvbm_core.registry import Registry
from kvbm_core.tier import Backend, Capabilities

__all__ = ["Layout", "TierLayout", "capacity_bytes", "read_layout"]

_HOST_POOLS: Final = frozenset({"cpu"})
"""Backends whose memory the planner has used directly. A backend says so only when it is opened."""
_SLOTTED: Final = frozenset({"cpu", "gds"})
"""Backends in which each object takes as much as the longest."""


@dataclass(frozen=True, slots=True)
class TierLayout:
    """One tier."""

    name: str
    backend: str
    charges: tuple[int, ...]
    """For each KV group the bytes of the capacity that a block takes."""
    blocks: int | None
    """That it holds, of the largest group. None: no bound."""
    shared: bool
    addressable: bool
    read_only: bool

    def status(self, group_bytes: tuple[int, ...]) -> TierStatus:
        """Say what a worker would have said, with nothing found."""
        capacity_bytes = None if self.blocks is None else self.blocks * max(self.charges)
        capabilities = Capabilities(
            capacity_bytes, shared=self.shared, remote_lookup=self.shared, addressable=self.addressable,
            read_only=self.read_only,
        )  # fmt: skip
        return TierStatus(self.name, capabilities, [], self.charges, group_bytes)


@dataclass(frozen=True, slots=True)
class Layout:
    """A stack as it would be opened by one rank that holds everything."""

    config: StackConfig
    tiers: tuple[TierLayout, ...]
    group_bytes: tuple[int, ...]
    """For each KV group the bytes of a block over all ranks."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the largest group."""
        return max(self.group_bytes)

    @property
    def blocks(self) -> int | None:
        """Blocks that all tiers hold together. None: no bound."""
        if any(tier.blocks is None for tier in self.tiers):
            return None
        return sum(tier.blocks or 0 for tier in self.tiers)

    def statuses(self) -> list[TierStatus]:
        """Give what the planner is told of each tier."""
        return [tier.status(self.group_bytes) for tier in self.tiers]

    def position(self, name: str) -> int:
        """Find a tier by its name.

        Raises:
            ConfigError: If there is none.
        """
        names = [tier.name for tier in self.tiers]
        if name not in names:
            raise ConfigError(f"--vary {name}: there is no such tier; write one of {', '.join(names)}")
        return names.index(name)

    def with_blocks(self, position: int, blocks: int) -> Layout:
        """Give a tier room for so many blocks."""
        tiers = list(self.tiers)
        tiers[position] = replace(tiers[position], blocks=blocks)
        return replace(self, tiers=tuple(tiers))

    def with_policy(self, policy: PartEntry) -> Layout:
        """Give every tier another policy."""
        entries = tuple(msgspec.structs.replace(entry, policy=policy) for entry in self.config.tiers)
        return replace(self, config=msgspec.structs.replace(self.config, tiers=entries))

    def scaled(self, part: float) -> Layout:
        """Give every tier room for a part of its blocks, at least for one."""
        tiers = [
            tier if tier.blocks is None else replace(tier, blocks=max(1, round(tier.blocks * part)))
            for tier in self.tiers
        ]
        return replace(self, tiers=tuple(tiers))


def read_layout(
    source: StackConfig | Mapping[str, Any] | str, block_bytes: int | Sequence[int], registry: Registry
) -> Layout:
    """Read a stack as an engine would, and open nothing.

    Codecs are not applied: each block takes what it would take without.

    Args:
        source: The configuration, a mapping, or the path of a YAML file.
        block_bytes: Of a block over all ranks, or of one of each KV group.
        registry: Where backends are found.

    Raises:
        ConfigError: For a mistake in the configuration.
    """
    group_bytes = (block_bytes,) if isinstance(block_bytes, int) else tuple(block_bytes)
    config = source if isinstance(source, StackConfig) else load_config(source)
    tiers: list[TierLayout] = []
    for position, entry in enumerate(config.tiers):
        has_pool = any(tier.addressable for tier in tiers)
        tiers.append(_tier(entry, position, group_bytes, registry, may_be_pool=not has_pool))
    return Layout(config, tuple(tiers), group_bytes)


def capacity_bytes(backend: Backend, blocks: int, block_bytes: int) -> int:
    """Give the capacity with which a tier of one rank holds so many blocks.

    Args:
        backend: Of the tier.
        blocks: At least 1.
        block_bytes: Of the KV of a block.
    """
    return backend.share_bytes(blocks, block_bytes + SEAL_BYTES)


def _tier(
    entry: TierEntry, position: int, group_bytes: tuple[int, ...], registry: Registry, *, may_be_pool: bool
) -> TierLayout:
    block_bytes = max(group_bytes)
    backend = registry.backend(entry.backend)
    settings: Any = convert(entry.settings, backend.config_type, f"tiers[{position}] ({entry.name})")
    capacity = getattr(settings, "capacity", None)
    blocks = None
    if isinstance(capacity, int) and not backend.shared:
        blocks = _most(capacity, lambda blocks: capacity_bytes(backend, blocks, block_bytes))
    if blocks == 0:
        raise ConfigError(
            f"tier {entry.name}: capacity {entry.settings['capacity']!r} is smaller than a block of "
            f"{block_bytes} bytes and its seal; write a larger capacity, or give the model's --token-bytes"
        )
    slots = entry.backend in _SLOTTED
    charges = tuple((block_bytes if slots else nbytes) + SEAL_BYTES for nbytes in group_bytes)
    return TierLayout(
        entry.name, entry.backend, charges, blocks, backend.shared,
        addressable=may_be_pool and entry.backend in _HOST_POOLS and not entry.checked and not entry.codecs,
        read_only=bool(getattr(settings, "read_only", False)),
    )  # fmt: skip


def _most(capacity: int, needed: Callable[[int], int]) -> int:
    """Count the blocks that a capacity holds, given the capacity that so many need."""
    few, many = 0, 1
    while needed(many) <= capacity:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if needed(middle) <= capacity else (few, middle)
    return few
