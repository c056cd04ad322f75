"""The state of one tier, and what is done to its blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvbm_core.admission import AdmissionPolicy
from kvbm_core.block import BlockKey
from kvbm_core.leader.ground.breaker import Breaker
from kvbm_core.leader.ground.counts import TierCounts, TierLevels
from kvbm_core.leader.ground.prefix_search import PrefixSearch
from kvbm_core.leader.ground.tier_index import TierIndex
from kvbm_core.policy import Origin
from kvbm_core.tier import Capabilities

__all__ = ["UNKNOWN", "TierState"]

UNKNOWN: Final = Origin()
"""Of blocks that come from another tier."""


@dataclass(slots=True)
class TierState:
    """One tier."""

    position: int
    """In the stack, 0 the fastest."""
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
    search: PrefixSearch | None
    """For a tier that cannot list its blocks."""
    admission: AdmissionPolicy | None
    """Chooses the blocks that are written here. None: all."""
    keeps_order: bool = False
    """True if its ranks are told what is used, so that they find it in that order after a restart."""
    breaker: Breaker = field(default_factory=Breaker)
    counts: TierCounts = field(default_factory=TierCounts)
    storing: int = 0
    """Objects on their way in."""
    write_back: OrderedDict[BlockKey, tuple[Container[BlockKey], int]] = field(default_factory=OrderedDict)
    """Blocks in the host pool that this tier gets when fewer are on their way, each with its prefix and its
    KV group."""
    drops: list[BlockKey] = field(default_factory=list)
    """Blocks that the tier shall forget with the next plan."""
    used: list[BlockKey] = field(default_factory=list)
    """Blocks that requests have had since the last plan, the last used last, where the order is kept."""
    on_evicted: Callable[[list[BlockKey]], None] | None = None
    """Is told which objects have made room for others."""
    make_room: Callable[[int], None] | None = None
    """Is asked for room for so many bytes before objects are evicted."""

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
            self.breaker.closed(now_s) and not self.breaker.left_alone_for,
            None if whole is None else whole * world_size,
            None if now is None else now * world_size,
            self.breaker.left_alone_for,
        )

    def reserve(
        self, keys: Sequence[BlockKey], prefix: Container[BlockKey], group: int = 0, *,
        are_absent: bool = False,
    ) -> list[BlockKey]:  # fmt: skip
        """Set room aside, see `TierIndex.reserve`, and have the tier forget the objects evicted."""
        charge = self.charges[group]
        if self.make_room is not None:
            self.make_room(len(keys) * charge)
        filling, evicted = self.index.reserve(keys, charge, prefix, are_absent=are_absent)
        if evicted:
            if not self.capabilities.shared:  # Else they are forgotten here and stay there.
                self.drops += evicted
                self.counts.evicted += len(evicted)
            if self.on_evicted is not None:
                self.on_evicted(evicted)
        return filling

    def admitted(
        self, keys: list[BlockKey], now_s: float, group: int, origin: Origin = UNKNOWN
    ) -> list[BlockKey]:
        """Give the leading blocks that shall be written here, of those that the tier has not."""
        if self.admission is None or not keys:
            return keys
        count = self.admission.admitted(keys, self.charges[group], origin, now_s)
        self.counts.dropped["admission"] += len(keys) - count
        return keys[:count]

    def unpin(self, keys: Iterable[BlockKey], *, was_used: bool = True) -> None:
        """Take one pin of each block back, see `TierIndex.unpin`; a doomed block goes with its last."""
        self.discard(self.index.unpin(keys, was_used=was_used))

    def note_used(self, keys: Sequence[BlockKey], refused: Container[BlockKey] = ()) -> None:
        """Note for the ranks that a request has these blocks; the head of its prefix counts as used last.

        Args:
            keys: In the order of their prefix.
            refused: Those that the tier has not and does not get.
        """
        self.used += reversed([key for key in keys if key not in refused] if refused else keys)

    def drop(self, key: BlockKey, *, corrupt: bool = False) -> None:
        """Forget a READY block, as soon as nobody reads it."""
        if self.index.drop(key):
            self.discard([key], corrupt=corrupt)

    def discard(self, keys: Iterable[BlockKey], *, corrupt: bool = False) -> None:
        """Have the tier forget what its index has forgotten. Other engines may want what is not corrupt."""
        if corrupt or not self.capabilities.shared:
            self.drops += keys
