"""A replay drives the planner as an engine would: known ratios, two tiers, slow ones, remote ones."""

import itertools
import os
import random
from pathlib import Path

import pytest

from kvbm_core import ConfigError
from kvbm_core.registry import Registry
from kvbm_replay import Request, Trace, generate
from kvbm_replay._curve import curve_of, sampled
from kvbm_replay._driver import replay
from kvbm_replay._layout import read_layout
from kvbm_replay._machine import Machine, Speed
from kvbm_replay._reader import read_trace
from kvbm_replay._reference import belady_hits, lru_hits, reuse_hits
from kvbm_replay._sweep import Sweep, run_sweep

CHAT = os.environ.get("KVBM_CHAT_TRACE", "")
"""The public trace of conversations, see docs/reference/trace-formats.md#mooncake."""
BLOCK_TOKENS = 512
MACHINE = Machine()
BLOCK_BYTES = BLOCK_TOKENS * MACHINE.token_bytes
HOST = {"backend": "cpu", "capacity": "1TiB"}
DISK = {"backend": "lmdb", "capacity": "1TiB", "path": "/not/opened"}
REMOTE = {"backend": "remote", "url": "s3://not/opened"}


def layout(*tiers, blocks=(), **settings):
    """A stack of which the first tiers hold so many blocks."""
    made = read_layout({"tiers": list(tiers), **settings}, BLOCK_BYTES, Registry())
    for position, count in enumerate(blocks):
        made = made.with_blocks(position, count)
    return made


def one(*tiers, **more):
    """The stacks of a sweep: this one."""
    return [("stack", layout(*tiers, **more))]


def requests_of(*prompts):
    """A trace of prompts, each of them blocks, a second apart."""
    return Trace(
        "made",
        BLOCK_TOKENS,
        [Request(at, list(p), len(p) * BLOCK_TOKENS + 7) for at, p in enumerate(prompts)],
    )


@pytest.fixture(scope="module")
def chat():
    if not CHAT:
        pytest.skip(
            "KVBM_CHAT_TRACE names no file: the Mooncake paper's trace is not part of this repository"
        )
    return read_trace([Path(CHAT)])


