"""However vLLM schedules, a request reads the KV of its own tokens, computed with the weights of now.

`KVBM_RANDOM_SLOTS` says how many slots are compared, `make soak` compares ten times as many; the
seed of a failure is in the test's output.
"""

import itertools
import os
from collections import Counter

import pytest

pytest.importorskip("vllm", minversion="0.32")
from kvbm_engine import Ledger, Session
from kvbm_engine._requests import RequestState
from kvbm_engine._steps import StepsUnderWay

pytestmark = pytest.mark.vllm

SLOTS = int(float(os.environ.get("KVBM_RANDOM_SLOTS", "2e6")))
SOAK_SLOTS = 10 * SLOTS
FIRST_SEED = int(os.environ.get("KVBM_RANDOM_SEED", "0"))
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("slots", [SLOTS, pytest.param(SOAK_SLOTS, marks=pytest.mark.soak)])
def test_whoever_reads_a_slot_finds_the_kv_of_its_tokens_and_weights(drive, part, slots):
    seen = Counter()
    for seed in itertools.count(FIRST_SEED + part, PARTS):
        seen.update(drive(seed))
        if seen["slots"] >= slots // PARTS:
            break
    print(f"part {part}: seeds {FIRST_SEED + part} to {seed}: {dict(seen)}")
    for kind in ("loaded", "other", "resets", "failed", "hints"):
        assert seen[kind], f"nothing {kind}: the test has shown nothing of that"


def keys_of_before(monkeypatch):
    """A reset that clears what it knows, and lets requests that are known go on under their keys."""
    forget = RequestState.forget
    monkeypatch.setattr(RequestState, "forget", lambda self, keys: forget(self, self.keys))


def blocks_of_loads_alone(monkeypatch):
    """Blocks count as overwritten where we load into them, or the step computes into them."""
    allocated, follow = Session.allocated, Ledger.follow
    forgotten = set()

    def notes(self, request, blocks, load_tokens, now_s):
        (forgotten.difference_update if load_tokens else forgotten.update)(blocks[0])
        allocated(self, request, blocks, load_tokens, now_s)

    def forgets(self, schedule):
        writes = follow(self, schedule)
        named = {*writes.new_blocks}
        writes.written = {block: None for block in writes.written if block in named or block not in forgotten}
        forgotten.clear()
        return writes

    monkeypatch.setattr(Session, "allocated", notes)
    monkeypatch.setattr(Ledger, "follow", forgets)


def steps_that_cannot_fail(monkeypatch):
    """What a step was to compute counts as computed when the next is planned."""
    begin = StepsUnderWay.begin

    def confirms(self, writes, tokens, now_s):
        begin(self, writes, tokens, now_s)
        for state, total, life in self._steps[self.number].writes:
            if life == state.life:
                self._confirm(state, total)

    monkeypatch.setattr(StepsUnderWay, "begin", confirms)
    monkeypatch.setattr(StepsUnderWay, "_lose", lambda self, step: None)
    monkeypatch.setattr(StepsUnderWay, "end", lambda self, number, now_s: (0, 0.0))


def kv_that_outlives_a_reset(monkeypatch):
    """A request that has KV from before a reset is stored on under its new keys."""
    forget = RequestState.forget

    def forgets(self, keys):
        blocks, self.blocks = self.blocks, []
        forget(self, keys)
        self.blocks = blocks

    monkeypatch.setattr(RequestState, "forget", forgets)


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        # The seed that found it when this was written, so that no others need to be tried.
        (keys_of_before, 1),
        (blocks_of_loads_alone, 92),
        (steps_that_cannot_fail, 47),
        (kv_that_outlives_a_reset, 0),
    ],
)
def test_without_any_of_the_rules_some_seed_reads_wrong_kv(drive, monkeypatch, fault, first):
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="reads wrong KV") as found:
        sum((drive(seed) for seed in [first, *range(200)]), Counter())
    print(fault.__name__, found.value)
