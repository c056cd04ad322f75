"""What the log says of the tiers: one line at each change of a tier's state, with the cause, both ways.

                      ┌── fails ──────────► is left alone, with so many blocks ──┐
    works as it should├── medium is full ─► holds less                           ├─► works again, since when
                      └── is slow ────────► is computed in its place ────────────┘

What flaps is limited, see `LogLimit`. Nothing is written for a request.
"""

from __future__ import annotations

import logging
from typing import Final

from kvbm_core.config import size_text
from kvbm_core.leader.cost_model import TRIAL_EVERY_S, CostModel
from kvbm_core.leader.ground.breaker import Breaker
from kvbm_core.leader.ground.tier_state import TierState
from kvbm_core.leader.ground.tiers import Tiers
from kvbm_core.log_limit import LogLimit, clock_words
from kvbm_core.tier import Op, Reason

__all__ = ["TierNews"]

logger = logging.getLogger("kvbm_core")

_FAILS: Final = (
    "tier %s fails (%s: %s) and is left alone, with %d blocks: nothing is loaded or stored. It has failed "
    "since %s and is tried again at %s.%s"
)
_WORKS: Final = "tier %s works again, with %d blocks; it had failed %s"
_FULL: Final = (
    "tier %s: its medium is full at %s of the %s configured. Its oldest blocks make room for new ones from "
    "here on, and it grows when there is more: free space on it, or write a smaller capacity.%s"
)
_IN_USE: Final = (
    "tier %s: transfers that have not ended keep memory of it in use, so that it holds %s of the %s "
    "configured for now; as a rule a tier below it is slow or hangs.%s"
)
_WHOLE: Final = "tier %s holds its whole capacity again, with %d blocks; it held less %s"
_SLOW: Final = (
    "tier %s loads more slowly than the engine computes (%.3g ms a block, computed %.3g ms): its %d blocks "
    "are computed where that is faster. It is tried again in %.0f s at the soonest, and stored to meanwhile"
)
_FAST: Final = (
    "tier %s loads faster than the engine computes again (%.3g ms a block, computed %.3g ms), with %d "
    "blocks; it was slower %s"
)


class TierNews:
    """Writes the lines of the leader's tiers.

    Args:
        tiers: The leader's tiers.
        world_size: Ranks of the engine.
        cost_model: Knows which tiers are slow.
    """

    def __init__(self, tiers: Tiers, world_size: int, cost_model: CostModel) -> None:
        self._tiers = tiers
        self._world_size = world_size
        self._cost_model = cost_model
        self._lines = LogLimit(logger)
        self._slow = [False] * len(tiers)

    def __repr__(self) -> str:
        return f"<TierNews {self._lines!r}>"

    def left_alone(self, tier: TierState, kind: Op, reason: Reason, detail: str, now_s: float) -> None:
        """Say that operations of a kind fail in a tier, so that its breaker has opened, or stays open."""
        since_s = _since(tier.breaker, now_s)
        self._lines.lasts(
            (tier.name, "fails"), since_s, _FAILS, tier.name, kind.value, reason.value, len(tier.index),
            clock_words(since_s, now_s), clock_words(tier.breaker.until_s, now_s), _says(detail),
            cause=(kind, reason),
        )  # fmt: skip

    def works(self, tier: TierState, now_s: float, *, is_said: bool = False) -> None:
        """Say that a tier works again that was left alone; `is_said` if a rank has written that."""
        self._lines.over((tier.name, "fails"), now_s, "" if is_said else _WORKS, tier.name, len(tier.index))

    def full(self, tier: TierState, held_bytes: int, detail: str, now_s: float) -> None:
        """Say that a tier's medium has room for so many bytes a rank, and no more."""
        sizes = [size_text(nbytes * self._world_size) for nbytes in (held_bytes, tier.capacity_bytes or 0)]
        message = _IN_USE if tier.is_host_pool else _FULL
        self._lines.lasts((tier.name, "full"), now_s, message, tier.name, *sizes, _says(detail))

    def whole(self, tier: TierState, now_s: float) -> None:
        """Say that a tier holds its whole capacity again."""
        self._lines.over((tier.name, "full"), now_s, _WHOLE, tier.name, len(tier.index))

    def speeds(self, now_s: float) -> None:
        """Say which tiers have become slower than computing since the last call, and which are so no more."""
        for position, was_slow in enumerate(self._slow):
            if self._cost_model.is_slow(position) == was_slow:
                continue
            tier, what = self._tiers[position], (self._tiers[position].name, "slow")
            loading, computing = self._cost_model.block_seconds(position)
            facts = (tier.name, loading * 1e3, computing * 1e3, len(tier.index))
            self._slow[position] = not was_slow
            if was_slow:
                self._lines.over(what, now_s, _FAST, *facts)
            else:
                self._lines.lasts(what, now_s, _SLOW, *facts, TRIAL_EVERY_S)


def _since(breaker: Breaker, now_s: float) -> float:
    return now_s if breaker.since_s is None else breaker.since_s


def _says(detail: str) -> str:
    return f" It says: {detail}." if detail else ""
