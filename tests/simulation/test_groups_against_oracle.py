"""Random programs of an engine with three KV groups, over every backend and pairs of them, against an oracle.

Replay one with ``KVBM_SEED=123 pytest tests/simulation``: the seed is in the failing assertion.
``KVBM_STEPS=5000`` makes each program as long as that; ``-m soak`` runs more seeds.
"""

import itertools
import os
import random

import pytest
from grouped_engine import DEADLINE_S, Engine, Oracle, Prompt, longest_boundary, needed
from simulated_ranks import SimulatedRanks

from kvbm_core import Op, Reason, Registry
from kvbm_core.groups import Coverage, KvGroup, Rule, group_tag
from kvbm_core.layers import SEAL_BYTES

SEED = int(os.environ.get("KVBM_SEED", "0"))
STEPS = int(os.environ.get("KVBM_STEPS", "75"))
PROMPTS, TOKENS, ALIGNMENT, DEVICE_BLOCKS = 6, 384, 32, 256
BACKENDS = ("memory", "cpu", "gds", "lmdb", "remote")
OBJECTS = {"memory": 70, "cpu": 150, "gds": 180, "lmdb": 90}
"""Of the longest, that a rank's share of the capacity has room for. All prompts have some 400."""
ORDERS = [order for count in (1, 2) for order in itertools.permutations(BACKENDS, count)]


def group(block_tokens, coverage=Coverage()):  # noqa: B008 - it is frozen.
    return KvGroup(block_tokens, coverage, group_tag({"tokens": block_tokens, "coverage": str(coverage)}))


MIXES = [
    ((group(16), 3000), (group(8, Coverage(Rule.WINDOW, 40)), 1400), (group(32, Coverage(Rule.STATE)), 9000)),
    ((group(32, Coverage(Rule.STATE)), 5000), (group(8), 9000), (group(16, Coverage(Rule.WINDOW, 100)), 700)),
    ((group(16, Coverage(Rule.WINDOW, 16)), 9000), (group(16, Coverage(Rule.STATE)), 100), (group(16), 4096)),
]
"""Three groups and the bytes of their blocks, in several orders of length and number."""


