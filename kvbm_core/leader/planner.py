"""The verbs of the leader's half: what is matched, looked up, loaded and stored, as plans. No I/O, no clock.

match ──► load ─┐
lookup ─────────┼─► take: one Plan ──► report (from every rank) ──► index
store ──────────┘
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from kvbm_core.block import BlockKey, BlockState
from kvbm_core.leader.cost_model import CostModel
from kvbm_core.leader.counts import TierCounts, TierLevels
from kvbm_core.leader.endings import Endings
from kvbm_core.leader.in_flight import InFlight
from kvbm_core.leader.matches import Match, Matcher, Prefix
from kvbm_core.leader.shortage import Shortages
from kvbm_core.leader.tier_state import Tiers
from kvbm_core.leader.write_back import WriteBack
from kvbm_core.plan import Load, Lookup, Plan, Report, Store, TierStatus, WriteOrder
from kvbm_core.policy import EvictionPolicy, Lru
from kvbm_core.tier import Reason

__all__ = ["Planner"]


class Planner:
    """Decides what is loaded, stored and evicted, for one engine.

    Args:
        ranks: What each worker says of its tiers, fastest first.
        max_store_blocks: Blocks on their way into a tier below the host pool, at once.
        policy: Makes the eviction order of one tier.
        block_tokens: Tokens a block, where only what loads faster than the engine computes shall be loaded;
            the engine tells `cost_model` how fast it computes. 0: what a tier has is loaded.
        ops: Numbers for operations, where planners follow each other: no late report may fit another one.

    Raises:
        ConfigError: If the ranks have different stacks; names rank and difference.
    """

    def __init__(
        self,
        ranks: Sequence[Sequence[TierStatus]],
        *,
        max_store_blocks: int = 512,
        policy: Callable[[], EvictionPolicy] = Lru,
        block_tokens: int = 0,
        ops: Iterator[int] | None = None,
    ) -> None:
        self._tiers = Tiers(ranks, policy)
        self._in_flight = InFlight(len(ranks), ops)
        self._matcher = Matcher(self._tiers, self._in_flight)
        self._write_back = WriteBack(self._tiers, max_store_blocks)
        self.cost_model = CostModel(len(self._tiers), block_tokens, self._tiers.host_pool)
        self._shortages = Shortages(self._tiers, len(ranks))
        self._endings = Endings(self._tiers, self._in_flight, self.cost_model, self._shortages)
        self._stores: list[Store] = []
        self._loads: list[Load] = []
        self._lookups: list[Lookup] = []
        self.loading_blocks = 0
        """Blocks on their way to the device, for which requests wait. Of a load in-step, the device waits."""

    def __repr__(self) -> str:
        flights = f"{len(self._in_flight)} operations pending, {self.loading_blocks} blocks loading"
        return f"<Planner {self._tiers!r}; {flights}>"

    @property
    def host_pool(self) -> int:
        """Position of the host pool; -1 for none."""
        return self._tiers.host_pool

    @property
    def counts(self) -> dict[str, TierCounts]:
        """What has happened so far, by the tier's name."""
        return {tier.name: tier.counts for tier in self._tiers}

    @property
    def took(self) -> Sequence[tuple[str, str, float]]:
        """Operations that ended with the last `report`: kind, tier's name, seconds on the slowest rank."""
        return self._endings.took

    @property
    def occupancy(self) -> dict[str, int]:
        """Blocks in each tier, by its name."""
        return {tier.name: len(tier.index) for tier in self._tiers}

    def levels(self, now_s: float) -> dict[str, TierLevels]:
        """Where each tier stands, by its name."""
        return {
            t.name: TierLevels(
                len(t.index),
                t.storing + len(t.write_back),
                t.breaker.closed(now_s) and not t.is_left_alone,
                t.index.capacity_blocks,
            )
            for t in self._tiers
        }

    def busy(self, now_s: float) -> bool:
        """Return True if something is under way, or would be if `take` were called."""
        return bool(self._in_flight or self._tiers.has_drops or self._write_back.is_due(now_s))

    def match(self, keys: Sequence[BlockKey], now_s: float) -> list[int]:
        """Find the longest prefix that can be loaded.

        Args:
            keys: Of consecutive blocks.
            now_s: The time, in seconds, on any clock that does not go back.

        Returns:
            For each block of that prefix the tier to load it from. Empty if there is none.
        """
        return self._matcher.match(keys, now_s)

    def find(self, prefix: Prefix, start: int, stop: int, now_s: float, last: Match | None = None) -> Match:
        """Find what `match` finds, ask the tiers that must be asked, and remember the finding.

        Args:
            prefix: The keys of a prompt.
            start: First block to be found.
            stop: Block after the last to be found; more than `start`.
            now_s: The time, as in `match`.
            last: The finding of before. It is given back, at the same cost for any length, as long as
                each of its blocks is where it was found, no more is known of those after it, and no new
                question is due.
        """
        if last is not None and self._matcher.holds(last, prefix, start, stop, now_s):
            return last
        keys = prefix.slice(start, stop)
        tiers = self.match(keys, now_s)
        rest = keys[len(tiers) :]
        lookups = self.lookup(rest, now_s) if rest else frozenset()
        return self._matcher.remember(start, stop, tiers, lookups, rest, now_s)

    def is_ready(self, key: BlockKey, tier: int) -> bool:
        """Return True if a tier has a block."""
        return key in self._tiers[tier].index

    def decline(self, tiers: Iterable[int]) -> None:
        """Note that blocks found in these tiers are computed, because `cost_model` finds that faster."""
        for tier in tiers:
            self._tiers[tier].counts.declined += 1

    def lookup(self, keys: Sequence[BlockKey], now_s: float) -> frozenset[int]:
        """Plan to ask the tiers that cannot list their blocks for those that `match` did not find.

        Args:
            keys: Of the consecutive blocks after the last match; at least one.
            now_s: The time, as in `match`.

        Returns:
            The operations whose answers are on their way: match again when none is pending.
        """
        asking: set[int] = set()
        for position, tier in enumerate(self._tiers):
            # A block that is on its way there needs no question, and is no hit yet.
            absent = tier.index.state(keys[0]) is BlockState.ABSENT
            if (
                tier.probe is None
                or not absent
                or not tier.breaker.closed(now_s)
                or self.cost_model.should_skip(position, now_s)
            ):
                continue
            if (number := tier.probe.asking(keys[0])) is not None:
                asking.add(number)
            elif span := tier.probe.span(keys, now_s):
                number = self._in_flight.number()
                asking.add(number)
                op = Lookup(number, position, tier.probe.ask(number, span))
                self._lookups.append(op)
                self._in_flight.expect(op)
        return frozenset(asking)

    def load(
        self,
        request: str,
        keys: Sequence[BlockKey],
        blocks: Sequence[int],
        tiers: Sequence[int],
        *,
        in_step: bool = False,
    ) -> None:
        """Plan to load blocks, and keep them from being evicted until that is done.

        Args:
            request: Whose they are.
            keys: Of consecutive blocks.
            blocks: The device blocks to fill, one a key.
            tiers: As `match` found them, one a key. Blocks that have left their tier since then fail: the
                engine was told that they come, and hears from the load that they do not.
            in_step: The engine uses the blocks in this step; only from the host pool, and
                of a match of this step.
        """
        gone: set[BlockKey] = set()
        for position in set(tiers):
            there = [key for key, tier in zip(keys, tiers, strict=True) if tier == position]
            gone.update(self._tiers[position].index.pin(there))
        assert not (gone and in_step), "a load in step cannot fail"
        pinned = [key not in gone for key in keys] if gone else [True] * len(keys)
        fills = self._plan_fills(keys, tiers, gone)
        start = 0
        for (tier, fill, held), run in itertools.groupby(zip(tiers, fills, pinned, strict=True)):
            part = slice(start, start := start + len(list(run)))
            number = self._in_flight.number()
            op = Load(number, request, tier, fill, list(keys[part]), list(blocks[part]), in_step)
            self._loads.append(op)
            self._in_flight.expect(op, pinned=held)
        self.loading_blocks += 0 if in_step else len(keys)

    def store(
        self, keys: Sequence[BlockKey], blocks: Sequence[int], prefix: Container[BlockKey], now_s: float
    ) -> None:
        """Plan to write blocks through to every tier that has them not.

        Args:
            keys: Of consecutive blocks that are complete in device memory.
            blocks: The device blocks, one a key.
            prefix: The keys of the same prefix, those before and `keys`. It is asked, never listed, and
                kept while blocks wait to be stored.
            now_s: The time, as in `match`.
        """
        targets: dict[BlockKey, list[int]] = {key: [] for key in keys}
        for position, tier in enumerate(self._tiers):
            # The head of a prefix is the most recently used, and so evicted last.
            for key in reversed(keys):
                tier.index.touch(key)
            wanted = [key for key in keys if tier.index.state(key) is BlockState.ABSENT]
            if not tier.is_host_pool or not tier.breaker.closed(now_s):
                wanted = self._write_back.admit(tier, wanted, prefix, now_s)
            # Some of `keys` may be there already: the others must not push these out.
            for key in self._tiers.reserve(position, wanted, prefix):
                targets[key].append(position)
        self._group(targets, dict(zip(keys, blocks, strict=True)))

    def take(self, now_s: float, order: WriteOrder | None = None) -> Plan:
        """Take everything planned since the last call, with what the engine writes."""
        self._shortages.grow(now_s)
        if self.host_pool >= 0:
            for position in range(len(self._tiers)):
                if keys := self._write_back.due(position, now_s):
                    self._plan_store(keys, [], [position])
        stores, self._stores = self._stores, []
        loads, self._loads = self._loads, []
        lookups, self._lookups = self._lookups, []
        order = order or WriteOrder()
        return Plan(
            self._tiers.take_drops(), stores, loads, lookups,
            order.overwrites, order.unordered, order.blocks_final,
        )  # fmt: skip

    def report(self, reports: Iterable[Report], now_s: float) -> list[tuple[Load, dict[int, Reason]]]:
        """Take in what the ranks report. What is not expected is of a planner before, and ignored.

        Returns:
            The loads that are complete now, each with the positions that failed and why.
        """
        finished = []
        self._endings.took.clear()
        for leg in self._in_flight.take_in(reports):
            op = leg.pending.op
            if isinstance(op, Load) and leg.tier == op.tier and not op.in_step:
                self.loading_blocks -= len(op.keys)
            self._endings.end(leg, now_s)
            if leg.is_last and isinstance(op, Load):
                finished.append((op, leg.pending.failures[op.tier]))
        return finished

    def reset(self) -> None:
        """Forget every block in every tier, those on their way too. In a shared tier they stay."""
        self._in_flight.doom()
        self._tiers.drop_all()

    def _plan_fills(
        self, keys: Sequence[BlockKey], tiers: Sequence[int], gone: Container[BlockKey]
    ) -> list[int]:
        """Choose which blocks the host pool keeps as they pass through its memory."""
        host_pool = self.host_pool
        lower = [
            key
            for key, tier in zip(keys, tiers, strict=True)
            if tier > host_pool >= 0 and not self._tiers[tier].capabilities.device_direct and key not in gone
        ]
        if not lower:
            return [-1] * len(keys)
        # Their ancestors need no mention: `load` has pinned them.
        kept = set(self._tiers.reserve(host_pool, lower, ()))
        return [host_pool if key in kept else -1 for key in keys]

    def _group(self, targets: dict[BlockKey, list[int]], blocks: dict[BlockKey, int]) -> None:
        """Plan one store for each set of tiers."""
        groups: dict[tuple[int, ...], list[BlockKey]] = {}
        for key, tiers in targets.items():
            if tiers:
                groups.setdefault(tuple(tiers), []).append(key)
        for group, keys in groups.items():
            self._plan_store(keys, [blocks[key] for key in keys], list(group))

    def _plan_store(self, keys: list[BlockKey], blocks: list[int], tiers: list[int]) -> None:
        op = Store(self._in_flight.number(), keys, blocks, tiers)
        self._stores.append(op)
        for tier in tiers:
            self._tiers[tier].storing += len(keys)
        self._in_flight.expect(op)
