"""The end of an operation in one tier on every rank: the index, the counters and the breaker learn of it.

This is where a load fails, for the leader: its blocks are unpinned, and those that are corrupt or gone are
dropped from the tier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvbm_core.block import BlockKey
from kvbm_core.leader.cost_model import CostModel
from kvbm_core.leader.ground.tier_state import TierState
from kvbm_core.leader.ground.tiers import Tiers
from kvbm_core.leader.in_flight import InFlight, LegEnded, Pending
from kvbm_core.leader.left_alone import LeftAlone
from kvbm_core.leader.movements.edges import Movements
from kvbm_core.leader.shortage import Shortages
from kvbm_core.plan import Fill, FillReason, Load, Lookup, Probe, Store
from kvbm_core.tier import Op, Reason

__all__ = ["Endings", "Took"]


class Took(NamedTuple):
    """An operation that has ended in one tier."""

    kind: Op
    tier: TierState
    seconds: float
    """That the slowest rank took, from the plan's arrival."""
    op: Store | Load | Lookup | Fill
    failures: Mapping[int, Reason]
    """By position in the operation's keys, over all ranks."""
    is_last: bool
    """True if it has ended in all its tiers."""


class Endings:
    """Takes in how operations ended.

    Args:
        tiers: The leader's tiers.
        in_flight: The leader's operations under way.
        cost_model: Learns how long loads took.
        shortages: Learns which media are full.
        movements: Learns which blocks have arrived in a tier.
        left_alone: Learns which operations work and which fail.
    """

    def __init__(
        self,
        tiers: Tiers,
        in_flight: InFlight,
        cost_model: CostModel,
        shortages: Shortages,
        movements: Movements,
        left_alone: LeftAlone,
    ) -> None:
        self._tiers = tiers
        self._in_flight = in_flight
        self._cost_model = cost_model
        self._shortages = shortages
        self._movements = movements
        self._left_alone = left_alone
        self.took: list[Took] = []
        """Operations that have ended. The caller of `end` empties it."""

    def end(self, leg: LegEnded, now_s: float) -> None:
        """Take in the end of an operation in one tier, and with its last tier the end of all."""
        pending, position = leg.pending, leg.tier
        tier, op, failures = self._tiers[position], leg.pending.op, leg.pending.failures[leg.tier]
        if isinstance(op, Probe):
            self._left_alone.end_probe(tier, pending.details.get(position, ""), now_s)
            return
        asked = position == op.tier if isinstance(op, Load) else True
        is_source = isinstance(op, Fill) and position == op.source
        if isinstance(op, Lookup):
            kind = Op.LOOKUP
            self._end_lookup(pending, op, now_s)
        elif is_source:
            kind = Op.LOAD
            _drop_unreadable(tier, op.keys, failures)
        elif isinstance(op, Load) and asked:
            kind = Op.LOAD
            tier.counts.loaded += len(op.keys) - len(failures)
            tier.counts.loaded_bytes += (len(op.keys) - len(failures)) * tier.block_bytes[op.group]
            blocks, took_s = len(op.keys) * tier.weight(op.group), pending.took_s[position]
            self._cost_model.loaded(position, blocks, took_s, now_s, in_part=bool(failures))
            # The head of a prefix is unpinned last and so evicted last.
            tier.unpin(reversed(op.keys if pending.pinned else ()))
            _drop_unreadable(tier, op.keys, failures)
        else:
            kind = Op.STORE
            _count_stored(tier, op, len(op.keys) - len(failures))
            self._end_store(pending, op, position)
        absent = Reason.MISSING if kind is Op.LOOKUP else None  # An answer, not a failure.
        if failures:
            tier.counts.failed.update(
                (kind.value, why.value) for why in failures.values() if why is not absent
            )
        worst = _worst(failures) if len(failures) == len(op.keys) else Reason.NONE
        if position in pending.full and self._shortages.note(leg, self._in_flight.latest, now_s):
            worst = Reason.ERROR if worst is Reason.FULL else worst
        # A copy that the host pool keeps of a load is no operation of its own, and no fault if that fails.
        if asked:
            self.took.append(Took(kind, tier, pending.took_s[position], op, failures, leg.is_last))
            # A store that finds its block gone from the host pool has not been in this tier.
            if kind is not Op.STORE or worst is not Reason.MISSING:
                self._left_alone.judge(tier, kind, worst, pending.details.get(position, ""), now_s)
        if leg.is_last and isinstance(op, Fill):
            self._tiers[op.source].unpin(op.keys, was_used=False)

    def _end_lookup(self, pending: Pending, op: Lookup, now_s: float) -> None:
        tier = self._tiers[op.tier]
        assert tier.search
        found = tier.search.answer(op.op, pending.failures[op.tier], now_s)
        if pending.doomed:
            return
        news = tier.index.absent(found)
        known = tier.reserve(news, (), op.group)
        tier.index.stored(known[::-1])
        for key in news[len(known) :]:  # The index is full of pinned blocks.
            tier.search.miss(key, now_s)

    def _end_store(self, pending: Pending, op: Store | Load | Fill, position: int) -> None:
        tier = self._tiers[position]
        if not isinstance(op, Load):
            tier.storing -= len(op.keys)
        failures, charges = pending.failures[position], pending.charges.get(position)
        # The head of a prefix comes in last and so is evicted last.
        there = [at for at in range(len(op.keys) - 1, -1, -1) if at not in failures]
        keys = [op.keys[at] for at in there]
        tier.index.stored(keys, [charges[at] for at in there] if charges else None)
        for at in failures:
            tier.index.not_stored(op.keys[at])
        if failures and self._in_flight.over_several_ranks:  # Other ranks may have them.
            tier.discard([op.keys[at] for at in failures])
        if pending.doomed:
            for key in keys:
                tier.drop(key)
        else:
            self._movements.arrived(position, op.keys, failures)


def _drop_unreadable(tier: TierState, keys: Sequence[BlockKey], failures: Mapping[int, Reason]) -> None:
    """Forget blocks that a tier has not, or has damaged."""
    for at, reason in failures.items():
        if reason in (Reason.CORRUPT, Reason.MISSING):
            tier.drop(keys[at], corrupt=reason is Reason.CORRUPT)


def _count_stored(tier: TierState, op: Store | Load | Fill, blocks: int) -> None:
    nbytes = blocks * tier.block_bytes[op.group]
    tier.counts.stored += blocks
    tier.counts.stored_bytes += nbytes
    if isinstance(op, Fill):
        tier.counts.filled_bytes[op.source, op.reason.value] += nbytes
    elif isinstance(op, Load):
        tier.counts.filled_bytes[op.tier, FillReason.PROMOTION.value] += nbytes


def _worst(failures: Mapping[int, Reason]) -> Reason:
    """Choose the reason that an operation failed for: one that speaks against the tier, if there is any."""
    reasons = list(failures.values())
    return next((why for why in reasons if why.is_fault), reasons[0] if reasons else Reason.NONE)
