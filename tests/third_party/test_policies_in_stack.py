"""Strangers' policies, named in a configuration, on an LMDB tier with more coming than it holds."""

import logging
import random

import pytest

from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.testing import MemoryDevice

POLICIES = ["arc", "learned", "chooser"]
BLOCK_BYTES, STEP, BLOCKS = 20_000, 8, 40
"""A prompt has so many blocks at most, and is stored in steps, as an engine computes it."""


def keys_of(prompt, blocks=BLOCKS):
    return chain_keys(root_key(), range(prompt << 20, (prompt << 20) + 16 * blocks), 16)


def content_of(prompt, at):
    return random.Random(f"{prompt} {at}").randbytes(BLOCK_BYTES)


class Engine:
    """Serves prompts as an engine does: loads what there is, computes and stores the rest."""

    def __init__(self, folder, policy):
        tier = {"backend": "lmdb", "capacity": "4MiB", "path": f"{folder}/kv", "policy": {"name": policy}}
        self.device = MemoryDevice(BLOCKS, BLOCK_BYTES)
        config = {"tiers": [tier], "load_deadline_s": 60.0, "store_deadline_s": 60.0}
        self.stack = Stack.open(config, self.device, make_namespace({"model": "policies"}))
        self.hits = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()

    @property
    def index(self):
        return self.stack._planner._tiers[-1].index

    @property
    def room(self):
        """Objects that the tier holds."""
        [tier] = self.stack._planner._tiers
        return tier.index.capacity_bytes // tier.charges[0]

    def serve(self, prompt, blocks):
        """Serve a prompt; nothing of it is evicted for what comes after it."""
        keys = keys_of(prompt, blocks)
        found = self.stack.load(keys, range(blocks))
        for at in range(found):
            assert self.device.read(at) == content_of(prompt, at)
        self.hits += found
        for start in range(found, blocks, STEP):
            stop = min(blocks, start + STEP)
            for at in range(start, stop):
                self.device.write(at % BLOCKS, content_of(prompt, at))
            self.stack.store(keys[start:stop], [at % BLOCKS for at in range(start, stop)], keys[:start])
            self.stack.wait()
            assert self.stack.match(keys[:stop]) == stop
            assert self.index.used_bytes <= self.index.capacity_bytes
        return found


@pytest.mark.parametrize("policy", POLICIES)
def test_hits_are_counted_and_no_prompt_evicts_its_own_blocks(installed, tmp_path, policy, caplog):
    rng = random.Random(policy)
    with Engine(tmp_path, policy) as engine:
        lengths = {prompt: rng.randint(4, BLOCKS) for prompt in range(60)}
        popular = list(lengths)
        for _ in range(100):
            # A few prompts come again and again.
            prompt = popular[min(int(rng.paretovariate(0.7)) - 1, len(popular) - 1)]
            engine.serve(prompt, lengths[prompt])
        counts = engine.stack.counts["lmdb"]
        assert counts.loaded == engine.hits > 500
        assert counts.evicted > 3 * engine.room
        assert not counts.failed
        there = dict(engine.index._order)
        # The policy knows what is there, and nothing else.
        assert type(engine.index._order._adviser._policy).__name__.lower() == policy
        assert len(there) == engine.stack.occupancy["lmdb"]
    with Engine(tmp_path, policy) as engine:
        assert set(engine.index._order) == set(there)
        before = engine.stack.occupancy["lmdb"]
        served = sum(engine.stack.load(keys_of(prompt, n), range(n)) for prompt, n in lengths.items())
        assert 0 < served <= before
        for prompt in range(100, 130):
            engine.serve(prompt, 20)
        assert engine.stack.counts["lmdb"].evicted > 0
    # The core says it when it goes on without a policy.
    assert not warnings_in(caplog)


@pytest.mark.parametrize("policy", POLICIES)
def test_of_a_prompt_longer_than_the_tier_the_beginning_stays(installed, tmp_path, policy, caplog):
    with Engine(tmp_path, policy) as engine:
        for prompt in range(8):
            engine.serve(prompt, BLOCKS)
        keys, found = keys_of(99, 2 * engine.room // STEP * STEP), 0
        for start in range(0, len(keys), STEP):
            blocks = range(STEP)
            for at in blocks:
                engine.device.write(at, content_of(99, start + at))
            engine.stack.store(keys[start : start + STEP], blocks, keys[:start])
            engine.stack.wait()
            before, found = found, engine.stack.match(keys)
            assert found >= before
        assert found >= 0.95 * engine.room
        assert not warnings_in(caplog)
        # Another prompt pushes it out again.
        for prompt in range(8, 8 + engine.room // STEP):
            engine.serve(prompt, STEP)
        assert engine.stack.counts["lmdb"].evicted > 2 * engine.room
    assert not warnings_in(caplog)


def warnings_in(caplog):
    """Give the lines that are more than information."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
