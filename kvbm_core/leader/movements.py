"""How blocks move along the edges of the stack: what `kvbm_core.movement.Movement` says, carried out.

    store ──► tier 0 ──demotion──► tier 1 ──write_through: from the device, or written back──► ...
                 ▲                   │
                 └──── promotion ────┘  with the load; `exclusive`: the lower copy is the first to go

Where every edge writes through, promotes always and is inclusive, all methods return at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from kvbm_core.block import BlockKey
from kvbm_core.groups import KvGroup
from kvbm_core.leader.cost_model import CostModel
from kvbm_core.leader.demotion import Demotion
from kvbm_core.leader.draft import Draft
from kvbm_core.leader.promotion import Promotion
from kvbm_core.leader.spare_copies import SpareCopies
from kvbm_core.leader.tier_state import Tiers
from kvbm_core.movement import WRITE_THROUGH, Movement

__all__ = ["Movements"]

logger = logging.getLogger("kvbm_core")


class Movements:
    """Decides which tiers get a block when, and which copies go.

    Args:
        tiers: The leader's tiers.
        draft: Takes the fills.
        cost_model: Says which tiers load more slowly than the engine computes.
        settings: One for each tier, that of the edge above it. Empty: every edge writes through.
        max_moving: Objects on their way into one tier at once.
        groups: The engine's KV groups.
    """

    def __init__(
        self, tiers: Tiers, draft: Draft, cost_model: CostModel, settings: Sequence[Movement],
        max_moving: int, groups: Sequence[KvGroup],
    ) -> None:  # fmt: skip
        self._tiers = tiers
        self._cost_model = cost_model
        self._demotions: dict[int, Demotion] = {}
        """By the position of the lower tier; so are the others."""
        self._spares: dict[int, SpareCopies] = {}
        self._promotions: dict[int, Promotion | None] = {}
        """Where not all is kept above; None where nothing is."""
        numbers = {group.tag: number for number, group in enumerate(groups)}
        for position, movement in enumerate(settings or ()):
            if position == 0 or movement == WRITE_THROUGH:
                continue
            movement = _possible(tiers, position, movement)
            if movement.stores == "demotion":
                self._demotions[position] = Demotion(tiers, draft, position, movement, max_moving, numbers)
            if movement.copies == "exclusive":
                self._spares[position] = SpareCopies(tiers, position)
            if movement.promotion != "always":
                self._promotions[position] = Promotion() if movement.promotion == "measured" else None
        self._watched = {
            self._above(position): promotion for position, promotion in self._promotions.items() if promotion
        }
        """Measured promotions, by the position of the tier that keeps what comes up."""
        below_spares = range(max(self._spares, default=0))
        for position in {*self._watched, *(below - 1 for below in self._demotions), *below_spares}:
            tiers[position].on_evicted = self._evicted_from(position)

    def __repr__(self) -> str:
        return f"<Movements {[*self._demotions.values()]}, {[*self._spares.values()]}, {self._promotions}>"

    def is_due(self, now_s: float) -> bool:
        """Return True if `plan` would begin to copy something that is known to be due."""
        return any(demotion.is_due(now_s) for demotion in self._demotions.values())

    def plan(self, now_s: float) -> None:
        """Demote what is due."""
        for demotion in self._demotions.values():
            demotion.plan(now_s)

    def forget(self) -> None:
        """Give up what is due, after a reset."""
        for demotion in self._demotions.values():
            demotion.forget()

    def offered(self, position: int, absent: list[BlockKey], rest: Sequence[BlockKey]) -> list[BlockKey]:
        """Choose the blocks that a tier is offered of those that the engine has.

        Args:
            position: Of the tier.
            absent: Those that the tier has not.
            rest: Those that the tier above was offered and did not take.
        """
        if position in self._demotions:
            absent = self._tiers[position].index.absent(rest) if rest else []
        for below, promotion in self._promotions.items():
            is_kept_below = promotion is None or promotion.is_paused
            if is_kept_below and position < below and not self._cost_model.is_slow(below):
                there = self._tiers[below].index.ready
                absent = [key for key in absent if key not in there]
        return absent

    def not_taken(
        self, position: int, offered: list[BlockKey], filling: Sequence[BlockKey]
    ) -> Sequence[BlockKey]:
        """Give what a tier was offered and does not get, as far as the tier below asks for it."""
        if position + 1 not in self._demotions or len(filling) == len(offered):
            return ()
        tier = self._tiers[position]
        return [key for key in tier.index.absent(offered) if key not in tier.write_back]

    def kept_above(self, keys: list[BlockKey], tiers: Sequence[int]) -> list[BlockKey]:
        """Choose among blocks that are loaded, each from its tier, those that the host pool keeps."""
        if not self._promotions:
            return keys
        kept: list[BlockKey] = []
        for position in dict.fromkeys(tiers):
            there = [key for key, tier in zip(keys, tiers, strict=True) if tier == position]
            if position not in self._promotions:
                kept += there
            elif promotion := self._promotions[position]:
                chosen = promotion.chosen(there)
                promotion.kept(chosen, computed=False)
                kept += chosen
        order = {key: at for at, key in enumerate(keys)}
        return sorted(kept, key=order.__getitem__)

    def computed(self, position: int, keys: Iterable[BlockKey]) -> None:
        """Take in blocks that the engine has computed and a tier keeps."""
        if promotion := self._watched.get(position):
            promotion.kept(keys, computed=True)

    def loaded(self, position: int, keys: Iterable[BlockKey]) -> None:
        """Take in blocks that are loaded from a tier."""
        if promotion := self._watched.get(position):
            promotion.loaded_above(keys)

    def arrived(self, position: int, keys: Sequence[BlockKey], failed: Collection[int]) -> None:
        """Take in blocks that a tier has got, but for those at some positions: exclusive copies are spare."""
        if failed and position in self._demotions:
            self._demotions[position].failed()
        for below, spares in self._spares.items():
            if below > position:
                spares.add(key for at, key in enumerate(keys) if at not in failed)

    def _above(self, position: int) -> int:
        """Give the tier that keeps what is loaded from another."""
        return self._tiers.host_pool if 0 <= self._tiers.host_pool < position else position - 1

    def _evicted_from(self, position: int) -> Callable[[list[BlockKey]], None]:
        demotion, promotion = self._demotions.get(position + 1), self._watched.get(position)
        spares = [each for below, each in self._spares.items() if below > position]

        def evicted(keys: list[BlockKey]) -> None:
            if demotion:
                demotion.evicted(keys)
            if promotion:
                promotion.evicted_above(keys)
            for each in spares:
                each.evicted_above(keys)

        return evicted


def _possible(tiers: Tiers, position: int, movement: Movement) -> Movement:
    """Give what an edge can do of what its settings say; a line says what it cannot."""
    above, below = tiers[position - 1], tiers[position]
    evicts = above.capacity_bytes is not None and not above.capabilities.shared
    takes = evicts and not (above.capabilities.read_only or below.capabilities.read_only)
    if movement.stores == "demotion" and not takes:
        logger.warning(
            "tier %s: movement: stores: demotion: nothing is evicted from tier %s that this tier would take; "
            "it is write_through here", below.name, above.name,
        )  # fmt: skip
        return msgspec.structs.replace(movement, stores="write_through", copies="inclusive")
    if movement.copies == "exclusive" and (below.capabilities.shared or below.capacity_bytes is None):
        logger.warning(
            "tier %s: movement: copies: exclusive: other engines use its blocks; it is inclusive here",
            below.name,
        )
        return msgspec.structs.replace(movement, copies="inclusive")
    return movement
