"""The leader's half: knows where every block is, and plans what to move. No I/O, no clock.

match ──► load ─┐
lookup ─────────┼─► take: one Plan ──► report (from every rank) ──► index
store ──────────┘
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Final

from kvbm_core._counts import TierCounts, TierLevels
from kvbm_core._finder import Finder
from kvbm_core._guard import Guard
from kvbm_core._index import Departures, TierIndex
from kvbm_core._matches import Match, Matcher, Prefix
from kvbm_core._policy import EvictionPolicy, Lru
from kvbm_core._tier_state import Pending, TierState, same_stack
from kvbm_core.block import BlockKey, BlockState
from kvbm_core.plan import Load, Lookup, Plan, Report, Store, TierStatus, WriteOrder
from kvbm_core.tier import Reason

__all__ = ["Planner"]

logger = logging.getLogger("kvbm_core")

_MAX_KNOWN_BLOCKS: Final = 1 << 18
"""Remembered of a shared tier; what is forgotten is looked up, or stored, once more."""

_GRAVITY: Final = (Reason.MISSING, Reason.BUSY, Reason.FULL, Reason.DEADLINE, Reason.ERROR, Reason.CORRUPT)
"""Of what two ranks say of one block, the graver counts: a rank whose tier fails must be noticed beside
one that only has not the block, and a corrupt part must be dropped."""


class Planner:
    """Decides what is loaded, stored and evicted, for one engine.

    Args:
        ranks: What each worker says of its tiers, fastest first.
        max_store_blocks: Blocks on their way into a tier that does not lend its memory, at once.
        policy: Makes the eviction order of one tier.
        block_tokens: Tokens a block, where only what loads faster than the engine computes shall be loaded;
            the engine tells `guard` how fast it computes. 0: what a tier has is loaded.
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
        same_stack(ranks)
        self._world_size = len(ranks)
        self._max_store_blocks = max_store_blocks
        self._tiers: list[TierState] = []
        self._drops: dict[int, list[BlockKey]] = {}
        self._ops = ops or itertools.count(1)
        self._stores: list[Store] = []
        self._loads: list[Load] = []
        self._lookups: list[Lookup] = []
        self._pending: dict[int, Pending] = {}
        self._departures = Departures()
        self._matcher = Matcher(self._tiers, self._departures, self._pending)
        for position, statuses in enumerate(zip(*ranks, strict=True)):
            self._open(position, statuses, policy())
        self.lender = next((i for i, tier in enumerate(self._tiers) if tier.lends), -1)
        """Position of the tier that lends its memory; -1 for none."""
        self.guard = Guard(len(self._tiers), block_tokens, self.lender)
        self.loading_blocks = 0
        """Blocks on their way to the device, for which requests wait. Of a load in-step, the device waits."""

    def __repr__(self) -> str:
        tiers = ", ".join(f"{t.name} {len(t.index)}/{t.index.capacity_blocks}" for t in self._tiers)
        flights = f"{len(self._pending)} operations pending, {self.loading_blocks} blocks loading"
        return f"<Planner {tiers}; {flights}>"

    @property
    def counts(self) -> dict[str, TierCounts]:
        """What has happened so far, by the tier's name."""
        return {tier.name: tier.counts for tier in self._tiers}

    @property
    def occupancy(self) -> dict[str, int]:
        """Blocks in each tier, by its name."""
        return {tier.name: len(tier.index) for tier in self._tiers}

    def levels(self, now_s: float) -> dict[str, TierLevels]:
        """Where each tier stands, by its name."""
        return {
            t.name: TierLevels(len(t.index), t.storing + len(t.owed), t.breaker.closed(now_s))
            for t in self._tiers
        }

    def busy(self, now_s: float) -> bool:
        """Say whether something is under way, or would be if `take` were called."""
        return bool(
            self._pending or self._drops or any(t.owed and t.breaker.closed(now_s) for t in self._tiers)
        )

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
        """Note that blocks found in these tiers are computed, because `guard` finds that faster."""
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
                tier.finder is None
                or not absent
                or not tier.breaker.closed(now_s)
                or self.guard.shuns(position, now_s)
            ):
                continue
            if (number := tier.finder.asking(keys[0])) is not None:
                asking.add(number)
            elif span := tier.finder.span(keys, now_s):
                number = next(self._ops)
                asking.add(number)
                op = Lookup(number, position, tier.finder.ask(number, span))
                self._lookups.append(op)
                self._expect(op, [position])
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
            in_step: The engine uses the blocks in this step; only from the tier that lends its memory, and
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
            op = Load(next(self._ops), request, tier, fill, list(keys[part]), list(blocks[part]), in_step)
            self._loads.append(op)
            self._expect(op, [tier] if fill < 0 else [tier, fill], pinned=held)
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
            if not tier.lends or not tier.breaker.closed(now_s):
                wanted = self._admit(tier, wanted, prefix, now_s)
            # Some of `keys` may be there already: the others must not push these out.
            for key in self._reserve(position, wanted, prefix):
                targets[key].append(position)
        self._group(targets, dict(zip(keys, blocks, strict=True)))

    def take(self, now_s: float, order: WriteOrder | None = None) -> Plan:
        """Take everything planned since the last call, with what the engine writes."""
        if self.lender >= 0:
            for position in range(len(self._tiers)):
                self._pay(position, now_s)
        drops, self._drops = self._drops, {}
        stores, self._stores = self._stores, []
        loads, self._loads = self._loads, []
        lookups, self._lookups = self._lookups, []
        order = order or WriteOrder()
        return Plan(
            list(drops.items()), stores, loads, lookups,
            order.overwrites, order.unordered, order.blocks_final,
        )  # fmt: skip

    def report(self, reports: Iterable[Report], now_s: float) -> list[tuple[Load, dict[int, Reason]]]:
        """Take in what the ranks report. What is not expected is of a planner before, and ignored.

        Returns:
            The loads that are complete now, each with the positions that failed and why.
        """
        finished = []
        for report in reports:
            if (pending := self._pending.get(report.op)) is None or report.tier not in pending.waiting:
                continue
            known = pending.failures.setdefault(report.tier, {})
            known.update({at: max(why, known.get(at, why), key=_GRAVITY.index)
                          for at, why in report.failures.items()})  # fmt: skip
            pending.waiting[report.tier] -= 1
            pending.took_s = max(pending.took_s, report.seconds)
            if pending.waiting[report.tier] == 0:
                del pending.waiting[report.tier]
                self._end_leg(pending, report.tier, now_s)
            if not pending.waiting:
                del self._pending[report.op]
                self._end(pending)
                if isinstance(pending.op, Load):
                    finished.append((pending.op, pending.failures[pending.op.tier]))
        return finished

    def reset(self) -> None:
        """Forget every block in every tier, those on their way too. In a shared tier they stay."""
        for pending in self._pending.values():
            pending.doomed = True
        for position, tier in enumerate(self._tiers):
            tier.owed.clear()
            for key in tier.index.ready():
                self._drop(position, key)

    def _open(self, position: int, statuses: Sequence[TierStatus], policy: EvictionPolicy) -> None:
        """Start a tier's index with the blocks that every rank found, and have the others dropped."""
        limits = [s.capabilities.capacity_blocks for s in statuses]
        shared = statuses[0].capabilities.shared
        bounded = [limit for limit in (*limits, _MAX_KNOWN_BLOCKS if shared else None) if limit is not None]
        index = TierIndex(min(bounded) if bounded else None, policy, self._departures)
        common = set.intersection(*(set(status.inventory) for status in statuses))
        ordered = [key for key in statuses[0].inventory if key in common]
        keep = ordered[-index.capacity_blocks :] if index.capacity_blocks is not None else ordered
        for key in keep:
            index.found(key)
        orphans = set().union(*(status.inventory for status in statuses)).difference(keep)
        capabilities = statuses[0].capabilities
        finder = Finder() if capabilities.remote_lookup else None
        direct = capabilities.device_direct
        self._tiers.append(
            TierState(statuses[0].name, index, capabilities.addressable, shared, direct, finder)
        )
        self._discard(position, orphans)

    def _plan_fills(
        self, keys: Sequence[BlockKey], tiers: Sequence[int], gone: Container[BlockKey]
    ) -> list[int]:
        """Choose which blocks the lender keeps as they pass through its memory."""
        lender = self.lender
        lower = [
            key
            for key, tier in zip(keys, tiers, strict=True)
            if tier > lender >= 0 and not self._tiers[tier].direct and key not in gone
        ]
        if not lower:
            return [-1] * len(keys)
        # Their ancestors need no mention: `load` has pinned them.
        kept = set(self._reserve(lender, lower, ()))
        return [lender if key in kept else -1 for key in keys]

    def _reserve(
        self, position: int, keys: Sequence[BlockKey], prefix: Container[BlockKey]
    ) -> list[BlockKey]:
        tier = self._tiers[position]
        filling, evicted = tier.index.reserve(keys, prefix)
        if not tier.shared:  # Else they are forgotten here and stay there.
            self._discard(position, evicted)
            tier.counts.evicted += len(evicted)
        return filling

    def _admit(
        self, tier: TierState, keys: list[BlockKey], prefix: Container[BlockKey], now_s: float
    ) -> list[BlockKey]:
        """Choose what is written from the device now.

        What the lender has already is owed, because it need not be gathered again; so is what is
        too much at once. Without a lender the surplus is dropped.
        """
        usable = tier.breaker.closed(now_s)
        room = max(0, self._max_store_blocks - tier.storing) if usable else 0
        if self.lender < 0 or tier.lends:
            tier.counts.dropped["backlog" if usable else "unusable"] += len(keys[room:])
            return keys[:room]
        lent = self._tiers[self.lender].index
        fresh = [key for key in keys if key not in lent]
        self._owe(tier, [*fresh[room:], *(key for key in keys if key in lent)], prefix)
        return fresh[:room]

    def _owe(self, tier: TierState, keys: Iterable[BlockKey], prefix: Container[BlockKey]) -> None:
        for key in keys:
            # Full: the end of a prefix is dropped, because its end without its head is worth nothing.
            if len(tier.owed) < self._max_store_blocks:
                tier.owed[key] = prefix
            elif key not in tier.owed:
                tier.counts.dropped["backlog"] += 1

    def _pay(self, position: int, now_s: float) -> None:
        """Plan the copies from the lender that are owed to a tier."""
        tier, lender = self._tiers[position], self._tiers[self.lender]
        if not tier.owed or not tier.breaker.closed(now_s):
            return
        due: list[tuple[BlockKey, Container[BlockKey]]] = []
        while tier.owed and tier.storing + len(due) < self._max_store_blocks:
            key, prefix = next(iter(tier.owed.items()))
            state = lender.index.state(key)
            if state is BlockState.FILLING:
                break
            del tier.owed[key]
            if state is BlockState.READY:
                due.append((key, prefix))
            elif key not in tier.index:
                tier.counts.dropped["gone"] += 1
        keys: list[BlockKey] = []
        for _, run in itertools.groupby(due, key=lambda pair: id(pair[1])):
            together = list(run)
            keys += self._reserve(position, [key for key, _ in together], together[0][1])
        gone = lender.index.pin(keys)
        assert not gone, "what the lender has lost since is not owed"
        if keys:
            self._plan_store(keys, [], [position])

    def _group(self, targets: dict[BlockKey, list[int]], blocks: dict[BlockKey, int]) -> None:
        """Plan one store for each set of tiers."""
        groups: dict[tuple[int, ...], list[BlockKey]] = {}
        for key, tiers in targets.items():
            if tiers:
                groups.setdefault(tuple(tiers), []).append(key)
        for group, keys in groups.items():
            self._plan_store(keys, [blocks[key] for key in keys], list(group))

    def _plan_store(self, keys: list[BlockKey], blocks: list[int], tiers: list[int]) -> None:
        op = Store(next(self._ops), keys, blocks, tiers)
        self._stores.append(op)
        for tier in tiers:
            self._tiers[tier].storing += len(keys)
        self._expect(op, tiers)

    def _expect(self, op: Store | Load | Lookup, tiers: Sequence[int], *, pinned: bool = True) -> None:
        self._pending[op.op] = Pending(op, dict.fromkeys(tiers, self._world_size), pinned=pinned)

    def _end_leg(self, pending: Pending, position: int, now_s: float) -> None:
        """One operation has ended in one tier on every rank."""
        tier, op = self._tiers[position], pending.op
        failures = pending.failures[position]
        asked = position == op.tier if isinstance(op, Load) else True
        if isinstance(op, Lookup):
            kind = "lookup"
            self._end_lookup(pending, op, failures, now_s)
        elif isinstance(op, Load) and asked:
            kind = "load"
            tier.counts.loaded += len(op.keys) - len(failures)
            if not failures:
                self.guard.loaded(position, len(op.keys), pending.took_s, now_s)
            self._end_load(pending, position)
        else:
            kind = "store"
            tier.counts.stored += len(op.keys) - len(failures)
            self._end_store(pending, position)
        absent = Reason.MISSING if kind == "lookup" else None  # An answer, not a failure.
        tier.counts.failed.update((kind, why.value) for why in failures.values() if why is not absent)
        worst = next(iter(failures.values()), Reason.NONE) if len(failures) == len(op.keys) else Reason.NONE
        # A copy that the lender did not get, because the load failed, is not the lender's fault.
        if asked and tier.breaker.note(worst, now_s):
            logger.warning(
                "tier %s fails (%s) and is left alone for a while: %r", tier.name, worst.value, tier.breaker
            )

    def _end_lookup(self, pending: Pending, op: Lookup, failures: dict[int, Reason], now_s: float) -> None:
        tier = self._tiers[op.tier]
        assert tier.finder
        found = tier.finder.answer(op.op, failures, now_s)
        if pending.doomed:
            return
        news = [key for key in found if tier.index.state(key) is BlockState.ABSENT]
        known = self._reserve(op.tier, news, ())
        for key in reversed(known):
            tier.index.stored(key)
        for key in news[len(known) :]:  # The index is full of pinned blocks.
            tier.finder.miss(key, now_s)

    def _end_load(self, pending: Pending, position: int) -> None:
        op, index = pending.op, self._tiers[position].index
        assert isinstance(op, Load)
        self.loading_blocks -= 0 if op.in_step else len(op.keys)
        # The head of a prefix is unpinned last and so evicted last.
        for key in reversed(op.keys if pending.pinned else ()):
            if index.unpin(key):
                self._discard(position, [key])
        for at, reason in pending.failures[position].items():
            if reason in (Reason.CORRUPT, Reason.MISSING):
                self._drop(position, op.keys[at], corrupt=reason is Reason.CORRUPT)

    def _end_store(self, pending: Pending, position: int) -> None:
        op, tier = pending.op, self._tiers[position]
        if isinstance(op, Store):
            tier.storing -= len(op.keys)
        failures = pending.failures[position]
        for at in reversed(range(len(op.keys))):
            if at in failures:
                tier.index.not_stored(op.keys[at])
                if self._world_size > 1:  # Other ranks may have it.
                    self._discard(position, [op.keys[at]])
            else:
                tier.index.stored(op.keys[at])
                if pending.doomed:
                    self._drop(position, op.keys[at])

    def _end(self, pending: Pending) -> None:
        """An operation has ended in all its tiers."""
        op = pending.op
        if isinstance(op, Store) and not op.blocks:
            for key in op.keys:
                if self._tiers[self.lender].index.unpin(key):
                    self._discard(self.lender, [key])

    def _drop(self, position: int, key: BlockKey, *, corrupt: bool = False) -> None:
        """Forget a READY block, as soon as nobody reads it."""
        if self._tiers[position].index.drop(key):
            self._discard(position, [key], corrupt=corrupt)

    def _discard(self, position: int, keys: Iterable[BlockKey], *, corrupt: bool = False) -> None:
        """Have the tier forget what the index has forgotten. Other engines may want what is not corrupt."""
        keys = list(keys)
        if keys and (corrupt or not self._tiers[position].shared):
            self._drops.setdefault(position, []).extend(keys)
