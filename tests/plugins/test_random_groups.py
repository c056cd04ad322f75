"""With whatever KV groups a model has, a request reads what was computed of its own tokens, in each of them.

The random engines of `test_random_engine` again, with windows, chunks, states and drafting models, and with
tiers that lose and spoil objects of one group or another. `KVBM_RANDOM_GROUP_SLOTS` says how many slots are
compared, `make soak` compares ten times as many.
"""

import os
from collections import Counter

import pytest

# Older ones hand over no states.
pytest.importorskip("vllm", minversion="0.32")
from random_fates import tell
from random_groups import MIXES

from kvbm_core.groups import Rule
from kvbm_engine import Ledger, Progress, Storing
from kvbm_engine._fences import Fences
from kvbm_engine._matching import Matching

pytestmark = pytest.mark.vllm

SLOTS = int(float(os.environ.get("KVBM_RANDOM_GROUP_SLOTS", "2e6")))
SOAK_SLOTS = 10 * SLOTS
FIRST_SEED = int(os.environ.get("KVBM_RANDOM_SEED", "0"))
PARTS = 2


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("slots", [SLOTS, pytest.param(SOAK_SLOTS, marks=pytest.mark.soak)])
def test_whoever_reads_a_slot_finds_what_its_group_has_of_the_tokens(drive, part, slots):
    mixes = [name for name in MIXES if name != "full"][part::PARTS]
    seen = {mix: Counter() for mix in mixes}
    for seed in range(FIRST_SEED, FIRST_SEED + slots):
        counts = seen[mixes[seed % len(mixes)]]
        counts.update(drive(seed, mixes[seed % len(mixes)], steps=200))
        enough = sum(each["slots"] for each in seen.values()) >= slots // PARTS
        if enough and all(each["loaded"] for each in seen.values()):
            break
    everything = sum(seen.values(), Counter())
    print(f"part {part}: seeds {FIRST_SEED} to {seed}, {everything['slots']} slots of {', '.join(seen)}")
    print(*tell(everything), sep="\n")
    for kind in ("loaded", "preempted", "resets", "failed", "spoilt"):
        assert everything[kind], f"nothing {kind}: the test has shown nothing of that"


def read_at_the_end(monkeypatch, rule):
    """What is stored of the groups with a rule is read when the request ends, from a copy of its table."""
    begin, places = Ledger.__init__, Storing._places

    def mirrors(self, *given):
        begin(self, *given)
        self._states = set()

    def at_the_end(self, state, at, offered, complete, *, ended):
        if self._ledger.groups[at].coverage.rule is not rule:
            return places(self, state, at, offered, complete, ended=ended)
        return places(self, state, at, 0, complete, ended=True) if ended else []

    if rule is Rule.STATE:
        monkeypatch.setattr(Ledger, "__init__", mirrors)
        monkeypatch.setattr(Ledger, "_hand_over", lambda self, state, states: None)
    monkeypatch.setattr(Storing, "_places", at_the_end)


def states_of_a_stale_table(monkeypatch):
    read_at_the_end(monkeypatch, Rule.STATE)
    monkeypatch.setattr(Fences, "given", lambda self, blocks: None)


def window_blocks_after_reuse(monkeypatch):
    read_at_the_end(monkeypatch, Rule.WINDOW)
    monkeypatch.setattr(Fences, "given", lambda self, blocks: None)


def groups_restored_apart(monkeypatch):
    """Where a load of one group fails, the request goes on with what came of the others."""
    end = Progress.end
    monkeypatch.setattr(
        Progress, "end", lambda self, load, failures: end(self, load, () if load.group else failures)
    )


def a_block_less(monkeypatch):
    """Of a window one block less is restored than is read."""
    needed = Matching._needed

    def less(self, tables, start, stop):
        for target in needed(self, tables, start, stop):
            skips = target.group in self._ledger.sparse and len(target.blocks) > 1
            yield target._replace(first=target.first + skips, blocks=target.blocks[skips:])

    monkeypatch.setattr(Matching, "_needed", less)


def a_draft_s_last_block(monkeypatch):
    """A block of a drafting model is stored when the tokens of it are accepted."""
    begin = Ledger.__init__
    monkeypatch.setattr(
        Ledger, "__init__", lambda self, keys, groups, parked, drafts=(): begin(self, keys, groups, parked)
    )


@pytest.mark.parametrize(
    ("fault", "mix", "first"),
    [
        # The seed that found it when this was written, so that no others need to be tried.
        (states_of_a_stale_table, "full and state", 0),
        (window_blocks_after_reuse, "full and window", 0),
        (groups_restored_apart, "full and window", 16),
        (groups_restored_apart, "full and state", 12),
        (a_block_less, "full and window", 0),
        (a_draft_s_last_block, "full and a draft's full", 19),
    ],
)
def test_without_any_of_the_rules_some_seed_reads_wrong_kv_of_a_group(drive, monkeypatch, fault, mix, first):
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="reads wrong KV") as found:
        sum((drive(seed, mix, steps=200) for seed in [first, *range(200)]), Counter())
    print(fault.__name__, found.value)


@pytest.mark.parametrize("seed", range(2))
def test_a_block_that_was_given_away_is_not_read_however_late(drive, monkeypatch, seed):
    read_at_the_end(monkeypatch, Rule.WINDOW)
    assert drive(seed, "full and window", steps=200)["stored"]
