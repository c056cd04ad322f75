"""The end of an operation in one tier on every rank: the index, the counters and the breaker learn of it.

This is where a load fails, for the leader: its blocks are unpinned, and those that are corrupt or gone are
dropped from the tier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvbm_core.block import BlockKey
from kvbm_core.leader.breaker import Breaker
from kvbm_core.leader.cost_model import CostModel
from kvbm_core.leader.in_flight import InFlight, LegEnded, Pending
from kvbm_core.leader.movements import Movements
from kvbm_core.leader.shortage import Shortages
from kvbm_core.leader.tier_news import TierNews
from kvbm_core.leader.tier_state import Tiers, TierState
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
        news: Is told which tiers are left alone, and which work again.
    """

    def __init__(
        self,
        tiers: Tiers,
        in_flight: InFlight,
        cost_model: CostModel,
        shortages: Shortages,
        movements: Movements,
        news: TierNews,
    ) -> None:
        self._tiers = tiers
        self._in_flight = in_flight
        self._cost_model = cost_model
        self._shortages = shortages
        self._movements = movements
        self._news = news
        self.took: list[Took] = []
        """Operations that have ended. The caller of `end` empties it."""
        self.probes: list[Probe] = []
        """That are to be planned. Whoever plans empties it."""

    def end(self, leg: LegEnded, now_s: float) -> None:
        """Take in the end of an operation in one tier, and with its last tier the end of all."""
        pending, position = leg.pending, leg.tier
        tier, op, failures = self._tiers[position], leg.pending.op, leg.pending.failures[leg.tier]
        if isinstance(op, Probe):
            self._end_probe(tier, pending.details.get(position, ""), now_s)
            return
        asked = position == op.tier if isinstance(op, Load) else True
        is_source = isinstance(op, Fill) and position == op.source
        if isinstance(op, Lookup):
            kind = Op.LOOKUP
            self._end_lookup(pending, op, now_s)
        elif is_source:
            kind = Op.LOAD
            self._drop_unreadable(position, op.keys, failures)
        elif isinstance(op, Load) and asked:
            kind = Op.LOAD
            tier.counts.loaded += len(op.keys) - len(failures)
            tier.counts.loaded_bytes += (len(op.keys) - len(failures)) * tier.block_bytes[op.group]
            blocks, took_s = len(op.keys) * tier.weight(op.group), pending.took_s[position]
            self._cost_model.loaded(position, blocks, took_s, now_s, in_part=bool(failures))
            self._end_load(pending, op)
        else:
            kind = Op.STORE
            self._count_stored(tier, op, len(op.keys) - len(failures))
            self._end_store(pending, op, position)
        absent = Reason.MISSING if kind is Op.LOOKUP else None  # An answer, not a failure.
        tier.counts.failed.update((kind.value, why.value) for why in failures.values() if why is not absent)
        worst = _worst(failures) if len(failures) == len(op.keys) else Reason.NONE
        if position in pending.full and self._shortages.note(leg, self._in_flight.latest, now_s):
            worst = Reason.ERROR if worst is Reason.FULL else worst
        # A copy that the host pool keeps of a load is no operation of its own, and no fault if that fails.
        if asked:
            self.took.append(Took(kind, tier, pending.took_s[position], op, failures, leg.is_last))
            # A store that finds its block gone from the host pool has not been in this tier.
            if kind is not Op.STORE or worst is not Reason.MISSING:
                self._judge(position, kind, worst, pending.details.get(position, ""), now_s)
        if leg.is_last and isinstance(op, Fill):
            self._tiers.unpin(op.source, op.keys, was_used=False)

    def _judge(self, position: int, kind: Op, worst: Reason, detail: str, now_s: float) -> None:
        """Have the breaker learn of an end, and say when the tier is left alone and when it works again."""
        tier = self._tiers[position]
        if tier.breaker.note(kind, worst, now_s):
            tier.left_alone_for = (kind, worst)
            self._plan_probe(position)
            self._news.left_alone(tier, kind, worst, detail, now_s)
        elif tier.left_alone_for and tier.breaker.since_s is None:
            tier.left_alone_for = None
            self._news.works(tier, now_s)

    def _plan_probe(self, position: int) -> None:
        """Have the ranks try a tier, unless they do."""
        tier = self._tiers[position]
        # Host memory does not fail by itself, and is not behind a queue on the ranks.
        if tier.is_probed or tier.is_host_pool:
            return
        tier.is_probed = True
        if not tier.capabilities.shared:
            self._tiers.make_room_for_probe(position)
        number = self._in_flight.number()
        op = Probe(number, position, Breaker.first_pause_s, Breaker.longest_pause_s)
        self._in_flight.expect(op)
        self.probes.append(op)

    def _end_probe(self, tier: TierState, detail: str, now_s: float) -> None:
        """Use a tier again that works on every rank; a detail says that a rank has logged it."""
        tier.is_probed = False
        tier.breaker.close(now_s)
        tier.left_alone_for = None
        self._news.works(tier, now_s, is_said=bool(detail))

    def _end_lookup(self, pending: Pending, op: Lookup, now_s: float) -> None:
        tier = self._tiers[op.tier]
        assert tier.probe
        found = tier.probe.answer(op.op, pending.failures[op.tier], now_s)
        if pending.doomed:
            return
        news = tier.index.absent(found)
        known = self._tiers.reserve(op.tier, news, (), op.group)
        for key in reversed(known):
            tier.index.stored(key)
        for key in news[len(known) :]:  # The index is full of pinned blocks.
            tier.probe.miss(key, now_s)

    def _end_load(self, pending: Pending, op: Load) -> None:
        # The head of a prefix is unpinned last and so evicted last.
        self._tiers.unpin(op.tier, reversed(op.keys if pending.pinned else ()))
        self._drop_unreadable(op.tier, op.keys, pending.failures[op.tier])

    def _drop_unreadable(
        self, position: int, keys: Sequence[BlockKey], failures: Mapping[int, Reason]
    ) -> None:
        """Forget blocks that a tier has not, or has damaged."""
        for at, reason in failures.items():
            if reason in (Reason.CORRUPT, Reason.MISSING):
                self._tiers.drop(position, keys[at], corrupt=reason is Reason.CORRUPT)

    def _count_stored(self, tier: TierState, op: Store | Load | Fill, blocks: int) -> None:
        nbytes = blocks * tier.block_bytes[op.group]
        tier.counts.stored += blocks
        tier.counts.stored_bytes += nbytes
        if isinstance(op, Fill):
            tier.counts.filled_bytes[op.source, op.reason.value] += nbytes
        elif isinstance(op, Load):
            tier.counts.filled_bytes[op.tier, FillReason.PROMOTION.value] += nbytes

    def _end_store(self, pending: Pending, op: Store | Load | Fill, position: int) -> None:
        tier = self._tiers[position]
        if not isinstance(op, Load):
            tier.storing -= len(op.keys)
        failures, charges = pending.failures[position], pending.charges.get(position)
        for at in reversed(range(len(op.keys))):
            if at in failures:
                tier.index.not_stored(op.keys[at])
                if self._in_flight.over_several_ranks:  # Other ranks may have it.
                    self._tiers.discard(position, [op.keys[at]])
            else:
                tier.index.stored(op.keys[at], charges[at] if charges else None)
                if pending.doomed:
                    self._tiers.drop(position, op.keys[at])
        if not pending.doomed:
            self._movements.arrived(position, op.keys, failures)


def _worst(failures: Mapping[int, Reason]) -> Reason:
    """Choose the reason that an operation failed for: one that speaks against the tier, if there is any."""
    reasons = list(failures.values())
    return next((why for why in reasons if why.is_fault), reasons[0] if reasons else Reason.NONE)
