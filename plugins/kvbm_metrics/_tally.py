"""What the leader of an engine counts, turned into readings once a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvbm_core import Load, Plan, Planner, Reason
from kvbm_core.leader.endings import Took
from kvbm_core.leader.tenancy.tenants import TenantLevel
from kvbm_core.plan import FillReason
from kvbm_metrics._table import HINTS, Readings, device_readings, reading

__all__ = ["Tally"]

_FAILURES: Final = {
    "store": ("full", "busy", "deadline", "error"),
    "load": ("missing", "corrupt", "full", "busy", "deadline", "error"),
    "lookup": ("busy", "deadline", "error"),
}
_FAULTS: Final = tuple(
    (operation, reason)
    for operation, reasons in _FAILURES.items()
    for reason in reasons
    if Reason(reason).is_fault
)
"""That a tier can be left alone for."""
_DROPS: Final = ("backlog", "unusable", "gone", "late", "admission")
_PLAIN: Final = ("saved_tokens", "hit_blocks", "missed_blocks")
_ANSWERS: Final = ("accepted", "clipped", "refused")


@dataclass(slots=True)
class _Request:
    """The loads of one request."""

    blocks_left: int
    tokens: int = 0
    """That are saved if all is loaded. 0: each block saves its own."""
    ended: list[tuple[Load, Mapping[int, Reason]]] = field(default_factory=list)


class Tally:
    """Counts for one engine, over all of its ranks. No clock, no Prometheus.

    Args:
        planner: Whose counts these are.
        block_tokens: Tokens of a block. 0: the engine has KV groups of which not all blocks are loaded, and a
            request saves what was promised, or nothing.
        constants: Readings of gauges that do not change.
    """

    def __init__(
        self,
        planner: Planner,
        block_tokens: int,
        constants: Mapping[str, int] | None = None,
    ) -> None:
        self._constants = dict(constants or {})
        self._planner = planner
        self._tiers = list(planner.counts)
        self._block_tokens = block_tokens
        self._requests: dict[str, _Request] = {}
        self._loading: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()
        self._seconds: dict[str, list[float]] = {}
        self._told: dict[str, int] = {}
        self._of_tenants: dict[str, int] = {}
        """Gauges of the tenants that were there last."""
        self._faults: dict[str, int] = {}
        """Likewise of what tiers were left alone for."""

    def __repr__(self) -> str:
        return f"<Tally {len(self._requests)} requests loading>"

    def matched(self, asked_tokens: int, asked_blocks: int, tiers: Sequence[int]) -> None:
        """Count one request's question, asked of each tier for what those above have not.

        Args:
            asked_tokens: Tokens of complete blocks that the engine's own cache had not.
            asked_blocks: Blocks of all KV groups that these need.
            tiers: For each block found the tier that has it.
        """
        self._counted["asked_tokens"] += asked_tokens
        found = Counter(tiers)
        for position, tier in enumerate(self._tiers):
            asked_blocks -= found[position]
            self._counted[reading("hit_blocks", tier)] += found[position]
            self._counted[reading("missed_blocks", tier)] += asked_blocks

    def promised(self, request: str, tokens: int) -> None:
        """Note that a request loads so many tokens."""
        if not self._block_tokens:
            self._requests.setdefault(request, _Request(0)).tokens = tokens

    def planned(self, plan: Plan) -> None:
        """Note a plan's loads, of which the ends will come."""
        for load in plan.loads:
            self._loading[self._tiers[load.tier]] += len(load.keys)
            request = self._requests.setdefault(load.request, _Request(0))
            request.blocks_left += len(load.keys)

    def ended(self, took: Iterable[Took], copied: Mapping[str, int]) -> None:
        """Take in operations that have ended on every rank, and what the devices have copied since.

        Args:
            took: As `Planner.took` has them.
            copied: Readings of all ranks' devices since the last time.
        """
        self._counted.update(copied)
        for each in took:
            key = reading("operation_seconds", each.kind.value, each.tier.name)
            self._seconds.setdefault(key, []).append(each.seconds)

    def loaded(self, load: Load, failures: Mapping[int, Reason]) -> None:
        """Take in a load that has ended on every rank; with a request's last one its saved tokens count."""
        self._loading[self._tiers[load.tier]] -= len(load.keys)
        request = self._requests.get(load.request)
        if request is None:
            return
        request.blocks_left -= len(load.keys)
        request.ended.append((load, failures))
        if request.blocks_left:
            return
        del self._requests[load.request]
        if not self._block_tokens:
            self._save(request)
            return
        # The engine computes everything after the first block that failed.
        for each, failed in sorted(request.ended, key=lambda pair: pair[0].op):
            good_blocks = min(failed, default=len(each.keys))
            tokens = good_blocks * self._block_tokens
            self._counted[reading("saved_tokens", self._tiers[each.tier])] += tokens
            if failed:
                break

    def _save(self, request: _Request) -> None:
        """Count the tokens of a request that was loaded in every KV group: for each tier by its blocks."""
        if any(failures for _, failures in request.ended):
            return
        shares: Counter[str] = Counter()
        for load, _ in request.ended:
            shares[self._tiers[load.tier]] += len(load.keys)
        whole, left = sum(shares.values()), request.tokens
        for tier, share in shares.most_common()[1:]:
            tokens = request.tokens * share // whole
            self._counted[reading("saved_tokens", tier)] += tokens
            left -= tokens
        self._counted[reading("saved_tokens", shares.most_common(1)[0][0])] += left

    def hinted(self, hint: str, answer: str) -> None:
        """Count a hint that was answered."""
        self._counted[reading("hints", hint, answer)] += 1

    def finished(self, request: str) -> None:
        """Forget a request: what still loads for it saves nothing."""
        self._requests.pop(request, None)

    def take(self, now_s: float) -> Readings:
        """Give what is new since the last call; at the first everything, so that series start at zero."""
        totals, gauges = dict(self._totals()), dict(self._gauges(now_s))
        told = self._told
        if not told:
            totals = dict.fromkeys(self._zeros(), 0) | totals
        news: dict[str, Any] = {
            key: value - told.get(key, 0) for key, value in totals.items() if told.get(key) != value
        }
        news |= {key: value for key, value in gauges.items() if told.get(key) != value}
        self._told = {**told, **totals, **gauges}
        seconds, self._seconds = self._seconds, {}
        return news | seconds

    def _totals(self) -> Iterator[tuple[str, int]]:
        yield from self._counted.items()
        for tier, counts in self._planner.counts.items():
            yield f"declined_blocks|{tier}", counts.declined
            yield f"loaded_blocks|{tier}", counts.loaded
            yield f"loaded_bytes|{tier}", counts.loaded_bytes
            yield f"stored_blocks|{tier}", counts.stored
            yield f"stored_bytes|{tier}", counts.stored_bytes
            yield f"evicted_blocks|{tier}", counts.evicted
            for (source, reason), nbytes in counts.filled_bytes.items():
                yield f"filled_bytes|{reason}|{source}|{tier}", nbytes
            for reason, count in counts.dropped.items():
                yield f"dropped_blocks|{reason}|{tier}", count
            for (operation, reason), count in counts.failed.items():
                yield f"failed_transfers|{operation}|{reason}|{tier}", count

    def _gauges(self, now_s: float) -> Iterator[tuple[str, int]]:
        yield from self._constants.items()
        tenants = self._planner.tenants
        yield from ((f"kept_bytes|{tier}", kept) for tier, kept in tenants.kept_bytes().items())
        yield from dict.fromkeys(self._of_tenants, 0).items()  # A tenant that is gone has nothing.
        self._of_tenants = dict(_tenant_gauges(tenants.levels()))
        yield from self._of_tenants.items()
        yield from dict.fromkeys(self._faults, 0).items()
        self._faults.clear()
        for tier, levels in self._planner.levels(now_s).items():
            if levels.left_alone_for:
                words = [word.value for word in levels.left_alone_for]
                self._faults[reading("tier_left_alone", *words, tier)] = 1
            yield f"tier_used_bytes|{tier}", levels.used_bytes
            yield f"tier_usable|{tier}", int(levels.usable)
            yield f"queued_blocks|store|{tier}", levels.waiting_blocks
            yield f"queued_blocks|load|{tier}", self._loading[tier]
            if levels.capacity_bytes is not None and levels.capacity_now_bytes is not None:
                yield f"tier_capacity_bytes|{tier}", levels.capacity_bytes
                yield f"tier_capacity_now_bytes|{tier}", levels.capacity_now_bytes
        yield from self._faults.items()

    def _zeros(self) -> Iterator[str]:
        """Name the series that will be there: what appears with its first event has no rate."""
        yield "asked_tokens"
        yield from device_readings(0, 0, 0)
        yield from (reading("hints", hint, answer) for hint in HINTS for answer in _ANSWERS)
        for position, tier in enumerate(self._tiers):
            yield from (reading(name, tier) for name in _PLAIN)
            for source, reason in self._fills_into(position):
                yield reading("filled_bytes", reason.value, str(source), tier)
            yield from (reading("dropped_blocks", reason, tier) for reason in _DROPS)
            yield from (reading("tier_left_alone", *fault, tier) for fault in _FAULTS)
            for operation, reasons in _FAILURES.items():
                yield from (reading("failed_transfers", operation, reason, tier) for reason in reasons)

    def _fills_into(self, position: int) -> Iterator[tuple[int, FillReason]]:
        """Name the ways by which blocks may come into a tier from others."""
        host_pool = self._planner.host_pool
        if position:
            yield position - 1, FillReason.DEMOTION
        if 0 <= host_pool < position:
            yield host_pool, FillReason.WRITE_BACK
        if position == host_pool:
            for lower in range(position + 1, len(self._tiers)):
                yield lower, FillReason.PROMOTION
                yield lower, FillReason.PREFETCH


def _tenant_gauges(levels: Iterable[TenantLevel]) -> Iterator[tuple[str, int]]:
    """Give what tenants have as readings."""
    for tenant, tier, used_bytes, quota_bytes in levels:
        yield reading("tenant_used_bytes", tenant, tier), used_bytes
        yield reading("tenant_quota_bytes", tenant, tier), quota_bytes
