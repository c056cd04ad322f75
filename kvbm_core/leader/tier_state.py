"""The leader's ground: the state of each tier, and the blocks that tiers shall forget."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from kvbm_core.admission import AdmissionPolicy
from kvbm_core.block import PROBE_KEY, BlockKey
from kvbm_core.errors import ConfigError
from kvbm_core.groups import TAG_BYTES, KvGroup, is_plain
from kvbm_core.leader.breaker import Breaker
from kvbm_core.leader.counts import TierCounts, TierLevels
from kvbm_core.leader.prefix_probe import PrefixProbe
from kvbm_core.leader.tier_index import LatestKeys, TierIndex
from kvbm_core.leader.tier_policies import TierPolicies
from kvbm_core.plan import TierStatus
from kvbm_core.policies import Fifo, Lru
from kvbm_core.policy import Origin, PolicyContext
from kvbm_core.tier import Capabilities, Op, Reason, host_pool_of

__all__ = ["MakePolicy", "TierState", "Tiers"]

_MAX_KNOWN_OBJECTS: Final = 1 << 18
"""Remembered of a shared tier; the others are looked up, or stored, once more."""

MakePolicy: TypeAlias = Callable[[int, PolicyContext], Fifo]
"""Makes the policy of the tier at a position."""


UNKNOWN: Final = Origin()
"""Of blocks that come from another tier."""


def make_lru(position: int, context: PolicyContext) -> Fifo:
    """Make the policy of a tier that names none."""
    return Lru()


@dataclass(slots=True)
class TierState:
    """One tier."""

    name: str
    capabilities: Capabilities
    """As rank 0 has them; every rank's traits are alike."""
    index: TierIndex
    is_host_pool: bool
    capacity_bytes: int | None
    """As configured, of the rank with the smallest share; the index may hold less, see `Shortages`."""
    charges: tuple[int, ...]
    """For each KV group the bytes that an object takes at most, on the rank where it takes most."""
    block_bytes: tuple[int, ...]
    """For each KV group the bytes of a block over all ranks."""
    probe: PrefixProbe | None
    """For a tier that cannot list its blocks."""
    breaker: Breaker = field(default_factory=Breaker)
    counts: TierCounts = field(default_factory=TierCounts)
    left_alone_for: tuple[Op, Reason] | None = None
    """The operation that failed last and why, from when it is left alone until it has worked again."""
    is_probed: bool = False
    """True while the ranks try it, see `Probe`."""
    storing: int = 0
    """Objects on their way in."""
    admission: AdmissionPolicy | None = None
    """Chooses the blocks that are written here. None: all."""
    on_evicted: Callable[[list[BlockKey]], None] | None = None
    """Is told which objects have made room for others."""
    make_room: Callable[[int], None] | None = None
    """Is asked for room for so many bytes before objects are evicted."""
    write_back: OrderedDict[BlockKey, tuple[Container[BlockKey], int]] = field(default_factory=OrderedDict)
    """Blocks in the host pool that this tier gets when fewer are on their way, each with its prefix and its
    KV group."""

    def weight(self, group: int) -> float:
        """Give the bytes of a block of a KV group as a part of those of the largest."""
        largest = max(self.block_bytes)
        return self.block_bytes[group] / largest if largest else 1.0

    def levels(self, world_size: int, now_s: float) -> TierLevels:
        """Say where the tier stands, over so many ranks."""
        whole, now = self.capacity_bytes, self.index.capacity_bytes
        if self.capabilities.shared:
            whole = now = None
        return TierLevels(
            len(self.index),
            self.index.used_bytes * world_size,
            self.storing + len(self.write_back),
            self.breaker.closed(now_s) and not self.left_alone_for,
            None if whole is None else whole * world_size,
            None if now is None else now * world_size,
            self.left_alone_for,
        )


