"""The plan in the making: operations are numbered here, and every rank's report of them is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvbm_core.block import BlockKey
from kvbm_core.leader.in_flight import InFlight
from kvbm_core.leader.tier_state import Tiers
from kvbm_core.plan import Fill, FillReason, Load, Lookup, Plan, Probe, Store, WriteOrder

__all__ = ["Draft"]


class Draft:
    """The operations planned since the last plan was taken.

    Args:
        tiers: The leader's tiers.
        in_flight: The leader's operations under way.
    """

    def __init__(self, tiers: Tiers, in_flight: InFlight) -> None:
        self._tiers = tiers
        self._in_flight = in_flight
        self._stores: list[Store] = []
        self._loads: list[Load] = []
        self._lookups: list[Lookup] = []
        self._fills: list[Fill] = []

    def __repr__(self) -> str:
        counts = f"{len(self._stores)} stores, {len(self._loads)} loads, {len(self._lookups)} lookups"
        return f"<Draft {counts}, {len(self._fills)} fills>"

    def stores(
        self, targets: Mapping[BlockKey, tuple[int, ...]], blocks: Mapping[BlockKey, int], group: int
    ) -> None:
        """Add blocks to be written from the device, one store for each set of tiers."""
        together: dict[tuple[int, ...], list[BlockKey]] = {}
        for key, tiers in targets.items():
            if tiers:
                together.setdefault(tiers, []).append(key)
        for tiers, keys in together.items():
            store = Store(self._in_flight.number(), keys, [blocks[key] for key in keys], list(tiers), group)
            self._stores.append(store)
            for tier in tiers:
                self._tiers[tier].storing += len(keys)
            self._in_flight.expect(store)

    def load(self, load: Load, *, pinned: bool) -> None:
        """Add a load; `pinned` says whether its blocks are kept from being evicted."""
        self._loads.append(load)
        self._in_flight.expect(load, pinned=pinned)

    def lookup(self, lookup: Lookup) -> None:
        """Add a question."""
        self._lookups.append(lookup)
        self._in_flight.expect(lookup)

    def fill(
        self, source: int, target: int, keys: Sequence[BlockKey], group: int, reason: FillReason
    ) -> None:
        """Add blocks to be copied from one tier to another: pinned in the source, reserved in the target."""
        number, host_pool = self._in_flight.number(), self._tiers.host_pool
        fill = Fill(number, source, target, list(keys), host_pool, group, reason)
        self._fills.append(fill)
        self._tiers[target].storing += len(keys)
        self._in_flight.expect(fill)

    def take(self, order: WriteOrder, probes: list[Probe]) -> Plan:
        """Take everything, with what the engine writes and the tiers that are to be tried."""
        stores, self._stores = self._stores, []
        loads, self._loads = self._loads, []
        lookups, self._lookups = self._lookups, []
        fills, self._fills = self._fills, []
        return Plan(
            self._tiers.take_drops(), stores, loads, lookups,
            order.overwrites, order.unordered, order.blocks_final, probes, fills,
        )  # fmt: skip