def test_the_planner_hits_on_the_chat_trace_what_lru_hits_and_belady_more(chat):
    sizes = [millions * 1_000_000 // BLOCK_TOKENS for millions in (1, 2, 3, 5, 10, 20)]
    lru = [0.0572, 0.0915, 0.1470, 0.2219, 0.3044, 0.3668]
    belady = [0.2635, 0.3340, 0.3682, 0.3819, 0.3819, 0.3819]
    total, curve = chat.accesses, curve_of(chat)
    assert [round(curve.hits(blocks) / total, 4) for blocks in sizes] == lru
    assert [round(lru_hits(chat.requests, blocks) / total, 4) for blocks in sizes] == lru
    assert [round(belady_hits(chat.requests, blocks) / total, 4) for blocks in sizes[1:4]] == belady[1:4]
    # All sizes: `kvbm replay conversation_trace.jsonl`.
    answer = run_sweep(chat, Sweep(one(HOST), MACHINE, sizes=sizes[::5], policies=["lru"]))
    assert [row.hit_ratio for row in answer.rows] == pytest.approx(lru[::5], abs=2e-4)
    assert [row.belady_hit_ratio for row in answer.rows] == pytest.approx(belady[::5], abs=1e-4)
    assert round(answer.trace.reuse_ratio, 4) == 0.3819


@pytest.mark.parametrize("load", ["zipf", "loop", "scan", "phases", "chat", "agents"])
def test_planner_reference_and_curve_agree_on_lru(load):
    trace = generate(f"{load}:seed=3,requests=150")
    curve = curve_of(trace)
    # What does not fit has no order in which all three could agree.
    longest = max(len(request.blocks) for request in trace.requests)
    for blocks in (longest, 2 * longest, 4 * longest):
        hits = lru_hits(trace.requests, blocks)
        assert curve.hits(blocks) == hits
        # What a prompt adds the planner takes for more recent than what was there of it: a few hits less.
        assert 0.9 * hits <= replay(trace, layout(HOST, blocks=[blocks]), MACHINE).hits <= 1.02 * hits
        assert belady_hits(trace.requests, blocks) >= hits
    assert curve.most == reuse_hits(trace.requests)


def test_the_curve_of_some_blocks_is_near_that_of_all(chat):
    whole, few = curve_of(chat), curve_of(chat, 0.1)
    for blocks in (2_000, 8_000, 30_000):
        assert abs(whole.hits(blocks) - few.hits(blocks)) / whole.accesses < 0.01
    part = sampled(chat, 0.1)
    assert 0.08 < part.unique / chat.unique < 0.12
    assert all(
        {*few.blocks} <= {*all_.blocks} for few, all_ in zip(part.requests, chat.requests, strict=True)
    )


def test_two_tiers_hit_what_the_lower_holds_and_count_what_each_gave():
    trace = generate("chat:seed=1,requests=400")
    outcome = replay(trace, layout(HOST, DISK, blocks=[200, 2_000], only_faster=False), MACHINE)
    upper, lower = outcome.tiers
    assert upper.hits == lru_hits(trace.requests, 200)
    assert upper.hits + lower.hits == pytest.approx(lru_hits(trace.requests, 2_000), rel=0.01)
    assert lower.hits > upper.hits / 10
    assert upper.stored - upper.evicted == 200
    assert lower.stored_bytes == lower.stored * BLOCK_BYTES
    assert outcome.loaded == outcome.hits


def test_a_tier_that_writes_slowly_loses_stores_only_if_writes_take_time():
    trace = generate("chat:seed=1,requests=300,per_s=50")
    stack = layout(HOST, DISK, blocks=[100, 5_000], max_store_blocks=8)
    slow = Machine(speeds={"lmdb": Speed(50e9, 1e8, 0.0)})
    at_once = replay(trace, stack, slow).tiers[1]
    paced = replay(trace, stack, slow, paced=True).tiers[1]
    assert at_once.dropped < paced.dropped
    assert paced.stored < at_once.stored
    assert paced.stored + paced.dropped >= at_once.stored / 2


def test_a_remote_tier_is_asked_and_forgets_nothing():
    trace = generate("zipf:seed=2,requests=200")
    fast = Machine(speeds={"remote": Speed(50e9, 50e9, 0.0)})
    outcome = replay(trace, layout(HOST, REMOTE, blocks=[1_000]), fast)
    assert outcome.hits == reuse_hits(trace.requests)
    assert outcome.tiers[1].blocks is None


def test_what_is_slower_than_computing_is_found_and_not_loaded():
    trace = generate("zipf:seed=2,requests=200")
    slow = Machine(speeds={"lmdb": Speed(1e9, 1e9, 0.0)})
    stack = layout(DISK, blocks=[4_000])
    outcome = replay(trace, stack, slow)
    assert outcome.tiers[0].declined > 0.8 * outcome.hits
    trusting = replay(trace, layout(DISK, blocks=[4_000], only_faster=False), slow)
    assert trusting.loaded == trusting.hits == outcome.hits
    assert trusting.mean_first_token_s > outcome.mean_first_token_s


def test_the_time_to_the_first_token_is_that_of_the_machine():
    machine = Machine(1000.0, 10e9, 1000, {"cpu": Speed(1e6, 1e6, 0.25)})
    stack = read_layout({"tiers": [HOST], "only_faster": False}, BLOCK_TOKENS * 1000, Registry())
    outcome = replay(requests_of(range(4), range(4)), stack, machine)
    computed_s = (4 * 512 + 7) / 1000
    loaded_s = 0.25 + 4 * 512 * 1000 / 1e6 + 7 / 1000
    assert outcome.first_token_s == pytest.approx(sorted([computed_s, loaded_s]))
    assert outcome.busy_s == pytest.approx(computed_s + loaded_s)


def test_what_the_engine_has_is_not_asked_for():
    trace = generate("chat:seed=5,requests=300")
    alone = lru_hits(trace.requests, 300)
    outcome = replay(trace, layout(HOST, blocks=[3_000]), MACHINE, engine_blocks=300)
    assert outcome.engine_hits == alone
    assert outcome.hits == pytest.approx(lru_hits(trace.requests, 3_000), rel=0.01)
    recorded = Trace("made", BLOCK_TOKENS, [Request(at, [1, 2, 3], 1600, engine_blocks=2) for at in (0, 1)])
    outcome = replay(recorded, layout(HOST), MACHINE)
    assert (outcome.engine_hits, outcome.hits) == (4, 5)


def test_a_policy_is_that_of_the_name_or_of_the_configuration():
    trace = generate("scan:seed=1,requests=300")
    sweep = Sweep(one(HOST), MACHINE, sizes=[500], policies=["fifo", "lru"], references=False)
    fifo, lru = run_sweep(trace, sweep).rows
    assert (fifo.policy, lru.policy, lru.lru_hit_ratio) == ("fifo", "lru", None)
    assert fifo.hit_ratio != lru.hit_ratio
    own = run_sweep(trace, Sweep(one({**HOST, "policy": "fifo"}, blocks=[500]), MACHINE)).rows
    assert [row.policy for row in own] == ["fifo"]
    assert own[0].hit_ratio == fifo.hit_ratio


@pytest.mark.parametrize("seed", range(5))
def test_belady_keeps_what_the_best_of_all_choices_keeps(seed):
    # One block a prompt: then no prefix is cut, and Belady is known to be the best.
    rng = random.Random(seed)
    prompts = [[rng.randrange(5)] for _ in range(9)]
    assert belady_hits(requests_of(*prompts).requests, 2) == best_hits(tuple(p[0] for p in prompts), 2)


def best_hits(blocks, capacity):
    """Try every choice of what is kept."""
    states = {frozenset(): 0}
    for block in blocks:
        after = {}
        for there, hits in states.items():
            for count in range(min(capacity, len(there) + 1) + 1):
                for kept in itertools.combinations(there | {block}, count):
                    after[frozenset(kept)] = max(after.get(frozenset(kept), 0), hits + (block in there))
        states = after
    return max(states.values())


def test_no_medium_is_opened_and_mistakes_are_named(tmp_path):
    made = layout(HOST, {**DISK, "path": str(tmp_path / "new")})
    assert [tier.name for tier in made.tiers] == ["cpu", "lmdb"]
    assert not (tmp_path / "new").exists()
    assert made.tiers[0].blocks == (1 << 40) // (BLOCK_BYTES + 4096)  # A seal, in pages of its own.
    with pytest.raises(ConfigError, match="capacity '1MiB' is smaller than a block"):
        layout({**HOST, "capacity": "1MiB"})
    with pytest.raises(ConfigError, match="did you mean 'capacity'"):
        layout({"backend": "cpu", "capasity": "1GiB"})
    with pytest.raises(ConfigError, match="--vary disk: there is no such tier; write one of cpu, lmdb"):
        made.position("disk")
