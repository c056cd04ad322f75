"""Ranks without bytes: what each tier holds on each, and reports that come late, out of order and failing."""

import itertools
import math
from collections import Counter

from kvbm_core import Capabilities, Planner, Reason, Report, TierStatus
from kvbm_core.block import BlockState
from kvbm_core.groups import TAG_BYTES
from kvbm_core.plan import Fill, Lookup, Probe

REASONS = [reason for reason in Reason if reason is not Reason.NONE]


class SimulatedRanks:
    """The ranks of an engine with several KV groups, of which one rank may have no layer of a group."""

    def __init__(self, groups, rng, capacities=None):
        self.groups, self.rng = groups, rng
        self.count = rng.choice([1, 2, 3])
        self.lends, self.has_remote = rng.random() < 0.6, rng.random() < 0.5
        longest = [rng.choice([1, 3, 5]) * 1000 for _ in groups]
        self.charges = [[nbytes - rng.choice([0, 0, 500]) for nbytes in longest] for _ in range(self.count)]
        if self.count > 1:
            self.charges[rng.randrange(self.count)][rng.randrange(len(groups))] = 0
        self.capacities = capacities or [rng.randint(20, 120) * 1000, rng.randint(20, 300) * 1000]
        self._group_of = {each.tag: number for number, each in enumerate(groups)}
        tiers = range(len(self.capacities) + self.has_remote)
        self.held = [[{} for _ in tiers] for _ in range(self.count)]
        """By rank and tier: object to the bytes that it takes there."""
        self.mail = []
        self._numbers = itertools.count(1)
        self.seen = Counter()
        self.failing = 0.0
        self.mediums = [list(self.capacities) for _ in range(self.count)]
        """By rank and tier the bytes that the medium has room for: less where others fill it."""
        self.speeds_s = [0.0 for _ in tiers]
        """By tier, for a block."""

    def planner(self, **options):
        kinds = [
            Capabilities(capacity_bytes=capacity, addressable=self.lends and tier == 0, durable=tier > 0)
            for tier, capacity in enumerate(self.capacities)
        ]
        if self.has_remote:
            kinds.append(Capabilities(capacity_bytes=None, shared=True, remote_lookup=True))
        ranks = [
            [
                TierStatus(
                    str(at), kind, [] if kind.shared else list(self.held[rank][at].items()),
                    tuple(self.charges[rank]), tuple(self.charges[rank]),
                )
                for at, kind in enumerate(kinds)
            ]
            for rank in range(self.count)
        ]  # fmt: skip
        options.setdefault("max_store_blocks", self.rng.randint(2, 40))
        return Planner(ranks, groups=self.groups, ops=self._numbers, **options)

    def keeps(self, rank, key):
        """Say whether a rank has layers of an object's group."""
        return self.charges[rank][self._group_of[key[-TAG_BYTES:]]] > 0

    def have(self, tier, key):
        """Say whether every rank that has layers of its group has an object in a tier."""
        return all(key in self.held[rank][tier] for rank in range(self.count) if self.keeps(rank, key))

    def submit(self, plan, planner):
        """Take a plan in: drops at once, and of each operation a report to come from each rank and tier."""
        assert all(tier > 0 and keys for tier, keys in plan.used)
        for tier, keys in plan.drops:
            index = planner._tiers[tier].index
            assert all(index.state(key) is not BlockState.READY and not index.is_pinned(key) for key in keys)
            for rank in self.held:
                for key in keys:
                    rank[tier].pop(key, None)
        for op in [*plan.stores, *plan.loads, *plan.lookups, *plan.fills, *plan.probes]:
            if not isinstance(op, Probe):
                assert {self._group_of[key[-TAG_BYTES:]] for key in op.keys} == {op.group}
            self.seen[op.op] += 1
            self.mail += [(rank, op, tier) for rank in range(self.count) for tier in op.tiers]
        self.rng.shuffle(self.mail)

    def deliver(self, planner, now_s, most=None):
        """Report some of what has ended, or all; return the loads that are complete, and their failures."""
        ended = []
        for _ in range(len(self.mail) if most is None else min(most, len(self.mail))):
            rank, op, tier = self.mail.pop()
            if isinstance(op, Probe) and self.failing > 0.1:  # It is tried again.
                self.mail.insert(0, (rank, op, tier))
            else:
                report = Report(op.op, tier) if isinstance(op, Probe) else self._end(rank, op, tier)
                ended += planner.report([report], now_s)
        return ended

    def check_room(self, planner):
        """Insist that no rank holds more than a tier's capacity, nor the leader counts more."""
        for tier, capacity in zip(planner._tiers, self.capacities, strict=False):
            assert tier.index.used_bytes <= capacity
        for rank in self.held:
            for held, capacity in zip(rank, self.capacities, strict=False):
                assert sum(held.values()) <= capacity

    def check_holdings(self, planner):
        """Insist that each rank holds what the leader believes, and nothing else, when all has ended."""
        for at, tier in enumerate(planner._tiers):
            for rank, held in enumerate(self.held if not tier.capabilities.shared else ()):
                assert set(held[at]) == {key for key in tier.index if self.keeps(rank, key)}

    def _end(self, rank, op, tier):
        """End an operation on a rank: what it writes is there, and each part may fail."""
        held, charge = self.held[rank][tier], self.charges[rank][op.group]
        keys = op.keys if charge else []  # A rank without layers has nothing to do, and it works.
        failures = {
            at: self.rng.choice(REASONS) for at in range(len(keys)) if self.rng.random() < self.failing
        }
        took_s = len(keys) * self.speeds_s[tier]
        if isinstance(op, Lookup) or tier == getattr(op, "source" if isinstance(op, Fill) else "tier", -1):
            failures |= {at: Reason.MISSING for at, key in enumerate(keys) if key not in held}
            return Report(op.op, tier, failures, took_s)
        # Codecs may have made them shorter; a rank says nothing where all are as long as was reserved.
        taken = [held.get(key) or self.rng.randint(charge // 2, charge) for key in op.keys]
        if self.rng.random() < 0.5 and held.keys().isdisjoint(keys):
            taken = [charge] * len(op.keys)
        medium = self.mediums[rank][tier] if tier < len(self.capacities) else math.inf
        is_full = False
        for at in range(len(keys)):
            if at in failures:
                continue
            if keys[at] not in held and sum(held.values()) + taken[at] > medium:
                failures[at], is_full = Reason.FULL, True
            else:
                held[keys[at]] = taken[at]
        says_nothing = charge and taken == [charge] * len(op.keys)
        return Report(op.op, tier, failures, took_s, is_full, charges=[] if says_nothing else taken)
