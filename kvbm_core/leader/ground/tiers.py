"""The leader's ground: all tiers, and how each begins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.errors import ConfigError
from kvbm_core.groups import TAG_BYTES, KvGroup, is_plain
from kvbm_core.leader.ground.prefix_search import PrefixSearch
from kvbm_core.leader.ground.tier_index import LatestKeys, TierIndex
from kvbm_core.leader.ground.tier_policies import TierPolicies
from kvbm_core.leader.ground.tier_state import TierState
from kvbm_core.plan import TierStatus
from kvbm_core.policies import Fifo, Lru
from kvbm_core.policy import PolicyContext
from kvbm_core.tier import host_pool_of

__all__ = ["Tiers"]

_MAX_KNOWN_OBJECTS: Final = 1 << 18
"""Remembered of a shared tier; the others are looked up, or stored, once more."""


class Tiers:
    """All tiers, fastest first.

    Begins with the objects that every rank found that has layers of their KV group; the others are dropped.

    Args:
        ranks: What each worker says of its tiers.
        policies: Makes the policies of each tier; the eviction policy of one that has a capacity.
        groups: The engine's KV groups. Where a hit is not just the longest prefix of one, the objects that
            become READY are noted as well, for matches over them.

    Raises:
        ConfigError: If the ranks have different stacks; names rank and difference.
    """

    def __init__(
        self,
        ranks: Sequence[Sequence[TierStatus]],
        policies: TierPolicies,
        groups: Sequence[KvGroup] = (KvGroup(1),),
    ) -> None:
        _refuse_different_stacks(ranks)
        self.departures = LatestKeys()
        self.arrivals = LatestKeys()
        self._groups = groups
        self.host_pool = host_pool_of([status.capabilities for status in ranks[0]])
        """Position of the host pool; -1 for none."""
        self._states: list[TierState] = []
        for statuses in zip(*ranks, strict=True):
            self._open(statuses, policies)

    def __repr__(self) -> str:
        return ", ".join(f"{t.name} {t.index.used_bytes}/{t.index.capacity_bytes}" for t in self._states)

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, position: int) -> TierState:
        return self._states[position]

    def __iter__(self) -> Iterator[TierState]:
        return iter(self._states)

    def usable(self, now_s: float) -> tuple[bool, ...]:
        """Say which tiers may be used, by their breakers. Asked for each waiting request in each step."""
        return tuple([tier.breaker.closed(now_s) for tier in self._states])

    @property
    def has_drops(self) -> bool:
        """True if `take_drops` has something to give."""
        return any(tier.drops for tier in self._states)

    def take_drops(self) -> list[tuple[int, list[BlockKey]]]:
        """Take the blocks that tiers shall forget: position and keys."""
        taken = [(tier.position, tier.drops) for tier in self._states if tier.drops]
        for position, _ in taken:
            self._states[position].drops = []
        return taken

    def take_used(self) -> list[tuple[int, list[BlockKey]]]:
        """Take what requests have had: position and keys."""
        taken = [(tier.position, tier.used) for tier in self._states if tier.used]
        for position, _ in taken:
            self._states[position].used = []
        return taken

    def drop_all(self) -> None:
        """Forget every block. In a shared tier they stay."""
        for tier in self._states:
            tier.write_back.clear()
            for key in list(tier.index):
                tier.drop(key)

    def _open(self, statuses: Sequence[TierStatus], policies: TierPolicies) -> None:
        """Begin a tier, as the ranks have opened it."""
        first, position = statuses[0], len(self._states)
        charges = tuple(max(each) for each in zip(*(status.charges for status in statuses), strict=True))
        usual_bytes = max(charges)
        limits = [status.capabilities.capacity_bytes for status in statuses]
        limits.append(_MAX_KNOWN_OBJECTS * usual_bytes if first.capabilities.shared else None)
        capacity_bytes = min((limit for limit in limits if limit is not None), default=None)
        context = PolicyContext(capacity_bytes or 0, max(1, usual_bytes), first.name, len(statuses))
        order = Lru() if capacity_bytes is None else policies.order(position, context)
        index = TierIndex(
            capacity_bytes, order, self.departures, None if is_plain(self._groups) else self.arrivals
        )
        tier = TierState(
            position, first.name, first.capabilities, index, position == self.host_pool, capacity_bytes,
            charges,
            tuple(sum(each) for each in zip(*(status.block_bytes for status in statuses), strict=True)),
            PrefixSearch() if first.capabilities.remote_lookup else None,
            policies.admission(position, context),
            # A policy that asks for the order of writing finds it so.
            keeps_order=type(order) is not Fifo and first.capabilities.durable
            and not first.capabilities.shared,
        )  # fmt: skip
        self._states.append(tier)
        self._take_inventory(tier, statuses)

    def _take_inventory(self, tier: TierState, statuses: Sequence[TierStatus]) -> None:
        """Begin with the objects that every rank found, and have the others dropped."""
        found = [dict(status.inventory) for status in statuses]
        without = [self._tags_without_layers(status) for status in statuses]
        # The rank that lists most knows the order best.
        listed = sorted((list(rank) for rank in found), key=len, reverse=True)
        keep: dict[BlockKey, int] = {}
        room = math.inf if tier.capacity_bytes is None else tier.capacity_bytes
        for key in reversed(dict.fromkeys(itertools.chain(*listed))):
            tag = key[-TAG_BYTES:]
            if all(key in rank or tag in tags for rank, tags in zip(found, without, strict=True)):
                keep[key] = tier.index.counted(max(rank.get(key, 0) for rank in found))
                room -= keep[key]
                if room < 0:
                    del keep[key]
                    break
        for key in reversed(keep):
            tier.index.found(key, keep[key])
        tier.discard(set().union(*found).difference(keep))

    def _tags_without_layers(self, status: TierStatus) -> set[bytes]:
        """Give the tags of the KV groups of which a rank keeps no objects: it has no layer of them."""
        return {group.tag for group, charge in zip(self._groups, status.charges, strict=False) if not charge}


def _refuse_different_stacks(ranks: Sequence[Sequence[TierStatus]]) -> None:
    """Refuse workers whose stacks differ."""
    first = [status.name for status in ranks[0]]
    for rank, statuses in enumerate(ranks):
        if (names := [status.name for status in statuses]) != first:
            raise ConfigError(
                f"rank {rank} has the tiers {names}, rank 0 has {first}; "
                "give every worker the same configuration"
            )
