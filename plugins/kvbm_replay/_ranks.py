"""The ranks of a replay: they carry plans out in the time that the machine would take, and move no byte."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from kvbm_core import Planner
from kvbm_core.block import BlockKey
from kvbm_core.plan import Fill, Load, Lookup, Plan, Report, Store
from kvbm_core.tier import Reason
from kvbm_replay._layout import Layout
from kvbm_replay._machine import Machine

__all__ = ["Ranks"]

_NO_TIME: Final = 0.0


class Ranks:
    """One rank, that has everything.

    Args:
        layout: The stack.
        machine: How fast it is.
        paced: True if a tier writes one block after the other, at its speed. False: at once.
    """

    def __init__(self, layout: Layout, machine: Machine, *, paced: bool) -> None:
        self._block_bytes = layout.block_bytes
        self._speeds = [machine.speed(tier.name, tier.backend) for tier in layout.tiers]
        self._link_bytes_per_s = machine.link_bytes_per_s
        self._held: list[set[BlockKey] | None] = [set() if tier.shared else None for tier in layout.tiers]
        """Of tiers that must be asked, what was stored there."""
        self._paced = paced
        self._free_s = [_NO_TIME] * len(layout.tiers)
        """When each tier has written what it was given."""
        self._writing: list[tuple[float, int, list[Report]]] = []
        """A heap of what is being written: when it ends, and the reports."""
        self._ties = itertools.count()

    def __repr__(self) -> str:
        return f"<Ranks of {len(self._speeds)} tiers, {len(self._writing)} operations under way>"

    def load_seconds(self, tiers: Sequence[int]) -> dict[int, float]:
        """Give for each tier the seconds in which its blocks come, of a load with one tier a block."""
        link_s = self._block_bytes / self._link_bytes_per_s
        took = {}
        for tier in dict.fromkeys(tiers):
            speed = self._speeds[tier]
            block_s = max(self._block_bytes / speed.load_bytes_per_s, link_s)
            took[tier] = speed.latency_s + tiers.count(tier) * block_s
        return took

    def submit(self, planner: Planner, plan: Plan, now_s: float, loading: Mapping[int, float]) -> None:
        """Carry out a plan: report what takes no time, and note when the rest will have ended.

        Args:
            planner: Is told.
            plan: Of it.
            now_s: The time.
            loading: Seconds that the plan's loads take, by tier.
        """
        reports: list[Report] = []
        for load in plan.loads:
            reports += self._end_load(load, loading)
        for lookup in plan.lookups:
            reports.append(self._end_lookup(lookup))
        writes: list[Store | Fill] = [*plan.stores, *plan.fills]
        for write in writes:
            if self._paced:
                self._begin(write, now_s)
            else:
                reports += self._end_write(write, write.tiers)
        if reports:
            planner.report(reports, now_s)

    def ended(self, until_s: float) -> Iterator[tuple[float, list[Report]]]:
        """Give what has been written by then, in order, each with the time."""
        while self._writing and self._writing[0][0] <= until_s:
            end_s, _, reports = heapq.heappop(self._writing)
            yield end_s, reports

    def _begin(self, write: Store | Fill, now_s: float) -> None:
        """Put blocks behind what a tier writes already. What it reads for that comes with it."""
        target = write.target if isinstance(write, Fill) else -1
        for tier in write.tiers:
            if target >= 0 and tier != target:
                continue
            nbytes = len(write.keys) * self._block_bytes
            end_s = max(now_s, self._free_s[tier]) + nbytes / self._speeds[tier].store_bytes_per_s
            self._free_s[tier] = end_s
            ends_in = write.tiers if target >= 0 else [tier]
            heapq.heappush(self._writing, (end_s, next(self._ties), self._end_write(write, ends_in)))

    def _end_write(self, write: Store | Fill, tiers: Sequence[int]) -> list[Report]:
        for tier in tiers:
            held = self._held[tier]
            if held is not None and not (isinstance(write, Fill) and tier == write.source):
                held.update(write.keys)
        return [Report(write.op, tier) for tier in tiers]

    def _end_load(self, load: Load, loading: Mapping[int, float]) -> list[Report]:
        return [Report(load.op, tier, {}, loading.get(tier, _NO_TIME)) for tier in load.tiers]

    def _end_lookup(self, lookup: Lookup) -> Report:
        held = self._held[lookup.tier] or ()
        missing = {at: Reason.MISSING for at, key in enumerate(lookup.keys) if key not in held}
        return Report(lookup.op, lookup.tier, missing)
