"""Random programs over stacks of every order, with tiers that fail at random, against a dictionary.

Replay one with ``KVBM_SEED=123 pytest tests/simulation``: the seed is in the failing assertion.
``KVBM_STEPS=5000`` makes each program as long as that.
"""

import dataclasses
import itertools
import os
import random
import threading
import time
from collections import Counter

import pytest

from kvbm_core import Planner, Reason, Registry, Report, Stack, TierStatus, chain_keys, root_key
from kvbm_core.block import BlockState
from kvbm_core.layers import SEAL_BYTES
from kvbm_core.testing import FaultyTier, MemoryDevice
from kvbm_core.tier import Capabilities

SEED = int(os.environ.get("KVBM_SEED", "0"))
BLOCK, DEVICE_BLOCKS, CHAINS, LENGTH = 3000, 64, 12, 24
STEPS = int(os.environ.get("KVBM_STEPS", "500"))
FAULTS = ["error", "full", "flip", "short", "lie", "late", "twice", "hang"]


class Chaos(Registry):
    """The installed backends; all tiers but the one that lends its memory fail with some probability."""

    def __init__(self, rng):
        super().__init__()
        self.rng, self.probability = rng, 0.0

    def backend(self, name):
        backend = super().backend(name)

        def open_(config, context):
            tier = backend.open(config, context)
            if name == "cpu":
                return tier
            return FaultyTier(tier, self.fault, seed=self.rng.random(), late_s=0.3, reorder=True)

        return dataclasses.replace(backend, open=open_)

    def fault(self, transfer):
        return self.rng.choice(FAULTS) if self.rng.random() < self.probability else None


