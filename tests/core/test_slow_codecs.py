"""A codec that is slower than computing: its tier is left alone, costs a hundredth, and comes back."""

import threading
import time

import pytest
from test_mover import BLOCK, NAMESPACE, device

from kvbm_core import Codec, CodecConfig, Registry, Stack, chain_keys, root_key
from kvbm_core.codec import CodecKind
from kvbm_core.config import load_config
from kvbm_core.leader.planner import Planner
from kvbm_core.worker.worker import Worker

TOKENS = 16
COUNT = 40
KEYS = chain_keys(root_key(), range(COUNT * TOKENS), TOKENS)
COMPUTED_S = 0.1
"""What the engine takes for a block; the codec takes a second for one, or nothing."""


class Slow(Codec):
    """Takes its time on the test's clock, which goes on with the true one."""

    def __init__(self):
        self.takes_s, self.spent_s, self.passed_s = 1.0, 0.0, 0.0
        self._lock, self._true = threading.Lock(), time.monotonic

    def now_s(self):
        return self._true() + self.spent_s + self.passed_s

    def max_bytes(self, nbytes):
        return nbytes

    def encode(self, key, source, target):
        target[: len(source)] = source
        return len(source)

    def decode(self, key, source, target):
        with self._lock:
            self.spent_s += self.takes_s
        return self.encode(key, source, target)


class Engine:
    """A stack that asks its cost model before each load, as an engine does."""

    def __init__(self, codec, registry):
        room = 2 * COUNT * BLOCK
        tier = {"backend": "memory", "name": "disk", "capacity": room, "codecs": [{"name": "slow"}]}
        config = load_config({"tiers": [tier], "load_deadline_s": 1e6, "staging": room})
        worker = Worker(config, device(), NAMESPACE, registry=registry)
        self.planner = Planner([worker.status()], block_tokens=TOKENS)
        self.model, self.stack, self.codec = self.planner.cost_model, Stack(self.planner, worker), codec
        self.stack.store(KEYS, range(COUNT))
        self.stack.wait()

    def ask(self, count=COUNT):
        """Load what is worth it of the first blocks; give their number."""
        now_s = self.codec.now_s()
        tiers = self.planner.match(KEYS[:count], now_s)
        taken = self.model.blocks_to_load(tiers, now_s)
        self.model.tried(tiers[:taken], now_s)
        assert self.stack.load(KEYS[:taken], range(taken)) == taken
        return taken


@pytest.fixture
def engine(monkeypatch):
    codec = Slow()

    class Offering(Registry):
        def codec(self, name):
            return CodecKind(name, CodecConfig, lambda config, context: codec)

    monkeypatch.setattr(time, "monotonic", codec.now_s)
    made = Engine(codec, Offering())
    yield made
    made.stack.close()


def test_the_time_of_a_load_has_that_of_decoding(engine):
    engine.codec.takes_s = 7.0
    assert engine.ask(20) == 20
    assert engine.model._loading[0].seconds >= 7.0


@pytest.mark.parametrize("step_tokens", [1024, 100], ids=["long steps", "short steps"])
@pytest.mark.parametrize("count", [COUNT, 5], ids=["long prompts", "short prompts"])
def test_a_tier_that_decodes_slowly_is_left_alone_and_comes_back(engine, step_tokens, count):
    engine.model.computed(step_tokens, COMPUTED_S / TOKENS * step_tokens, engine.codec.now_s())
    engine.ask(count)
    assert engine.model.is_slow(0)
    spent_s, began_s = engine.codec.spent_s, engine.codec.now_s()
    assert [engine.ask(count) for _ in range(5)] == [0] * 5
    for _ in range(40):
        engine.codec.passed_s += 31
        engine.ask(count)
    lost_s = engine.codec.spent_s - spent_s
    assert 0 < lost_s <= 0.01 * (engine.codec.now_s() - began_s)
    engine.codec.takes_s = 0.0
    while engine.ask(count) < count:
        engine.codec.passed_s += 31
    assert not engine.model.is_slow(0)
