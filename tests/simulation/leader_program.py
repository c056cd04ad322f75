"""A random program of the whole leader: policies, movements, tenants, kept blocks, reading ahead, full media.

The ranks that carry its plans out report late, out of order and failing.
"""

import random
from collections import Counter
from fractions import Fraction

from simulated_ranks import SimulatedRanks

from kvbm_core import Lru, Origin, Registry, chain_keys, load_config, root_key
from kvbm_core.groups import KvGroup, group_keys
from kvbm_core.leader.ground.guarded_policies import GuardedPolicy
from kvbm_core.leader.ground.tier_policies import TierPolicies
from kvbm_core.leader.tenancy.partitioned_index import PartitionedIndex
from kvbm_core.leader.tenancy.wishes import Wish, wish_of
from kvbm_core.movement import Movement
from kvbm_core.plan import Fill, FillReason
from kvbm_core.policies import Fifo
from kvbm_core.sharing import Sharing

LENGTH, CHAINS, BLOCK_TOKENS = 24, 16, 16
GROUPS = [KvGroup(1), KvGroup(1, tag=b"two\0")]
FAILING_TOGETHER, SHORT_OF_ROOM = range(300, 320), range(100, 220)
"""Steps of 400."""


class Blunderer(Lru):
    """A stranger's policy that names as next what is not there, and sometimes nothing."""

    def next_victims(self, count):
        return [b"?" * 32, *super().next_victims(count)][: count // 2]


POLICIES = [
    TierPolicies(dict.fromkeys(range(3), make))
    for make in (
        lambda context: Lru(),
        lambda context: Fifo(),
        lambda context: GuardedPolicy(Blunderer(), context.tier, "blunderer"),
    )
]


class Keys(list):
    """The keys of a request in one KV group, with its wish."""

    def __init__(self, keys, wish=None):
        super().__init__(keys)
        self.wish, self._set = wish, frozenset(keys)

    def __contains__(self, key):
        return key in self._set

    def slice(self, start, stop):
        return self[start:stop]


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


def random_sharing(rng):
    """Share the three tiers out: to nobody, to named tenants, or to whoever comes."""
    if rng.random() < 0.3:
        return Sharing()

    def quotas():
        chosen = rng.sample("012", rng.randint(1, 3))
        return {tier: Fraction(rng.randint(5, 30), 100) for tier in chosen}

    tenants = {name: quotas() for name in rng.choice(["", "a", "ab"])}
    return Sharing(rng.choice([0.0, 0.1, 0.5]), tenants, rng.choice([None, quotas()]))


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
            policies=rng.choice([*POLICIES, *[installed(rng)] * 3]),
            max_store_blocks=self.max_moving,
            sharing=random_sharing(rng),
            block_tokens=BLOCK_TOKENS,
        )
        digests = [chain_keys(root_key(), [chain, *range(LENGTH - 1)], 1) for chain in range(CHAINS)]
        self.chains = [[Keys(group_keys(each, group.tag)) for group in self.groups] for each in digests]
        self.now_s, self.requests, self.did = 0.0, 0, Counter()
        self.wishes, self.findings, self.watched = [None], {}, []
        self.computes = rng.random() < 0.7
        """True if the engine says how fast it computes, so that slow tiers are left out."""

    def step(self, at):
        rng, self.now_s = self.rng, self.now_s + self.rng.choice([0.0, 0.01, 0.3])
        if rng.random() < 0.002:
            self.now_s += 700.0
        self._disturb(at)
        group = rng.randrange(len(self.groups))
        keys = rng.choice(self.chains)[group]
        action = rng.random()
        if action < 0.45:
            self._store(keys, group)
        elif action < 0.72:
            self._load(keys, group)
        elif action < 0.722:
            self.planner.reset()
        elif action < 0.76:
            source, target = rng.sample(range(len(self.planner.tiers)), 2)
            ahead = rng.choice([Keys(keys, rng.choice(self.wishes)), ()])
            self.planner.fill(source, target, keys[: rng.randrange(LENGTH)], self.now_s, ahead, group)
        elif action < 0.78:
            self.planner.touch(keys, rng.randrange(len(self.planner.tiers)))
        elif action < 0.82:
            self._begin_or_end(keys)
        elif action < 0.9 and len(self.groups) == 1:
            self._find(keys)
        self._take()
        self.ranks.deliver(self.planner, self.now_s, rng.choice([0, 0, 1, 3, 10, len(self.ranks.mail)]))
        self.check()

    def _disturb(self, at):
        """Have tiers fail together for a while, media be full, and tiers and engine change their speed."""
        ranks, rng = self.ranks, self.rng
        ranks.failing = 0.5 if at % 400 in FAILING_TOGETHER else 0.02
        if at % 400 in (SHORT_OF_ROOM.start, SHORT_OF_ROOM.stop):
            least = rng.choice([0.0, 0.3, 0.8]) if at % 400 in SHORT_OF_ROOM else 1.0
            ranks.mediums = [
                [int(rng.uniform(least, 1.0) * each) for each in ranks.capacities] for _ in ranks.mediums
            ]
        if at % 50 == 0:
            ranks.speeds_s = [rng.choice([0.0001, 0.001, 0.01]) for _ in ranks.speeds_s]
        if self.computes and rng.random() < 0.1:
            self.planner.cost_model.computed(rng.randint(1, 600), rng.uniform(0.01, 0.2), self.now_s)

    def _store(self, keys, group):
        rng = self.rng
        start = rng.choice([0, 0, rng.randrange(LENGTH)])
        stop = rng.randint(start + 1, LENGTH)
        prefix = Keys(keys[:stop], rng.choice(self.wishes))
        self.planner.store(
            keys[start:stop], list(range(start, stop)), prefix, self.now_s, group,
            Origin(start, rng.choice([None, start, stop])),
        )  # fmt: skip

    def _load(self, keys, group):
        found = self.planner.match(keys, self.now_s)
        if not found:
            self.planner.lookup(keys, self.now_s, group)
            return
        for key, tier in zip(keys, found, strict=False):
            assert self.planner.tiers[tier].capabilities.shared or self.ranks.have(tier, key)
        cost_model = self.planner.cost_model
        chosen = found[: cost_model.blocks_to_load(found, self.now_s)]
        self.planner.decline(found[len(chosen) :])
        if not chosen:
            self.did["declined"] += 1
            return
        cost_model.tried(chosen, self.now_s)
        self.requests += 1
        in_step = {*chosen} == {self.planner.host_pool} and self.rng.random() < 0.5
        self.planner.load(
            str(self.requests), keys[: len(chosen)], list(range(len(chosen))), chosen, group=group,
            in_step=in_step, prefix=Keys(keys, self.rng.choice(self.wishes)),
        )  # fmt: skip

    def _begin_or_end(self, keys):
        """Have a request with hints come, or end: then what is there of it is kept."""
        rng, tenants = self.rng, self.planner.tenants
        if len(self.wishes) > 1 and rng.random() < 0.4:
            wish = self.wishes.pop(rng.randrange(1, len(self.wishes)))
            if wish.keep_s:
                for kept, refused in tenants.keep(keys, wish, self.now_s).values():
                    self.did["kept"] += kept
                    self.did["not kept"] += refused
            tenants.end(wish, self.now_s)
            return
        name = rng.choice(["", "a", "b", "c", "d", "e"])
        if name and tenants.why_not(name, self.now_s):
            self.did["no tenant"] += 1
            return
        tenants.begin(wish := Wish(name, rng.choice([0.0, 2.0, 50.0])))
        self.wishes.append(wish)
        self.did["tenant" if name else "wish"] += 1

    def _find(self, keys):
        """Ask as for a waiting request: what is remembered is as true as what is found anew."""
        found = self.findings[keys[0]] = self.planner.find(
            keys, 0, LENGTH, self.now_s, self.findings.get(keys[0])
        )
        if not found.lookups:
            assert len(found.tiers) == len(self.planner.match(keys, self.now_s))
            assert all(self.planner.is_ready(*pair) for pair in zip(keys, found.tiers, strict=False))

    def _take(self):
        plan = self.planner.take(self.now_s)
        self.ranks.submit(plan, self.planner)
        for fill in plan.fills:
            self.did[fill.reason] += len(fill.keys)
        self.did["probe"] += len(plan.probes)

    def check(self):
        """Insist on what holds at any moment."""
        self.ranks.check_room(self.planner)
        self.planner.tenants.release(self.now_s)  # Of a write-back that came after the time of its wish.
        for position, tier in enumerate(self.planner.tiers):
            index = tier.index
            states = [{*index}, {*index._filling}, {*index._leaving}]
            assert sum(map(len, states)) == len(set().union(*states)), "a block is in two states"
            assert index.capacity_bytes is None or index.used_bytes <= tier.capacity_bytes
            pinned = index._pins.keys()
            assert pinned <= states[0] | states[2], "a pinned block is gone"
            # Of a shared tier others may take it away; here nobody does that, only what failed is gone.
            assert tier.capabilities.shared or all(self.ranks.have(position, key) for key in pinned)
            self.did["short"] += index.capacity_bytes != tier.capacity_bytes
            if isinstance(index, PartitionedIndex):
                if index not in self.watched:
                    self._watch(index)
                check_shares(index)
                assert all(until_s > self.now_s for until_s in index.orders.kept.values())
        moving = Counter()
        for pending in self.planner._in_flight._pending.values():
            op = pending.op
            if isinstance(op, Fill) and op.reason is FillReason.DEMOTION and op.target in pending.waiting:
                moving[op.target] += len(op.keys)
        assert all(count <= self.max_moving for count in moving.values())

    def _watch(self, index):
        """See that no room is made among what is kept, nor for one tenant among what another has."""
        reserve, orders = index.reserve, index.orders

        def reserves(wanted, charge, protected=(), **told):
            kept, owners = dict(orders.kept), dict(orders.owners)
            asked = wish_of(protected)
            allowed = {"", asked.tenant} if asked else {"", *map(index._find_owner, wanted)}
            filling, evicted = reserve(wanted, charge, protected, **told)
            assert not kept.keys() & set(evicted), "a kept block was evicted"
            assert {owners.get(each, "") for each in evicted} <= allowed, "a tenant took another one's block"
            return filling, evicted

        index.reserve = reserves
        self.watched.append(index)

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
        for tier in self.planner.tiers:
            assert not tier.index._pins
            assert not tier.index._filling
            assert not tier.index._leaving
            assert tier.storing == 0
        self.check()
        self.ranks.check_holdings(self.planner)


