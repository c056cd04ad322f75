"""The ranks of a replay: they carry plans out in the time that the machine would take, and move no byte."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import Final

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
        self._group_bytes = layout.group_bytes
        self._speeds = [machine.speed(tier.name, tier.backend) for tier in layout.tiers]
        self._link_bytes_per_s = machine.link_bytes_per_s
        self._held: list[set[BlockKey] | None] = [set() if tier.shared else None for tier in layout.tiers]
        """Of tiers that must be asked, what was stored there."""
        self._paced = paced
        self._free_s = [_NO_TIME] * len(layout.tiers)
        """When each tier has written what it was given."""
        self._ending: list[tuple[float, int, list[Report]]] = []
        """A heap of what is under way: when it ends, and the reports."""
        self._loading: dict[str, tuple[float, float]] = {}
        """By request the seconds that its load takes, and when it has ended."""
        self.loaded = 0
        """Blocks that were loaded."""
        self._ties = itertools.count()

    def __repr__(self) -> str:
        return f"<Ranks of {len(self._speeds)} tiers, {len(self._ending)} operations under way>"

    def submit(self, plan: Plan, now_s: float) -> list[Report]:
        """Carry out a plan: report what takes no time, and note when the rest will have ended."""
        reports = [self._end_lookup(lookup) for lookup in plan.lookups]
        self._begin_loads(plan.loads, now_s)
        writes: list[Store | Fill] = [*plan.stores, *plan.fills]
        for write in writes:
            if isinstance(write, Fill) and write.target < write.source:
                self._read_ahead(write, now_s)
            elif self._paced:
                self._begin(write, now_s)
            else:
                reports += self._end_write(write, write.tiers)
        return reports

    def loading(self, request: str) -> tuple[float, float]:
        """Give the seconds that a request's load takes, and when it has ended. Asked once."""
        return self._loading.pop(request, (_NO_TIME, _NO_TIME))

    def next_s(self) -> float:
        """Give when the next operation will have ended. 0: none is under way."""
        return self._ending[0][0] if self._ending else _NO_TIME

    def ended(self, until_s: float) -> Iterator[tuple[float, list[Report]]]:
        """Give what has been written by then, in order, each with the time."""
        while self._ending and self._ending[0][0] <= until_s:
            end_s, _, reports = heapq.heappop(self._ending)
            yield end_s, reports

    def _begin_loads(self, loads: Sequence[Load], now_s: float) -> None:
        """Load side by side: of each request a tier's blocks one after the other, tiers at once."""
        takes: dict[str, dict[int, float]] = {}
        for load in loads:
            speed, nbytes = self._speeds[load.tier], self._group_bytes[load.group]
            block_s = nbytes / min(speed.load_bytes_per_s, self._link_bytes_per_s)
            took = takes.setdefault(load.request, {})
            took[load.tier] = took.get(load.tier, speed.latency_s) + len(load.keys) * block_s
        for load in loads:
            took = takes[load.request]
            self.loaded += len(load.keys)
            reports = [Report(load.op, tier, {}, took.get(tier, _NO_TIME)) for tier in load.tiers]
            self._end(now_s + took[load.tier], reports)
        for request, took in takes.items():
            load_s = max(took.values())
            self._loading[request] = load_s, now_s + load_s

    def _read_ahead(self, fill: Fill, now_s: float) -> None:
        """Bring blocks up for requests that wait."""
        speed, nbytes = self._speeds[fill.source], len(fill.keys) * self._group_bytes[fill.group]
        end_s = now_s + speed.latency_s + nbytes / speed.load_bytes_per_s
        self._end(end_s, self._end_write(fill, fill.tiers))

    def _begin(self, write: Store | Fill, now_s: float) -> None:
        """Put blocks behind what a tier writes already. What it reads for that comes with it."""
        target = write.target if isinstance(write, Fill) else -1
        for tier in write.tiers:
            if target >= 0 and tier != target:
                continue
            nbytes = len(write.keys) * self._group_bytes[write.group]
            end_s = max(now_s, self._free_s[tier]) + nbytes / self._speeds[tier].store_bytes_per_s
            self._free_s[tier] = end_s
            ends_in = write.tiers if target >= 0 else [tier]
            self._end(end_s, self._end_write(write, ends_in))

    def _end(self, end_s: float, reports: list[Report]) -> None:
        heapq.heappush(self._ending, (end_s, next(self._ties), reports))

    def _end_write(self, write: Store | Fill, tiers: Sequence[int]) -> list[Report]:
        for tier in tiers:
            held = self._held[tier]
            if held is not None and not (isinstance(write, Fill) and tier == write.source):
                held.update(write.keys)
        return [Report(write.op, tier) for tier in tiers]

    def _end_lookup(self, lookup: Lookup) -> Report:
        held = self._held[lookup.tier] or ()
        missing = {at: Reason.MISSING for at, key in enumerate(lookup.keys) if key not in held}
        return Report(lookup.op, lookup.tier, missing)
