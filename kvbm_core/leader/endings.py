"""The end of an operation in one tier on every rank: the index, the counters and the breaker learn of it.

This is where a load fails, for the leader: its blocks are unpinned, and those that are corrupt or gone are
dropped from the tier.
"""

from __future__ import annotations

import logging
import time

from kvbm_core.block import BlockState
from kvbm_core.leader.cost_model import CostModel
from kvbm_core.leader.in_flight import InFlight, LegEnded, Pending
from kvbm_core.leader.shortage import Shortages
from kvbm_core.leader.tier_state import Tiers, TierState
from kvbm_core.log_limit import LogLimit
from kvbm_core.plan import Load, Lookup, Store
from kvbm_core.tier import Reason

__all__ = ["Endings"]

logger = logging.getLogger("kvbm_core")


class Endings:
    """Takes in how operations ended.

    Args:
        tiers: The leader's tiers.
        in_flight: The leader's operations under way.
        cost_model: Learns how long loads took.
        shortages: Learns which media are full.
    """

    def __init__(
        self, tiers: Tiers, in_flight: InFlight, cost_model: CostModel, shortages: Shortages
    ) -> None:
        self._tiers = tiers
        self._in_flight = in_flight
        self._cost_model = cost_model
        self._shortages = shortages
        self._lines = LogLimit(logger)
        self.took: list[tuple[str, str, float]] = []
        """Operations that have ended: ``store``, ``load`` or ``lookup``, the tier's name, and the seconds
        that the slowest rank took. The caller of `end` empties it."""

    def end(self, leg: LegEnded, now_s: float) -> None:
        """Take in the end of an operation in one tier, and with its last tier the end of all."""
        pending, position = leg.pending, leg.tier
        tier, op, failures = self._tiers[position], leg.pending.op, leg.pending.failures[leg.tier]
        asked = position == op.tier if isinstance(op, Load) else True
        if isinstance(op, Lookup):
            kind = "lookup"
            self._end_lookup(pending, op, now_s)
        elif isinstance(op, Load) and asked:
            kind = "load"
            tier.counts.loaded += len(op.keys) - len(failures)
            if not failures:
                self._cost_model.loaded(position, len(op.keys), pending.took_s[position], now_s)
            self._end_load(pending, op)
        else:
            kind = "store"
            tier.counts.stored += len(op.keys) - len(failures)
            self._end_store(pending, position)
        absent = Reason.MISSING if kind == "lookup" else None  # An answer, not a failure.
        tier.counts.failed.update((kind, why.value) for why in failures.values() if why is not absent)
        worst = next(iter(failures.values()), Reason.NONE) if len(failures) == len(op.keys) else Reason.NONE
        if position in pending.full and self._shortages.note(leg, self._in_flight.latest, now_s):
            worst = Reason.ERROR if worst is Reason.FULL else worst
        # A copy that the host pool keeps of a load is no operation of its own, and no fault if that fails.
        if asked:
            self.took.append((kind, tier.name, pending.took_s[position]))
            self._judge(tier, kind, worst, pending.details.get(position, ""), now_s)
        if leg.is_last and isinstance(op, Store) and not op.blocks:
            self._tiers.unpin(self._tiers.host_pool, op.keys)

    def _judge(self, tier: TierState, kind: str, worst: Reason, detail: str, now_s: float) -> None:
        """Have the breaker learn of an end, and say when the tier is left alone and when it works again."""
        breaker = tier.breaker
        since_s, was_open = breaker.since_s, tier.is_left_alone
        if breaker.note(worst, now_s):
            tier.is_left_alone = True
            says = f" It says: {detail}." if detail else ""
            self._lines.warning(
                (tier.name, kind, worst),
                "tier %s fails (%s: %s) and is left alone. It has failed since %s and is tried again "
                "at %s.%s",
                tier.name, kind, worst.value, _clock_words(breaker.since_s or now_s, now_s),
                _clock_words(breaker.until_s, now_s), says,
            )  # fmt: skip
        elif was_open and since_s is not None and breaker.since_s is None:
            tier.is_left_alone = False
            logger.warning(
                "tier %s works again; it had failed since %s", tier.name, _clock_words(since_s, now_s)
            )

    def _end_lookup(self, pending: Pending, op: Lookup, now_s: float) -> None:
        tier = self._tiers[op.tier]
        assert tier.probe
        found = tier.probe.answer(op.op, pending.failures[op.tier], now_s)
        if pending.doomed:
            return
        news = [key for key in found if tier.index.state(key) is BlockState.ABSENT]
        known = self._tiers.reserve(op.tier, news, ())
        for key in reversed(known):
            tier.index.stored(key)
        for key in news[len(known) :]:  # The index is full of pinned blocks.
            tier.probe.miss(key, now_s)

    def _end_load(self, pending: Pending, op: Load) -> None:
        # The head of a prefix is unpinned last and so evicted last.
        self._tiers.unpin(op.tier, reversed(op.keys if pending.pinned else ()))
        for at, reason in pending.failures[op.tier].items():
            if reason in (Reason.CORRUPT, Reason.MISSING):
                self._tiers.drop(op.tier, op.keys[at], corrupt=reason is Reason.CORRUPT)

    def _end_store(self, pending: Pending, position: int) -> None:
        op, tier = pending.op, self._tiers[position]
        if isinstance(op, Store):
            tier.storing -= len(op.keys)
        failures = pending.failures[position]
        for at in reversed(range(len(op.keys))):
            if at in failures:
                tier.index.not_stored(op.keys[at])
                if self._in_flight.over_several_ranks:  # Other ranks may have it.
                    self._tiers.discard(position, [op.keys[at]])
            else:
                tier.index.stored(op.keys[at])
                if pending.doomed:
                    self._tiers.drop(position, op.keys[at])


def _clock_words(at_s: float, now_s: float) -> str:
    """Write a moment of the planner's clock as the wall clock shows it, for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + at_s - now_s))
