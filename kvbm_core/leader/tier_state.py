"""The leader's ground: the state of each tier, and the blocks that tiers shall forget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.errors import ConfigError
from kvbm_core.leader.breaker import Breaker
from kvbm_core.leader.counts import TierCounts
from kvbm_core.leader.prefix_probe import PrefixProbe
from kvbm_core.leader.tier_index import Departures, TierIndex
from kvbm_core.plan import TierStatus
from kvbm_core.policy import EvictionPolicy
from kvbm_core.tier import Capabilities, host_pool_of

__all__ = ["TierState", "Tiers"]

_MAX_KNOWN_BLOCKS: Final = 1 << 18
"""Remembered of a shared tier; what is forgotten is looked up, or stored, once more."""


@dataclass(slots=True)
class TierState:
    """One tier."""

    name: str
    capabilities: Capabilities
    """As rank 0 has them; every rank's traits are alike."""
    index: TierIndex
    is_host_pool: bool
    capacity_blocks: int | None
    """As configured; the index may hold fewer, see `Shortages`."""
    block_bytes: int
    """That a block takes on one rank; 0: not known."""
    probe: PrefixProbe | None
    """For a tier that cannot list its blocks."""
    breaker: Breaker = field(default_factory=Breaker)
    counts: TierCounts = field(default_factory=TierCounts)
    is_left_alone: bool = False
    """True from the line that says so until it has worked again."""
    storing: int = 0
    """Blocks on their way in."""
    write_back: OrderedDict[BlockKey, Container[BlockKey]] = field(default_factory=OrderedDict)
    """Blocks in the host pool that this tier gets when fewer are on their way, each with its prefix."""


class Tiers:
    """All tiers, fastest first. Begins with the blocks that every rank found; the others are dropped.

    Args:
        ranks: What each worker says of its tiers.
        policy: Makes the eviction order of one tier.

    Raises:
        ConfigError: If the ranks have different stacks; names rank and difference.
    """

    def __init__(self, ranks: Sequence[Sequence[TierStatus]], policy: Callable[[], EvictionPolicy]) -> None:
        _refuse_different_stacks(ranks)
        self.departures = Departures()
        self.host_pool = host_pool_of([status.capabilities for status in ranks[0]])
        """Position of the host pool; -1 for none."""
        self._drops: dict[int, list[BlockKey]] = {}
        self._states: list[TierState] = []
        for statuses in zip(*ranks, strict=True):
            self._open(statuses, policy())

    def __repr__(self) -> str:
        return ", ".join(f"{t.name} {len(t.index)}/{t.index.capacity_blocks}" for t in self._states)

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, position: int) -> TierState:
        return self._states[position]

    def __iter__(self) -> Iterator[TierState]:
        return iter(self._states)

    @property
    def has_drops(self) -> bool:
        """True if `take_drops` has something to give."""
        return bool(self._drops)

    def take_drops(self) -> list[tuple[int, list[BlockKey]]]:
        """Take the blocks that tiers shall forget: position and keys."""
        drops, self._drops = self._drops, {}
        return list(drops.items())

    def reserve(self, position: int, keys: Sequence[BlockKey], prefix: Container[BlockKey]) -> list[BlockKey]:
        """Set room aside in a tier, see `TierIndex.reserve`, and have it forget the blocks evicted."""
        tier = self._states[position]
        filling, evicted = tier.index.reserve(keys, prefix)
        if not tier.capabilities.shared:  # Else they are forgotten here and stay there.
            self.discard(position, evicted)
            tier.counts.evicted += len(evicted)
        return filling

    def unpin(self, position: int, keys: Iterable[BlockKey]) -> None:
        """Take one pin of each block back; a doomed block goes with its last."""
        index = self._states[position].index
        for key in keys:
            if index.unpin(key):
                self.discard(position, [key])

    def drop(self, position: int, key: BlockKey, *, corrupt: bool = False) -> None:
        """Forget a READY block, as soon as nobody reads it."""
        if self._states[position].index.drop(key):
            self.discard(position, [key], corrupt=corrupt)

    def discard(self, position: int, keys: Iterable[BlockKey], *, corrupt: bool = False) -> None:
        """Have a tier forget what its index has forgotten. Other engines may want what is not corrupt."""
        keys = list(keys)
        if keys and (corrupt or not self._states[position].capabilities.shared):
            self._drops.setdefault(position, []).extend(keys)

    def drop_all(self) -> None:
        """Forget every block. In a shared tier they stay."""
        for position, tier in enumerate(self._states):
            tier.write_back.clear()
            for key in tier.index.ready():
                self.drop(position, key)

    def _open(self, statuses: Sequence[TierStatus], policy: EvictionPolicy) -> None:
        """Start a tier's index with the blocks that every rank found, and have the others dropped."""
        capabilities, position = statuses[0].capabilities, len(self._states)
        limits = [status.capabilities.capacity_blocks for status in statuses]
        limits.append(_MAX_KNOWN_BLOCKS if capabilities.shared else None)
        bounded = [limit for limit in limits if limit is not None]
        index = TierIndex(min(bounded) if bounded else None, policy, self.departures)
        common = set.intersection(*(set(status.inventory) for status in statuses))
        ordered = [key for key in statuses[0].inventory if key in common]
        keep = ordered[-index.capacity_blocks :] if index.capacity_blocks is not None else ordered
        for key in keep:
            index.found(key)
        probe = PrefixProbe() if capabilities.remote_lookup else None
        self._states.append(
            TierState(
                statuses[0].name, capabilities, index, position == self.host_pool,
                index.capacity_blocks, statuses[0].block_bytes, probe,
            )
        )  # fmt: skip
        self.discard(position, set().union(*(status.inventory for status in statuses)).difference(keep))


def _refuse_different_stacks(ranks: Sequence[Sequence[TierStatus]]) -> None:
    """Refuse workers whose stacks differ."""
    first = [status.name for status in ranks[0]]
    for rank, statuses in enumerate(ranks):
        if (names := [status.name for status in statuses]) != first:
            raise ConfigError(
                f"rank {rank} has the tiers {names}, rank 0 has {first}; "
                "give every worker the same configuration"
            )
