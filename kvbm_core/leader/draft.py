"""The plan in the making: operations are numbered here, and every rank's report of them is expected."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.leader.ground.tiers import Tiers
from kvbm_core.leader.in_flight import InFlight
from kvbm_core.plan import Fill, FillReason, Load, Lookup, Plan, Probe, Store, WriteOrder

__all__ = ["Draft"]

_TOGETHER: Final = 64
"""Blocks of small stores that are one operation: it ends with the last, so a prompt waits for no other."""


class Draft:
    """The operations planned since the last plan was taken.

    Args:
        tiers: The leader's tiers.
        in_flight: The leader's operations under way.
    """

    def __init__(self, tiers: Tiers, in_flight: InFlight) -> None:
        self._tiers = tiers
        self._in_flight = in_flight
        self._plan = Plan()
        self._small: dict[tuple[tuple[int, ...], int], Store] = {}
        """The latest small store by its tiers and its group: requests that decode store a block each."""

    def __repr__(self) -> str:
        plan = self._plan
        counts = f"{len(plan.stores)} stores, {len(plan.loads)} loads, {len(plan.lookups)} lookups"
        return f"<Draft {counts}, {len(plan.fills)} fills>"

    @property
    def has_probes(self) -> bool:
        """True if a tier is to be tried; what else is planned is under way already."""
        return bool(self._plan.probes)

    def number(self) -> int:
        """Draw the number of the next operation."""
        return self._in_flight.number()

    def stores(
        self,
        targets: Mapping[int, list[BlockKey]],
        keys: Sequence[BlockKey],
        blocks: Sequence[int],
        group: int,
    ) -> list[int]:
        """Add blocks to be written from the device, one store for each set of tiers; small ones together.

        Args:
            targets: By position in the stack what each tier gets, in the order of `keys`.
            keys: That the engine offers.
            blocks: The device blocks, one a key.
            group: Number of the KV group.

        Returns:
            Numbers of the stores.
        """
        first, *others = targets.values()
        # As a rule they are equal, and lists of the same objects are quickly compared.
        is_one = all(each == first for each in others)
        together = {tuple(targets): first} if is_one else _by_tiers(targets)
        block_of, ops = dict(zip(keys, blocks, strict=True)), []
        for tiers, stored in together.items():
            here = list(blocks) if len(stored) == len(keys) else [block_of[key] for key in stored]
            for tier in tiers:
                self._tiers[tier].storing += len(stored)
            small = self._small.get((tiers, group))
            if small is not None and len(small.keys) + len(stored) <= _TOGETHER:
                small.keys.extend(stored)
                small.blocks.extend(here)
                ops.append(small.op)
                continue
            store = Store(self.number(), stored, here, list(tiers), group)
            self._plan.stores.append(store)
            self._small[tiers, group] = store
            self._in_flight.expect(store)
            ops.append(store.op)
        return ops

    def seal(self) -> None:
        """Have what is added from here on be operations of their own: a reset dooms those of before."""
        self._small.clear()

    def add(self, op: Load | Lookup | Probe | Fill, *, pinned: bool = True) -> None:
        """Add an operation; `pinned` says of a load whether its blocks are kept from being evicted."""
        plan = self._plan
        lists = {Load: plan.loads, Lookup: plan.lookups, Probe: plan.probes, Fill: plan.fills}
        lists[type(op)].append(op)  # type: ignore[attr-defined]
        self._in_flight.expect(op, pinned=pinned)

    def fill(
        self, source: int, target: int, runs: Iterable[tuple[Sequence[BlockKey], Container[BlockKey]]],
        group: int, reason: FillReason,
    ) -> list[BlockKey]:  # fmt: skip
        """Add blocks to be copied from one tier to another: pinned in the source, reserved in the target.

        Args:
            source: Position of the tier that has them.
            target: Position of the tier that shall have them.
            runs: Each in the order of its prefix, and that prefix, see `TierState.reserve`.
            group: Number of the KV group.
            reason: Why. Blocks that are demoted come as they would be evicted, and go below in that order.

        Returns:
            Those that there is room for.
        """
        above, below, filling = self._tiers[source], self._tiers[target], list[BlockKey]()
        for keys, prefix in runs:
            filling += below.reserve(keys, prefix, group)
        gone = above.index.pin(filling)
        assert not gone, "what is not in the source is not copied"
        if filling:  # The first of a fill is the last to be evicted.
            keys = filling[::-1] if reason is FillReason.DEMOTION else filling
            fill = Fill(self.number(), source, target, keys, self._tiers.host_pool, group, reason)
            self.add(fill)
            below.storing += len(keys)
        return filling

    def take(self, order: WriteOrder) -> Plan:
        """Take everything, with what the engine writes."""
        self._small.clear()
        plan, self._plan = self._plan, Plan()
        return Plan(
            self._tiers.take_drops(), plan.stores, plan.loads, plan.lookups,
            order.overwrites, order.unordered, order.blocks_final,
            plan.probes, plan.fills, self._tiers.take_used(),
        )  # fmt: skip


def _by_tiers(targets: Mapping[int, list[BlockKey]]) -> dict[tuple[int, ...], list[BlockKey]]:
    """Turn what each tier gets into the tiers that each key goes to, those together that go to the same."""
    tiers_of: dict[BlockKey, tuple[int, ...]] = {}
    for position, keys in targets.items():
        for key in keys:
            tiers_of[key] = (*tiers_of.get(key, ()), position)
    together: dict[tuple[int, ...], list[BlockKey]] = {}
    for key, tiers in tiers_of.items():
        together.setdefault(tiers, []).append(key)
    return together
