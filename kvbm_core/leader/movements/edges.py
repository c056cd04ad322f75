"""How blocks move along the edges of the stack: what `kvbm_core.movement.Movement` says, carried out.

    store ──► tier 0 ──demotion──► tier 1 ──write_through: from the device, or written back──► ...
                 ▲                   │
                 └──── promotion ────┘  with the load; `exclusive`: the lower copy is the first to go

Where every edge writes through, promotes always and is inclusive, all that is chosen here is what is written
from the device now and what later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Container, Iterable, Sequence

import msgspec

from kvbm_core.block import BlockKey
from kvbm_core.groups import KvGroup
from kvbm_core.leader.cost_model import CostModel
from kvbm_core.leader.draft import Draft
from kvbm_core.leader.ground.tier_state import UNKNOWN
from kvbm_core.leader.ground.tiers import Tiers
from kvbm_core.leader.movements.demotion import Demotion
from kvbm_core.leader.movements.promotion import Promotion
from kvbm_core.leader.movements.spare_copies import SpareCopies
from kvbm_core.leader.movements.write_back import WriteBack
from kvbm_core.movement import WRITE_THROUGH, Movement
from kvbm_core.policy import Origin

__all__ = ["Movements"]

logger = logging.getLogger("kvbm_core")


class Movements:
    """Decides which tiers get a block when, and which copies go.

    Args:
        tiers: The leader's tiers.
        draft: Takes the fills.
        cost_model: Says which tiers load more slowly than the engine computes.
        settings: One for each tier, that of the edge above it. Empty: every edge writes through.
        max_store_blocks: Objects on their way into a tier below the host pool, at once.
        groups: The engine's KV groups.
    """

    def __init__(
        self, tiers: Tiers, draft: Draft, cost_model: CostModel, settings: Sequence[Movement],
        max_store_blocks: int, groups: Sequence[KvGroup],
    ) -> None:  # fmt: skip
        self._tiers = tiers
        self._cost_model = cost_model
        self._write_back = WriteBack(tiers, draft, max_store_blocks)
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
                self._demotions[position] = Demotion(
                    tiers, draft, position, movement, self._write_back.max_storing, numbers
                )
            if movement.copies == "exclusive":
                self._spares[position] = SpareCopies(tiers, position)
            if movement.promotion != "always":
                self._promotions[position] = Promotion() if movement.promotion == "measured" else None
        self._watched = {
            self._above(position): promotion for position, promotion in self._promotions.items() if promotion
        }
        """Measured promotions, by the position of the tier that keeps what comes up."""
        self._is_selective = bool(self._demotions or self._promotions)
        below_spares = range(max(self._spares, default=0))
        for position in {*self._watched, *(below - 1 for below in self._demotions), *below_spares}:
            tiers[position].on_evicted = self._evicted_from(position)

    def __repr__(self) -> str:
        return f"<Movements {[*self._demotions.values()]}, {[*self._spares.values()]}, {self._promotions}>"

    def is_due(self, now_s: float) -> bool:
        """Return True if `plan` would begin to copy something that is known to be due."""
        is_due = any(demotion.is_due(now_s) for demotion in self._demotions.values())
        return is_due or self._write_back.is_due(now_s)

    def plan(self, now_s: float) -> None:
        """Copy what is due: what is demoted, and what is written back."""
        for demotion in self._demotions.values():
            demotion.plan(now_s)
        self._write_back.plan(now_s)

    def forget(self) -> None:
        """Give up what is due, after a reset."""
        for demotion in self._demotions.values():
            demotion.forget()

    def targets(
        self, keys: Sequence[BlockKey], prefix: Container[BlockKey], now_s: float, group: int = 0,
        origin: Origin = UNKNOWN,
    ) -> dict[int, list[BlockKey]]:  # fmt: skip
        """Choose what each tier gets from the device, and set room aside for it. See `Planner.store`."""
        targets: dict[int, list[BlockKey]] = {}
        rest: Sequence[BlockKey] = keys
        for position, tier in enumerate(self._tiers):
            absent = tier.index.absent(keys)
            tier.index.offered(keys, origin, has_some=len(absent) < len(keys))
            if tier.capabilities.read_only:
                continue
            offered = self._offered(position, absent, rest) if self._is_selective else absent
            if tier.admission is not None:
                tier.admission.offered(keys, origin)
                offered = tier.admitted(offered, now_s, group, origin)
            if tier.keeps_order:
                tier.note_used(keys, set(absent).difference(offered) if len(offered) < len(absent) else ())
            wanted = offered
            if not tier.is_host_pool or not tier.breaker.closed(now_s):
                wanted = self._write_back.admit(tier, offered, prefix, now_s, group)
            # Some of `keys` may be there already: the others must not push these out.
            filling = tier.reserve(wanted, prefix, group, are_absent=True)
            if filling:
                targets[position] = filling
            if self._is_selective:
                if promotion := self._watched.get(position):
                    promotion.came_above(filling, computed=True)
                rest = self._not_taken(position, offered, filling)
        return targets

    def kept(
        self, loaded: Sequence[tuple[BlockKey, int]], prefix: Container[BlockKey], group: int
    ) -> set[BlockKey]:
        """Choose what the host pool keeps of blocks that pass through its memory, and set room aside for it.

        Args:
            loaded: The blocks in the order of their prefix, and the tier that each is loaded from.
            prefix: Of the request, in all groups.
            group: Number of the KV group.
        """
        pool = self._tiers.host_pool
        lower = [
            (key, position)
            for key, position in loaded
            if position > pool >= 0 and not self._tiers[position].capabilities.device_direct
        ]
        if not lower:
            return set()
        wanted = self._promoted(lower) if self._promotions else [key for key, _ in lower]
        # Their ancestors in the group need no mention: they are loaded, and so pinned.
        return set(self._tiers[pool].reserve(wanted, prefix, group))

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

    def _offered(self, position: int, absent: list[BlockKey], rest: Sequence[BlockKey]) -> list[BlockKey]:
        """Choose the blocks that a tier is offered: of those that it has not, or that the one above left."""
        if position in self._demotions:
            absent = self._tiers[position].index.absent(rest) if rest else []
        for below, promotion in self._promotions.items():
            is_kept_below = promotion is None or promotion.is_paused
            if is_kept_below and position < below and not self._cost_model.is_slow(below):
                there = self._tiers[below].index.ready
                absent = [key for key in absent if key not in there]
        return absent

    def _not_taken(
        self, position: int, offered: list[BlockKey], filling: Sequence[BlockKey]
    ) -> Sequence[BlockKey]:
        """Give what a tier was offered and does not get, as far as the tier below asks for it."""
        if position + 1 not in self._demotions or len(filling) == len(offered):
            return ()
        tier = self._tiers[position]
        return [key for key in tier.index.absent(offered) if key not in tier.write_back]

    def _promoted(self, lower: Sequence[tuple[BlockKey, int]]) -> list[BlockKey]:
        """Choose among blocks that are loaded, each from its tier, those that the host pool keeps."""
        chosen: set[BlockKey] = set()
        for position in {position for _, position in lower}:
            there = [key for key, tier in lower if tier == position]
            if position not in self._promotions:
                chosen.update(there)
            elif promotion := self._promotions[position]:
                promoted = promotion.chosen(there)
                promotion.came_above(promoted, computed=False)
                chosen.update(promoted)
        return [key for key, _ in lower if key in chosen]

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