def shapes_of(mix, rng, ranks):
    """Give the bytes of each group's block on each rank; one rank has no layer of one group."""
    shapes = [[nbytes // rng.choice([1, 1, 2]) for _, nbytes in mix] for _ in range(ranks)]
    shapes[rng.randrange(ranks)][rng.randrange(len(mix))] = 0
    return [tuple(shape) for shape in shapes]


def prompts_of(groups, rng):
    """Make prompts, some of which begin alike."""
    prompts = [[number, *range(TOKENS - 1)] for number in range(PROMPTS // 2)]
    while len(prompts) < PROMPTS:
        shared = rng.randrange(16, TOKENS)
        prompts.append(prompts[0][:shared] + [1000 + len(prompts)] * (TOKENS - shared))
    return [Prompt(groups, tokens) for tokens in prompts]


def settings_of(order, shapes, folder, deadline_s=DEADLINE_S):
    max_bytes = max(map(max, shapes)) + SEAL_BYTES
    tiers, folders = [], {}
    for name in order:
        entry = {"backend": name}
        if name == "remote":
            entry["url"] = f"file://{folder}/remote"
        else:
            share_bytes = Registry().backend(name).share_bytes(OBJECTS[name], max_bytes)
            entry["capacity"] = share_bytes * len(shapes)
        if name in ("gds", "lmdb"):
            entry["path"] = str(folder / name)
            folders[folder / name] = entry["capacity"]
        if name == "gds":
            entry["engine"] = "threads"
        tiers.append(entry)
    deadlines = dict.fromkeys(("load_deadline_s", "store_deadline_s", "lookup_deadline_s"), deadline_s)
    return {"tiers": tiers, "staging": "4MiB", **deadlines}, folders


def blocks_to_store(groups, rng):
    """Choose the blocks that an engine has after a prompt: all, or the last, and some that it kept before."""
    tokens = rng.randint(8, TOKENS)
    done = rng.choice([0, 0, rng.randrange(tokens)])
    chosen = {}
    for number, each in enumerate(groups):
        ends = [tokens // each.block_tokens * each.block_tokens]
        if each.coverage.rule is not Rule.ALL:
            ends += [end for end in range(32, tokens, 32) if rng.random() < 0.15]
        blocks = {block for end in ends for block in needed(each, 0, end)}
        if each.coverage.rule is Rule.ALL:
            blocks = {block for block in blocks if block >= done // each.block_tokens}
        if blocks:
            chosen[number] = sorted(blocks)
    return chosen


def range_of(rng):
    """Choose the tokens that an engine has already, and those behind which it needs no boundary."""
    if rng.random() < 0.5:  # As before: then what was found may be remembered.
        return 0, TOKENS
    start = rng.choice([0, 0, 0, rng.randrange(TOKENS // ALIGNMENT) * ALIGNMENT])
    return start, rng.randint(start, TOKENS)


def fill_some(planner, groups, prompt, rng, now_s):
    """Have blocks of one group copied from a tier to another."""
    if len(planner.occupancy) > 1:
        source, target = rng.sample(range(len(planner.occupancy)), 2)
        number = rng.randrange(len(groups))
        keys = prompt.slice(0, rng.randint(1, TOKENS // groups[number].block_tokens), number)
        planner.fill(source, target, keys, now_s, prompt, number)


def known(planner):
    """Give the objects that the leader knows, by tier, where it needs not ask for them."""
    return {tier.name: set(tier.index) for tier in planner._tiers if not tier.capabilities.shared}


def assert_nothing_is_held(planner):
    """Insist that no object is in use, or on its way, when nothing is under way."""
    for state in planner._tiers:
        assert not state.index._pins
        assert not state.index._filling
        assert not state.index._leaving
        assert state.storing == 0
    assert planner.loading_blocks == 0


class Program:
    """One engine after the other over the same media, and what is insisted on at each step."""

    def __init__(self, order, folder, seed, *, ranks=2):
        self.where = f"KVBM_SEED={seed} {'-'.join(order)}"
        self.rng = random.Random(f"{seed}{order}")
        mix = self.rng.choice(MIXES)
        self.groups = [each for each, _ in mix]
        shapes = shapes_of(mix, self.rng, ranks)
        self.prompts = prompts_of(self.groups, self.rng)
        self.oracle = Oracle(self.groups, shapes, self.rng)
        self.settings, self.folders = settings_of(order, shapes, folder)
        self.engine = Engine(self.settings, self.oracle, DEVICE_BLOCKS)
        self.loaded, self.checked, self.failed = 0, 0, 0

    def run(self, steps):
        for step in range(steps):
            if step % 90 == 55:
                self.restart()
            faulty = step % 45 in range(15, 25)
            self.oracle.probability = 0.04 if faulty else 0.0
            action = self.rng.random()
            if action < 0.4:
                self.engine.store(self.rng.choice(self.prompts), blocks_to_store(self.groups, self.rng))
            elif action < 0.75 or faulty:
                self.start_load()
            elif action < 0.95:
                self.check()
            elif action < 0.96:
                self.engine.planner.reset()
            elif action < 0.98:
                self.fill()
            else:
                self.engine.step()
            self.engine.hear()
            self.engine.check_room(self.folders)
        self.recover()
        for prompt in self.prompts:
            self.check_boundary(prompt, 0, TOKENS)
        self.check_stored()
        self.engine.settle()
        assert_nothing_is_held(self.engine.planner)
        self.close()

    def start_load(self):
        """Load while other things go on: it may fail as a whole, and never holds a wrong byte."""
        prompt = self.rng.choice(self.prompts)
        self.engine.load(prompt, self.engine.find(prompt, *range_of(self.rng)))

    def fill(self):
        """Copy blocks of one group from a tier to another."""
        prompt = self.rng.choice(self.prompts)
        fill_some(self.engine.planner, self.groups, prompt, self.rng, self.engine.now_s)

    def check(self):
        """Once nothing is under way and no fault has come, the longest boundary is found, and comes whole."""
        self.recover()
        for prompt in self.rng.sample(self.prompts, 2):
            self.check_boundary(prompt, *range_of(self.rng))

    def check_boundary(self, prompt, start, stop):
        engine = self.engine
        if engine.has_been_slow:  # A store that was given up may land, and nobody tells the leader.
            engine.forget_findings()
        least, most = self.oracle.longest(prompt, start, stop, engine.tiers)
        match = engine.find(prompt, start, stop)
        if engine.was_too_slow():
            return
        found = (match.tokens or [start])[0]
        assert least <= found <= most, (self.where, match.tokens, least, most, engine.planner)
        request = engine.load(prompt, match)
        engine.settle()
        if request and not engine.was_too_slow():
            assert not request.failures, (self.where, request.failures, engine.planner)
            self.checked += 1

    def check_stored(self):
        """Store prompts and load them until several loads were checked: those of a busy machine are not."""
        for prompt in itertools.islice(itertools.cycle(self.prompts), 50):
            if self.checked > 3:
                return
            blocks = (range(TOKENS // each.block_tokens) for each in self.groups)
            self.engine.store(prompt, dict(enumerate(blocks)))
            self.engine.settle()
            self.recover()
            self.check_boundary(prompt, 0, TOKENS)

    def recover(self):
        """Wait until all has ended and what was too late is undone; no tier is left alone then."""
        self.oracle.probability = 0.0
        while True:
            self.engine.settle_strays()
            self.engine.now_s += 120
            if not self.engine.was_too_slow():
                return

    def restart(self):
        """End the engine and start another over the same media: what is durable is known again."""
        self.recover()
        before = known(self.engine.planner)
        self.close()
        # What a tier could not forget, because it never let go of it, may be there again.
        hung = set(self.oracle.hung)
        self.oracle.hung.clear()
        for state in self.engine.planner._tiers:
            if not state.capabilities.durable:
                for rank in range(len(self.oracle.shapes)):
                    self.oracle.held[state.name, rank].clear()
        self.engine = Engine(self.settings, self.oracle, DEVICE_BLOCKS, now_s=self.engine.now_s)
        self.engine.settle_strays()
        for state in self.engine.planner._tiers:
            if not state.capabilities.durable:
                assert len(state.index) == 0
            elif not state.capabilities.shared:
                assert set(state.index) - hung == before[state.name] - hung, self.where

    def close(self):
        self.engine.close()
        self.loaded += self.engine.ended["loaded"]
        self.failed += self.engine.ended["failed"]


SEEDS = [SEED, *(pytest.param(SEED + at, marks=pytest.mark.soak) for at in range(1, 11))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_what_is_loaded_is_what_was_stored_in_every_group(order, seed, tmp_path):
    program = Program(order, tmp_path, seed)
    try:
        program.run(STEPS)
    finally:
        program.engine.close()
    assert program.checked > 3


@pytest.mark.parametrize("below", ["memory", "gds", "lmdb", "remote"])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_failed_part_fails_the_whole_request_and_the_next_boundary_is_shorter(group, below, tmp_path):
    """One object of one group is damaged on one rank: nothing of that boundary is used."""
    mix = MIXES[0]
    groups, shapes = [each for each, _ in mix], [tuple(nbytes for _, nbytes in mix)] * 2
    oracle = Oracle(groups, shapes, random.Random(0))
    prompt = Prompt(groups, range(TOKENS))
    # The last block of a boundary of 128 tokens, which no shorter one needs.
    [damaged] = prompt.slice(needed(groups[group], 0, 128)[-1], 128 // groups[group].block_tokens, group)
    oracle.faults = lambda tier, rank, transfer: (
        "flip" if (rank, transfer.key, transfer.op) == (1, damaged, Op.LOAD) else None
    )
    settings, _ = settings_of((below,), shapes, tmp_path, deadline_s=60)
    engine = Engine(settings, oracle, DEVICE_BLOCKS)
    try:
        for tokens in (64, 128):
            engine.store(prompt, {number: needed(each, 0, tokens) for number, each in enumerate(groups)})
            engine.settle()
        request = engine.load(prompt, engine.find(prompt, 0, TOKENS))
        assert request.tokens == 128
        engine.settle()
        assert request.failures == [Reason.CORRUPT]
        assert engine.ended == {"failed": 1}
        # What is gone is asked for again where a tier must be asked.
        engine.now_s += 10
        request = engine.load(prompt, engine.find(prompt, 0, TOKENS))
        assert request.tokens == 64
        engine.settle()
        assert request.failures == []
        assert engine.ended == {"failed": 1, "loaded": 1}
    finally:
        engine.close()


class PlannerProgram:
    """A planner, and ranks that are simulated."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.groups = [each for each, _ in self.rng.choice(MIXES)]
        self.prompts = prompts_of(self.groups, self.rng)
        self.ranks = SimulatedRanks(self.groups, self.rng)
        self.planner, self.now_s = self.ranks.planner(), 0.0
        self.restored, self.ended, self.found = 0, {}, {}
        self.numbers = itertools.count()

    def run(self, steps):
        actions = [self.store, self.load, self.check, self.fill, self.reset, self.restart]
        for _ in range(steps):
            self.now_s += self.rng.random()
            self.ranks.failing = self.rng.choice([0.0, 0.0, 0.05])
            [act] = self.rng.choices(actions, (40, 22, 20, 5, 1, 3))
            act(self.rng.choice(self.prompts))
            self.go()
            self.hear(self.rng.randrange(len(self.ranks.mail) + 1))
        self.settle()
        assert set(self.ranks.seen.values()) <= {1}
        assert_nothing_is_held(self.planner)

    def store(self, prompt):
        for number, blocks in blocks_to_store(self.groups, self.rng).items():
            keys = [key for at in blocks for key in prompt.slice(at, at + 1, number)]
            self.planner.store(keys, list(range(len(keys))), prompt, self.now_s, number)

    def load(self, prompt):
        """Start to load a boundary: at this moment each rank has what the leader says."""
        return self._load(prompt, *range_of(self.rng))

    def fill(self, prompt):
        fill_some(self.planner, self.groups, prompt, self.rng, self.now_s)

    def reset(self, prompt):
        self.planner.reset()

    def restart(self, prompt):
        self.settle()
        before = known(self.planner)
        self.planner, self.found = self.ranks.planner(), {}
        assert known(self.planner) == before

    def check(self, prompt):
        """Once nothing is under way, the longest boundary is found, and all of it can be loaded."""
        self.settle()
        start, stop = range_of(self.rng)
        tiers = range(len(self.ranks.held[0]))
        longest = longest_boundary(self.groups, prompt, start, stop, self.ranks.have, tiers)
        tokens, name = self._load(prompt, start, stop)
        assert tokens == (longest if longest > start else 0)
        self.settle()
        assert not self.ended.get(name)
        self.restored += tokens > 0

    def go(self):
        self.ranks.submit(self.planner.take(self.now_s), self.planner)

    def hear(self, most=None):
        for op, failures in self.ranks.deliver(self.planner, self.now_s, most):
            self.ended.setdefault(op.request, []).extend(failures.values())
        self.ranks.check_room(self.planner)

    def settle(self):
        """Have all that is under way reported, without faults; then no tier is left alone any more."""
        self.ranks.failing = 0.0
        while self.planner.busy(self.now_s):
            self.go()
            self.hear()
        self.now_s += 120
        self.ranks.check_holdings(self.planner)

    def _find(self, prompt, start, stop):
        while True:
            match = self.found[prompt] = self.planner.find_boundaries(
                prompt, start, stop, self.now_s, self.found.get(prompt)
            )
            if not match.lookups:
                return match
            self.go()
            self.hear()

    def _load(self, prompt, start, stop):
        tokens, parts = self.planner.choose_boundary(self._find(prompt, start, stop), self.now_s)
        name = str(next(self.numbers))
        for number, first, tiers in parts:
            keys = prompt.slice(first, first + len(tiers), number)
            for key, tier in zip(keys, tiers, strict=True):
                assert self.ranks.have(tier, key)
            blocks = list(range(len(keys)))
            self.planner.load(name, keys, blocks, tiers, group=number, prefix=prompt)
        return tokens, name


@pytest.mark.parametrize(
    "seed",
    [
        *range(SEED, SEED + 6),
        *(pytest.param(SEED + at, marks=pytest.mark.soak) for at in range(6, 200)),
    ],
)
def test_planner_over_groups_and_ranks_that_report_late_out_of_order_and_failing(seed):
    """No bytes: what the planner believes against what simulated ranks really hold."""
    program = PlannerProgram(seed)
    program.run(400)
    assert program.restored > 5