def tiers(order, folder):
    slot = -(-(BLOCK + SEAL_BYTES) // 4096) * 4096
    settings = {
        "cpu": {"capacity": 40 * slot},
        "gds": {"capacity": 60 * slot + (200 << 10), "path": str(folder / "gds"), "engine": "threads"},
        "lmdb": {"capacity": "2MiB", "path": str(folder / "lmdb")},
        "remote": {"url": f"file://{folder}/remote"},
    }
    # Each with a policy that the order of the tiers gives it.
    policies = dict(zip(order, ["adaptive", "s3fifo", "lru"], strict=False))
    return [{"backend": name, "policy": policies[name], **settings[name]} for name in order]


BACKENDS = ("cpu", "gds", "lmdb", "remote")
CIRCLES = [(*each, *each)[at : at + 3] for each in (BACKENDS, BACKENDS[::-1]) for at in range(4)]
"""Of the orders of three those in which each backend stands twice at every place."""


ORDERS = [
    *itertools.permutations(BACKENDS, 2),
    *CIRCLES,
    *(
        pytest.param(order, marks=pytest.mark.soak)
        for order in itertools.permutations(BACKENDS, 3)
        if order not in CIRCLES
    ),
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_what_is_loaded_is_what_was_stored(order, tmp_path):
    rng = random.Random(f"{SEED}{order}")
    chaos, device = Chaos(rng), MemoryDevice(DEVICE_BLOCKS, BLOCK)
    chains = [chain_keys(root_key(), [chain, *range(LENGTH - 1)], 1) for chain in range(CHAINS)]
    content = {key: random.Random(key).randbytes(BLOCK) for chain in chains for key in chain}
    config = {
        "tiers": tiers(order, tmp_path),
        "load_deadline_s": 0.15,
        "store_deadline_s": 0.15,
        "staging": "256KiB",
    }
    loads = 0
    with Stack.open(config, device, b"n" * 16, registry=chaos) as stack:
        limits = {t.name: t.index.capacity_bytes for t in stack._planner._tiers}
        for step in range(STEPS):
            chaos.probability = 0.05 if step % 60 in range(20, 28) else 0.0
            chain = chains[rng.randrange(CHAINS)]
            action = rng.random()
            if action < 0.5:
                start = rng.choice([0, 0, rng.randrange(LENGTH)])
                stop = rng.randint(start + 1, LENGTH)
                blocks = rng.sample(range(DEVICE_BLOCKS), stop - start)
                for key, block in zip(chain[start:stop], blocks, strict=True):
                    device.write(block, content[key])
                stack.store(chain[start:stop], blocks, chain[:start])
                for block in blocks:  # The engine may overwrite them at once.
                    device.write(block, bytes(BLOCK))
            elif action < 0.97:
                blocks = rng.sample(range(DEVICE_BLOCKS), LENGTH)
                count = stack.load(chain, blocks)
                loads += count
                for key, block in zip(chain[:count], blocks[:count], strict=True):
                    assert device.read(block) == content[key], (step, SEED)
            elif action < 0.975:
                stack.reset()
            else:
                stack.wait()
            for name, level in stack._planner.levels(time.monotonic()).items():
                assert limits[name] is None or level.used_bytes <= limits[name]
        stack.wait()
        assert loads > 20  # Hundreds, but where the machine is so busy that deadlines pass.
        for tier in stack._planner._tiers:
            assert not tier.index._pins
            assert not tier.index._filling
            assert not tier.index._leaving
            assert tier.storing == 0


@pytest.mark.parametrize("seed", range(SEED, SEED + 8))
def test_planner_over_ranks_that_report_late_out_of_order_and_failing(seed):  # noqa: C901 - one program, read from top to bottom.
    """No bytes: what the planner believes against what simulated ranks really hold."""
    rng = random.Random(seed)
    ranks, capacities = rng.choice([1, 2, 3]), [rng.randint(5, 30), rng.randint(5, 60)]
    lends = rng.random() < 0.7
    statuses = [
        TierStatus(str(i), Capabilities(capacity_bytes=capacity, addressable=lends and i == 0), [])
        for i, capacity in enumerate(capacities)
    ]
    planner = Planner([statuses] * ranks, max_store_blocks=rng.randint(2, 20))
    held = [[set(), set()] for _ in range(ranks)]
    chains = [chain_keys(root_key(), [chain, *range(15)], 1) for chain in range(8)]
    mail, seen = [], Counter()
    now_s = 0.0
    for step in range(1500):
        now_s += rng.random()
        chain = rng.choice(chains)
        action = rng.random()
        if action < 0.4:
            start = rng.randrange(16)
            planner.store(chain[start:], list(range(start, 16)), chain[:start], now_s)
        elif action < 0.7 and (found := planner.match(chain, now_s)):
            for rank in held:
                assert all(key in rank[tier] for key, tier in zip(chain, found, strict=False)), step
            planner.load(str(step), chain[: len(found)], list(range(len(found))), found)
        elif action < 0.71:
            planner.reset()
        elif action < 0.85:
            source = rng.randrange(2)
            planner.fill(source, 1 - source, chain[: rng.randrange(17)], now_s, chain)
        plan = planner.take(now_s)
        for rank in held:
            for tier, keys in plan.drops:
                assert all(planner._tiers[tier].index.state(key) is not BlockState.READY for key in keys)
                rank[tier].difference_update(keys)
        for op in [*plan.stores, *plan.loads, *plan.fills]:
            seen[op.op] += 1
            for rank in range(ranks):
                mail += [(rank, op, leg) for leg in _legs(op)]
        rng.shuffle(mail)
        for _ in range(rng.randrange(len(mail) + 1) if mail else 0):
            rank, op, leg = mail.pop()
            failures = {at: rng.choice(list(Reason)[1:]) for at in range(len(op.keys)) if rng.random() < 0.05}
            if leg not in (getattr(op, "tier", -1), getattr(op, "source", -1)):
                held[rank][leg].update(key for at, key in enumerate(op.keys) if at not in failures)
            planner.report([Report(op.op, leg, failures)], now_s)
        assert all(len(t.index) <= c for t, c in zip(planner._tiers, capacities, strict=True))
    while mail:
        _, op, leg = mail.pop()
        planner.report([Report(op.op, leg, dict.fromkeys(range(len(op.keys)), Reason.ERROR))], now_s)
    assert set(seen.values()) <= {1}
    assert not any(tier.index._pins or tier.index._leaving for tier in planner._tiers)
    assert planner.loading_blocks == 0


def _legs(op):
    return op.tiers if hasattr(op, "tiers") else [op.tier, *([op.fill] if op.fill >= 0 else [])]


def test_no_threads_are_left_behind(tmp_path):
    before = threading.active_count()
    config = {"tiers": tiers(("cpu", "lmdb"), tmp_path)}
    with Stack.open(config, MemoryDevice(4, BLOCK), b"n" * 16) as stack:
        stack.store([bytes(32)], [0])
        stack.wait()
    assert threading.active_count() == before
