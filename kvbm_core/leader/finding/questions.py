"""What tiers that cannot list their blocks are asked before a prompt is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from kvbm_core.block import BlockKey, BlockState
from kvbm_core.leader.cost_model import CostModel
from kvbm_core.leader.draft import Draft
from kvbm_core.leader.ground.prefix_search import PrefixSearch
from kvbm_core.leader.ground.tier_state import TierState
from kvbm_core.leader.ground.tiers import Tiers
from kvbm_core.plan import Lookup

__all__ = ["Questions"]


class Questions:
    """Plans lookups.

    Args:
        tiers: The leader's tiers.
        draft: Takes the lookups.
        cost_model: Says which tiers need not be asked.
    """

    def __init__(self, tiers: Tiers, draft: Draft, cost_model: CostModel) -> None:
        self._tiers = tiers
        self._draft = draft
        self._cost_model = cost_model

    def ask(
        self, keys: Sequence[BlockKey], now_s: float, group: int = 0, head: BlockKey = b""
    ) -> frozenset[int]:
        """Ask for the leading blocks of a run, see `Planner.lookup`."""
        asking: set[int] = set()
        for tier, search in self._to_be_asked(now_s, len(keys)):
            # A block that is on its way there needs no question, and is no hit yet.
            if tier.index.state(keys[0]) is not BlockState.ABSENT:
                continue
            if (number := search.asking(keys[0])) is not None:
                asking.add(number)
            elif span := search.span(keys, now_s):
                number = self._draft.number()
                asking.add(number)
                self._draft.add(Lookup(number, tier.position, search.ask(number, span), group, head))
        return frozenset(asking)

    def ask_each(
        self, keys: Sequence[BlockKey], now_s: float, group: int = 0, head: BlockKey = b""
    ) -> frozenset[int]:
        """Ask for single objects, of which each may be there without the others, in one round."""
        asking: set[int] = set()
        for tier, search in self._to_be_asked(now_s):
            absent = tier.index.absent(keys)
            asking |= search.asking_each(absent)
            if unknown := search.unknown(absent, now_s):
                number = self._draft.number()
                asking.add(number)
                self._draft.add(Lookup(number, tier.position, search.ask_each(number, unknown), group, head))
        return frozenset(asking)

    def may_be_there(self, now_s: float) -> Callable[[BlockKey], bool]:
        """Give a function that says whether a tier may have an object that none is known to have."""
        searches = [search for _, search in self._to_be_asked(now_s)]
        return lambda key: any(search.absent_until_s(key) <= now_s for search in searches)

    def _to_be_asked(
        self, now_s: float, blocks: float = math.inf
    ) -> Iterator[tuple[TierState, PrefixSearch]]:
        for tier in self._tiers:
            if tier.search is None or not tier.breaker.closed(now_s):
                continue
            if not self._cost_model.should_skip(tier.position, now_s, blocks):
                yield tier, tier.search