def check_shares(index):
    """Insist that a tier's bytes are counted right, in each share, and that no bound is passed."""
    orders = index.orders
    takes = {**orders, **index._filling, **index._leaving}
    assert orders.nbytes == sum(orders.values())
    assert not orders.kept.keys() & index._leaving.keys()
    assert orders.kept_bytes == sum(takes[each] for each in orders.kept)
    assert orders.kept_bytes <= orders.shares[""].keep_bytes
    assert orders.owners.keys() <= takes.keys()
    listed = [each for share in orders.shares.values() for each in share.order]
    assert len(listed) == len(set(listed))
    assert {*listed} == {*orders} - orders.kept.keys()
    for name, share in orders.shares.items():
        own = [each for each in takes if orders.owners.get(each, "") == name]
        assert share.kept_bytes == sum(takes[each] for each in own if each in orders.kept)
        assert share.kept_bytes <= share.keep_bytes
        assert all(orders.owners.get(each, "") == name for each in share.order)
        if share.quota_bytes is not None:
            assert share.used_bytes == sum(takes[each] for each in own) <= share.quota_bytes


def run(seed, steps):
    """Run a program, and give what it has done."""
    program = Program(seed)
    for at in range(steps):
        try:
            program.step(at)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, step {at}: {program.planner!r}: {error}") from error
    program.end()
    late = sum(counts.dropped["late"] for counts in program.planner.counts.values())
    return program.did + Counter(late=late)