class Tiers:
    """All tiers, fastest first.

    Begins with the objects that every rank found that has layers of their KV group; the others are dropped.

    Args:
        ranks: What each worker says of its tiers.
        policy: Makes the policy of each tier that has a capacity.
        groups: The engine's KV groups. Where a hit is not just the longest prefix of one, the objects that
            become READY are noted as well, for matches over them.

    Raises:
        ConfigError: If the ranks have different stacks; names rank and difference.
    """

    def __init__(
        self,
        ranks: Sequence[Sequence[TierStatus]],
        policy: MakePolicy = make_lru,
        groups: Sequence[KvGroup] = (KvGroup(1),),
    ) -> None:
        _refuse_different_stacks(ranks)
        self.departures = LatestKeys()
        self.arrivals = LatestKeys()
        self._groups = groups
        self.host_pool = host_pool_of([status.capabilities for status in ranks[0]])
        """Position of the host pool; -1 for none."""
        self._drops: dict[int, list[BlockKey]] = {}
        self._states: list[TierState] = []
        for statuses in zip(*ranks, strict=True):
            self._open(statuses, policy)

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
        return bool(self._drops)

    def take_drops(self) -> list[tuple[int, list[BlockKey]]]:
        """Take the blocks that tiers shall forget: position and keys."""
        drops, self._drops = self._drops, {}
        return list(drops.items())

    def reserve(
        self,
        position: int,
        keys: Sequence[BlockKey],
        prefix: Container[BlockKey],
        group: int = 0,
        *,
        are_absent: bool = False,
    ) -> list[BlockKey]:
        """Set room aside in a tier, see `TierIndex.reserve`, and have it forget the objects evicted."""
        tier = self._states[position]
        if tier.make_room is not None:
            tier.make_room(len(keys) * tier.charges[group])
        filling, evicted = tier.index.reserve(keys, tier.charges[group], prefix, are_absent=are_absent)
        if not tier.capabilities.shared:  # Else they are forgotten here and stay there.
            self.discard(position, evicted)
            tier.counts.evicted += len(evicted)
        if evicted and tier.on_evicted is not None:
            tier.on_evicted(evicted)
        return filling

    def admitted(
        self, position: int, keys: list[BlockKey], now_s: float, group: int, origin: Origin = UNKNOWN
    ) -> list[BlockKey]:
        """Give the leading blocks that shall be written to a tier, of those that it has not."""
        tier = self._states[position]
        if tier.admission is None or not keys:
            return keys
        count = tier.admission.admitted(keys, tier.charges[group], origin, now_s)
        tier.counts.dropped["admission"] += len(keys) - count
        return keys[:count]

    def make_room_for_probe(self, position: int) -> None:
        """Have a tier leave room for one block; its own bound does without where it is shared."""
        index = self._states[position].index
        self.drop(position, PROBE_KEY)  # Of an engine that was killed while it tried.
        charges = self._states[position].charges
        for key in self.reserve(position, [PROBE_KEY], (), charges.index(max(charges))):
            index.not_stored(key)

    def unpin(self, position: int, keys: Iterable[BlockKey], *, was_used: bool = True) -> None:
        """Take one pin of each block back, see `TierIndex.unpin`; a doomed block goes with its last."""
        self.discard(position, self._states[position].index.unpin(keys, was_used=was_used))

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
            for key in list(tier.index):
                self.drop(position, key)

    def _open(self, statuses: Sequence[TierStatus], policy: MakePolicy) -> None:
        """Start a tier's index with the objects that every rank found, and have the others dropped."""
        first, position = statuses[0], len(self._states)
        charges = tuple(max(each) for each in zip(*(status.charges for status in statuses), strict=True))
        usual_bytes = max(charges)
        limits = [status.capabilities.capacity_bytes for status in statuses]
        limits.append(_MAX_KNOWN_OBJECTS * usual_bytes if first.capabilities.shared else None)
        capacity_bytes = min((limit for limit in limits if limit is not None), default=None)
        order: Fifo = Lru()
        if capacity_bytes is not None:
            order = policy(position, PolicyContext(capacity_bytes, usual_bytes, first.name, len(statuses)))
        admission = None
        if isinstance(policy, TierPolicies):
            context = PolicyContext(capacity_bytes or 0, max(1, usual_bytes), first.name, len(statuses))
            admission = policy.admission(position, context)
        index = TierIndex(
            capacity_bytes, order, self.departures, None if is_plain(self._groups) else self.arrivals
        )
        self._states.append(
            TierState(
                first.name, first.capabilities, index, position == self.host_pool, capacity_bytes, charges,
                tuple(sum(each) for each in zip(*(status.block_bytes for status in statuses), strict=True)),
                PrefixProbe() if first.capabilities.remote_lookup else None,
                admission=admission,
            )
        )  # fmt: skip
        found = [dict(status.inventory) for status in statuses]
        without = [self._tags_without_layers(status) for status in statuses]
        # The rank that lists most knows the order best.
        listed = sorted((list(rank) for rank in found), key=len, reverse=True)
        keep: dict[BlockKey, int] = {}
        room = math.inf if capacity_bytes is None else capacity_bytes
        for key in reversed(dict.fromkeys(itertools.chain(*listed))):
            tag = key[-TAG_BYTES:]
            if all(key in rank or tag in tags for rank, tags in zip(found, without, strict=True)):
                keep[key] = index.counted(max(rank.get(key, 0) for rank in found))
                room -= keep[key]
                if room < 0:
                    del keep[key]
                    break
        for key in reversed(keep):
            index.found(key, keep[key])
        self.discard(position, set().union(*found).difference(keep))

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
