"""The verbs of the leader's half: what is matched, looked up, loaded and stored, as plans. No I/O, no clock.

match ──► load ─┐
lookup ─────────┼─► take: one Plan ──► report (from every rank) ──► index
store ──────────┘
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence

from kvbm_core.block import BlockKey
from kvbm_core.groups import KvGroup
from kvbm_core.leader.cost_model import CostModel
from kvbm_core.leader.draft import Draft
from kvbm_core.leader.endings import Endings, Took
from kvbm_core.leader.finding.boundaries import GroupPrefix, Part
from kvbm_core.leader.finding.group_matches import GroupMatch, GroupMatcher
from kvbm_core.leader.finding.matches import Match, Matcher, Prefix
from kvbm_core.leader.finding.questions import Questions
from kvbm_core.leader.ground.counts import TierCounts, TierLevels
from kvbm_core.leader.ground.tier_policies import TierPolicies
from kvbm_core.leader.ground.tier_state import UNKNOWN
from kvbm_core.leader.ground.tiers import Tiers
from kvbm_core.leader.in_flight import InFlight
from kvbm_core.leader.left_alone import LeftAlone
from kvbm_core.leader.movements.edges import Movements
from kvbm_core.leader.shortage import Shortages
from kvbm_core.leader.tenancy.tenants import Tenants
from kvbm_core.leader.tenancy.wishes import wish_of
from kvbm_core.leader.tier_news import TierNews
from kvbm_core.movement import Movement
from kvbm_core.plan import FillReason, Load, Plan, Report, TierStatus, WriteOrder
from kvbm_core.policy import Origin
from kvbm_core.sharing import Sharing
from kvbm_core.tier import Reason

__all__ = ["Planner"]


class Planner:
    """Decides what is loaded, stored and evicted, for one engine.

    Args:
        ranks: What each worker says of its tiers, fastest first.
        max_store_blocks: Blocks on their way into a tier below the host pool, at once.
        groups: The engine's KV groups, in the order of its numbers for them.
        policies: Makes the policies of each tier; by default least recently used, and everything is written.
        block_tokens: Tokens a block, where only what loads faster than the engine computes shall be loaded;
            the engine tells `cost_model` how fast it computes. 0: what a tier has is loaded.
        ops: Numbers for operations, where planners follow each other: no late report may fit another one.
        movements: For each tier how blocks come there from the tiers above, and go back. Empty: every block
            is written through to every tier.
        sharing: How tenants share the tiers. By default there are none.

    Raises:
        ConfigError: If the ranks have different stacks; names rank and difference.
    """

    def __init__(
        self,
        ranks: Sequence[Sequence[TierStatus]],
        *,
        max_store_blocks: int = 512,
        groups: Sequence[KvGroup] = (KvGroup(1),),
        policies: TierPolicies | None = None,
        block_tokens: int = 0,
        ops: Iterator[int] | None = None,
        movements: Sequence[Movement] = (),
        sharing: Sharing | None = None,
    ) -> None:
        self._world_size = len(ranks)
        policies = policies or TierPolicies()
        self._tiers = Tiers(ranks, policies, groups)
        self.tenants = Tenants(self._tiers, sharing or Sharing(), policies, len(ranks))
        self._in_flight = InFlight(len(ranks), ops)
        self._matcher = Matcher(self._tiers, self._in_flight)
        self.cost_model = CostModel(len(self._tiers), block_tokens, self._tiers.host_pool)
        self._news = TierNews(self._tiers, len(ranks), self.cost_model)
        self._shortages = Shortages(self._tiers, self._news)
        self._draft = Draft(self._tiers, self._in_flight)
        self._movements = Movements(
            self._tiers, self._draft, self.cost_model, movements, max_store_blocks, groups
        )
        self._endings = Endings(
            self._tiers, self._in_flight, self.cost_model, self._shortages, self._movements,
            LeftAlone(self._draft, self._news),
        )  # fmt: skip
        self._questions = Questions(self._tiers, self._draft, self.cost_model)
        self._group_matcher = GroupMatcher(self._tiers, groups, self._in_flight, self._questions)
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
    def took(self) -> Sequence[Took]:
        """Operations that ended with the last `report`, each in one tier."""
        return self._endings.took

    @property
    def occupancy(self) -> dict[str, int]:
        """Blocks in each tier, by its name."""
        return {tier.name: len(tier.index) for tier in self._tiers}

    def levels(self, now_s: float) -> dict[str, TierLevels]:
        """Where each tier stands, by its name."""
        return {tier.name: tier.levels(self._world_size, now_s) for tier in self._tiers}

    def busy(self, now_s: float) -> bool:
        """Return True if something is under way, or would be if `take` were called."""
        unsaid = self._tiers.has_drops or self._draft.has_probes
        return bool(self._in_flight or unsaid or self._movements.is_due(now_s))

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
        lookups = self.lookup(rest, now_s, head=prefix[0]) if rest else frozenset()
        return self._matcher.remember(start, stop, tiers, lookups, rest, now_s)

    def find_boundaries(
        self, prefix: GroupPrefix, start: int, stop: int, now_s: float, last: GroupMatch | None = None
    ) -> GroupMatch:
        """Find the boundaries at which every KV group can be restored, and ask the tiers that must be asked.

        Args:
            prefix: The keys of a prompt.
            start: Tokens that the engine has already; a multiple of each group's block.
            stop: Tokens behind which no boundary may lie.
            now_s: The time, as in `match`.
            last: The finding of before. It is given back, at the same cost for any length, as long as
                nothing of the prompt has come or gone, and no new question is due.
        """
        return self._group_matcher.find(prefix, start, stop, now_s, last)

    def choose_boundary(self, match: GroupMatch, now_s: float) -> tuple[int, list[Part]]:
        """Choose the boundary whose load saves the most time, by what `cost_model` has measured.

        Returns:
            Its tokens, and by group the blocks to be loaded. 0 and none if computing is faster.
        """
        found = [(tokens, self._group_matcher.parts(match, tokens)) for tokens in match.tokens]
        options = [(tokens - match.start, self._blocks_by_tier(parts)) for tokens, parts in found]
        best = self.cost_model.best_boundary(options, now_s)
        return found[best] if best >= 0 else (0, [])

    def is_ready(self, key: BlockKey, tier: int) -> bool:
        """Return True if a tier has a block."""
        return key in self._tiers[tier].index

    @property
    def tiers(self) -> Tiers:
        """The state of each tier, to be read."""
        return self._tiers

    def touch(self, keys: Sequence[BlockKey], tier: int) -> None:
        """Note that blocks are wanted, those that a tier has; `keys` are in the order of their prefix."""
        self._tiers[tier].index.touch(reversed(keys))

    def decline(self, tiers: Iterable[int]) -> None:
        """Note that blocks found in these tiers are computed, because `cost_model` finds that faster."""
        for tier in tiers:
            self._tiers[tier].counts.declined += 1

    def lookup(
        self, keys: Sequence[BlockKey], now_s: float, group: int = 0, head: BlockKey = b""
    ) -> frozenset[int]:
        """Plan to ask the tiers that cannot list their blocks for those that `match` did not find.

        Args:
            keys: Of the consecutive blocks after the last match; at least one.
            now_s: The time, as in `match`.
            group: Number of the KV group.
            head: The key of the prompt's first block in the group; empty if that is not known.

        Returns:
            The operations whose answers are on their way: match again when none is pending.
        """
        return self._questions.ask(keys, now_s, group, head)

    def load(
        self,
        request: str,
        keys: Sequence[BlockKey],
        blocks: Sequence[int],
        tiers: Sequence[int],
        *,
        in_step: bool = False,
        group: int = 0,
        head: BlockKey = b"",
        prefix: Container[BlockKey] = (),
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
            group: Number of the KV group.
            head: The key of the prompt's first block in the group; empty if that is not known.
            prefix: The keys of the same prompt in all groups, as in `store`: what the host pool keeps of one
                group must not push out what the request loads of another.
        """
        gone: set[BlockKey] = set()
        for position in set(tiers):
            there = [key for key, tier in zip(keys, tiers, strict=True) if tier == position]
            gone.update(self._tiers[position].index.pin(there))
            self._movements.loaded(position, there)
            if self._tiers[position].keeps_order:
                self._tiers[position].note_used(there)
        assert not (gone and in_step), "a load in step cannot fail"
        pinned = [key not in gone for key in keys]
        loaded = [(key, tier) for key, tier in zip(keys, tiers, strict=True) if key not in gone]
        kept = self._movements.kept(loaded, prefix, group)
        fills = [self.host_pool if key in kept else -1 for key in keys]
        start = 0
        for (tier, fill, held), run in itertools.groupby(zip(tiers, fills, pinned, strict=True)):
            part = slice(start, start := start + len(list(run)))
            number = self._draft.number()
            op = Load(number, request, tier, fill, list(keys[part]), list(blocks[part]), in_step, group, head)
            self._draft.add(op, pinned=held)
        self.loading_blocks += 0 if in_step else len(keys)

    def store(
        self,
        keys: Sequence[BlockKey],
        blocks: Sequence[int],
        prefix: Container[BlockKey],
        now_s: float,
        group: int = 0,
        origin: Origin = UNKNOWN,
    ) -> Sequence[int]:
        """Plan to write blocks to every tier that has them not; by demotion a tier gets them later.

        Args:
            keys: Of consecutive blocks that are complete in device memory.
            blocks: The device blocks, one a key.
            prefix: The keys of the same prefix, those before and `keys`. It is asked, never listed, and
                kept while blocks wait to be stored.
            now_s: The time, as in `match`.
            group: Number of the KV group.
            origin: What policies may know of the blocks.

        Returns:
            Numbers of the operations that read them from the device.
        """
        targets = self._movements.targets(keys, prefix, now_s, group, origin)
        ops = self._draft.stores(targets, keys, blocks, group) if targets else ()
        if (wish := wish_of(prefix)) and wish.keep_s:
            self.tenants.keep(keys, wish, now_s)
        return ops

    def fill(
        self, source: int, target: int, keys: Sequence[BlockKey], now_s: float,
        prefix: Container[BlockKey] = (), group: int = 0, reason: FillReason = FillReason.PREFETCH,
    ) -> list[BlockKey]:  # fmt: skip
        """Plan to copy blocks from one tier to another: to demote, promote or prefetch them.

        Args:
            source: Position of the tier that has them.
            target: Position of the tier that shall have them.
            keys: In the order of their prefix.
            now_s: The time, as in `match`.
            prefix: The keys of the same prefix, as in `store`.
            group: Number of the KV group.
            reason: For counters.

        Returns:
            Those that are planned: READY in the source, absent in the target, and it has room.
        """
        above, below = self._tiers[source], self._tiers[target]
        if below.capabilities.read_only or not (above.breaker.closed(now_s) and below.breaker.closed(now_s)):
            return []
        there = [key for key in below.index.absent(keys) if key in above.index]
        there = below.admitted(there, now_s, group)
        return self._draft.fill(source, target, [(there, prefix)], group, reason)

    def take(self, now_s: float, order: WriteOrder | None = None) -> Plan:
        """Take everything planned since the last call, with what the engine writes."""
        self._shortages.grow(now_s)
        self.tenants.release(now_s)
        self._movements.plan(now_s)
        return self._draft.take(order or WriteOrder())

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
        self._news.speeds(now_s)
        return finished

    def reset(self) -> None:
        """Forget every block in every tier, those on their way too. In a shared tier they stay."""
        self._in_flight.doom()
        self._draft.seal()
        self._movements.forget()
        self._tiers.drop_all()

    def _blocks_by_tier(self, parts: Iterable[Part]) -> dict[int, float]:
        """Count blocks by the tier that has them, in blocks of the largest group."""
        sums: dict[int, float] = {}
        for part in parts:
            for tier, count in Counter(part.tiers).items():
                sums[tier] = sums.get(tier, 0.0) + count * self._tiers[tier].weight(part.group)
        return sums
