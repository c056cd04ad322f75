"""Loads from a seed: each is what its description says."""

from itertools import pairwise

import pytest

from kvbm_core import ConfigError
from kvbm_replay import generate
from kvbm_replay._reference import belady_hits, lru_hits, reuse_hits
from kvbm_replay.generators import LOADS


@pytest.mark.parametrize("name", LOADS)
def test_a_seed_gives_the_same_requests_and_another_seed_others(name):
    first, same, other = (generate(f"{name}:requests=500,seed={seed}") for seed in (1, 1, 2))
    assert first == same
    assert first.requests != other.requests
    assert len(first.requests) == 500
    assert all(earlier.at_s <= later.at_s for earlier, later in pairwise(first.requests))
    assert all(len(each.blocks) == each.input_tokens // 512 for each in first.requests)
    assert 0 < reuse_hits(first.requests) < first.accesses


def test_equal_blocks_stand_behind_equal_blocks_at_the_same_place():
    trace = generate("agents:requests=300,seed=4+chat:requests=300,seed=5")
    behind = {}
    for request in trace.requests:
        for at, block in enumerate(request.blocks):
            before = request.blocks[at - 1] if at else None
            assert behind.setdefault(block, (at, before)) == (at, before)


def test_a_loop_is_what_lru_is_worst_at():
    trace = generate("loop:documents=20,requests=100")
    size = trace.unique // 2
    assert lru_hits(trace.requests, size) == 0
    assert belady_hits(trace.requests, size) > reuse_hits(trace.requests) / 3


def test_prompts_of_a_scan_never_come_back():
    trace = generate("scan:every=20,batch=10,documents=5,requests=90")
    seen = set()
    for at, request in enumerate(trace.requests):
        if at % 30 >= 20:
            assert seen.isdisjoint(request.blocks)
        seen.update(request.blocks)


def test_a_phase_replaces_documents():
    trace = generate("phases:every=100,replaced=1,documents=10,requests=200")
    before, after = (
        {b for r in part for b in r.blocks} for part in (trace.requests[:100], trace.requests[100:])
    )
    assert before.isdisjoint(after)
    kept = generate("phases:every=100,replaced=0,documents=10,requests=200")
    assert reuse_hits(kept.requests) > reuse_hits(trace.requests)


def test_a_few_documents_have_most_of_the_questions():
    def firsts(exponent):
        trace = generate(f"zipf:documents=50,exponent={exponent},requests=500,seed=3")
        counts = {}
        for request in trace.requests:
            counts[request.blocks[0]] = counts.get(request.blocks[0], 0) + 1
        return max(counts.values())

    assert firsts(1.5) > 3 * firsts(0)


@pytest.mark.parametrize("name", ["chat", "agents"])
def test_a_prompt_goes_on_where_another_ended(name):
    trace = generate(f"{name}:requests=400,seed=1")
    prompts = {tuple(request.blocks) for request in trace.requests}
    longer = [p for p in prompts if any(p != q and q and p[: len(q)] == q for q in prompts)]
    assert len(longer) > len(prompts) / 4


def test_agents_fork():
    trace = generate("agents:requests=400,seed=1,fork=0.3,systems=1,system_tokens=1")
    followers = {}
    for request in trace.requests:
        for block, following in pairwise(request.blocks):
            followers.setdefault(block, set()).add(following)
    assert max(map(len, followers.values())) >= 3


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ("chats:seed=1", "--generate chats:seed=1: unknown load 'chats'; write one of zipf, loop, scan,"),
        ("chat:turn=1", "--generate chat: unknown key 'turn'; did you mean 'turns'"),
        ("chat:turns", "'turns' has no value; write turns=NUMBER"),
        ("chat:turns=many", r"turns: [eE]xpected `float`, got `str` \(got 'many'\)"),
        ("chat:requests=0", "requests: 0; write a number above 0"),
        ("agents:fork=2", "fork: 2.*write a part, from 0 to 1"),
        ("chat:block_tokens=16+zipf", r"block_tokens is \[16, 512\]; write the same for all loads"),
    ],
)
def test_a_mistake_is_named(load, said):
    with pytest.raises(ConfigError, match=said):
        generate(load)
