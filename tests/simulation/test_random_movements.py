"""Random programs of leader, policies and movements over ranks that report late, out of order and failing.

Replay one with ``KVBM_SEED=123 pytest tests/simulation/test_random_movements.py``: seeds count from there.
"""

import os
import random
from collections import Counter

import pytest
from simulated_ranks import SimulatedRanks

from kvbm_core import Lru, Origin, Registry, chain_keys, load_config, root_key
from kvbm_core.groups import KvGroup, group_keys
from kvbm_core.leader.guarded_policy import GuardedPolicy
from kvbm_core.movement import Movement
from kvbm_core.plan import Fill, FillReason
from kvbm_core.policies import Fifo

SEED = int(os.environ.get("KVBM_SEED", "0"))
STEPS, SHORT_STEPS, LENGTH, CHAINS = 10_000, 1500, 24, 16
GROUPS = [KvGroup(1), KvGroup(1, tag=b"two\0")]


class Blunderer(Lru):
    """A stranger's policy that names as next what is not there, and sometimes nothing."""

    def next_victims(self, count):
        return [b"?" * 32, *super().next_victims(count)][: count // 2]


POLICIES = [
    lambda position, context: Lru(),
    lambda position, context: Fifo(),
    lambda position, context: GuardedPolicy(Blunderer(), context.tier, "blunderer"),
]


def installed(rng):
    """Give each tier of three policies of its own, as a configuration would."""
    admissions = ["always", "second-touch", "prompts-only", {"name": "write-budget", "bytes_per_day": "5GB"}]
    tiers = [
        {
            "backend": "cpu", "name": str(at), "capacity": 1,
            "policy": rng.choice(["lru", "fifo", "s3fifo", "adaptive", "adaptive"]),
            "admission": rng.choice(admissions),
        }
        for at in range(3)
    ]  # fmt: skip
    return Registry().policies(load_config({"tiers": tiers}))


def random_movement(rng):
    stores = rng.choice(["write_through", "demotion", "demotion"])
    low, high = sorted([rng.uniform(0.01, 1), rng.uniform(0.01, 1)])
    return Movement(
        stores=stores,
        promotion=rng.choice(["always", "measured", "never"]),
        copies="inclusive" if stores == "write_through" else rng.choice(["inclusive", "exclusive"]),
        low_watermark=low,
        high_watermark=high,
    )


class Program:
    """A planner, the ranks that carry its plans out, and what must be true after each step."""

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.groups = rng.choice([GROUPS[:1], GROUPS])
        self.ranks = SimulatedRanks(
            self.groups, rng, [rng.randint(20, size) * 1000 for size in (80, 150, 300)]
        )
        self.max_moving = rng.randint(2, 40)
        movements = [Movement(), *(random_movement(rng) for _ in self.ranks.held[0][1:])]
        self.planner = self.ranks.planner(
            movements=movements,
            policy=rng.choice([*POLICIES, *[installed(rng)] * 3]),
            max_store_blocks=self.max_moving,
        )
        digests = [chain_keys(root_key(), [chain, *range(LENGTH - 1)], 1) for chain in range(CHAINS)]
        self.chains = [[group_keys(each, group.tag) for group in self.groups] for each in digests]
        self.now_s, self.requests, self.did = 0.0, 0, Counter()

    def step(self, at):
        rng, self.now_s = self.rng, self.now_s + self.rng.choice([0.0, 0.01, 0.3])
        # Tiers fail together for a while, so that they are left alone, and come back.
        self.ranks.failing = 0.5 if at % 400 in range(300, 320) else 0.02
        group = rng.randrange(len(self.groups))
        keys = rng.choice(self.chains)[group]
        action = rng.random()
        if action < 0.45:
            start = rng.choice([0, 0, rng.randrange(LENGTH)])
            stop = rng.randint(start + 1, LENGTH)
            self.planner.store(
                keys[start:stop], list(range(start, stop)), {*keys[:stop]}, self.now_s, group,
                Origin(start, rng.choice([None, start, stop])),
            )  # fmt: skip
        elif action < 0.75:
            self._load(keys, group)
        elif action < 0.752:
            self.planner.reset()
        elif action < 0.78:
            source, target = rng.sample(range(len(self.planner._tiers)), 2)
            self.planner.fill(source, target, keys[: rng.randrange(LENGTH)], self.now_s, {*keys}, group)
        self._take()
        self.ranks.deliver(self.planner, self.now_s, rng.choice([0, 0, 1, 3, 10, len(self.ranks.mail)]))
        self.check()

    def _load(self, keys, group):
        found = self.planner.match(keys, self.now_s)
        if not found:
            self.planner.lookup(keys, self.now_s, group)
            return
        for key, tier in zip(keys, found, strict=False):
            assert self.planner._tiers[tier].capabilities.shared or self.ranks.have(tier, key)
        self.requests += 1
        blocks = list(range(len(found)))
        self.planner.load(str(self.requests), keys[: len(found)], blocks, found, group=group, prefix={*keys})

    def _take(self):
        plan = self.planner.take(self.now_s)
        self.ranks.submit(plan, self.planner)
        for fill in plan.fills:
            self.did[fill.reason] += len(fill.keys)

    def check(self):
        """Insist on what holds at any moment."""
        self.ranks.check_room(self.planner)
        for position, tier in enumerate(self.planner._tiers):
            index = tier.index
            states = [{*index}, {*index._filling}, {*index._leaving}]
            assert sum(map(len, states)) == len(set().union(*states)), "a block is in two states"
            pinned = index._pins.keys()
            assert pinned <= states[0] | states[2], "a pinned block is gone"
            # Of a shared tier others may take it away; here nobody does that, only what failed is gone.
            assert tier.capabilities.shared or all(self.ranks.have(position, key) for key in pinned)
        moving = Counter()
        for pending in self.planner._in_flight._pending.values():
            op = pending.op
            if isinstance(op, Fill) and op.reason is FillReason.DEMOTION and op.target in pending.waiting:
                moving[op.target] += len(op.keys)
        assert all(count <= self.max_moving for count in moving.values())

    def end(self):
        """Let everything end, without new failures, and insist on what holds then."""
        self.ranks.failing = 0.0
        for _ in range(1000):
            self._take()
            self.ranks.deliver(self.planner, self.now_s)
            if not self.planner.busy(self.now_s):
                break
        assert not self.planner.busy(self.now_s), self.planner
        assert set(self.ranks.seen.values()) <= {1}
        assert self.planner.loading_blocks == 0
        for tier in self.planner._tiers:
            assert not tier.index._pins
            assert not tier.index._filling
            assert not tier.index._leaving
            assert tier.storing == 0
        self.check()
        self.ranks.check_holdings(self.planner)


def run(seed, steps):
    program = Program(seed)
    for at in range(steps):
        try:
            program.step(at)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, step {at}: {program.planner!r}: {error}") from error
    program.end()
    return program.did + Counter(
        {name: sum(tier.dropped[name] for tier in program.planner.counts.values()) for name in ("late",)}
    )


@pytest.mark.parametrize("seed", range(SEED, SEED + 6))
def test_what_moves_is_never_lost_doubled_or_too_much(seed):
    run(seed, SHORT_STEPS)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SEED + 100, SEED + 200))
def test_the_same_over_many_steps(seed):
    run(seed, STEPS)


def test_the_programs_do_all_that_can_be_done():
    did = sum((run(seed, SHORT_STEPS) for seed in range(SEED, SEED + 6)), Counter())
    assert {*did} >= {FillReason.DEMOTION, FillReason.WRITE_BACK, FillReason.PREFETCH, "late"}
