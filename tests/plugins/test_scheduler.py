"""What the scheduler's half tells the workers of a step: which blocks are stored, loaded and overwritten."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from kvbm_core import Capabilities, Planner, Report, TierStatus, load_config
from kvbm_metrics import Tally
from kvbm_vllm._scheduler import SchedulerHalf
from kvbm_vllm._values import Outcomes

TOKENS = 4


class FullAttentionSpec:
    block_size = TOKENS


def half():
    made = SchedulerHalf(
        load_config({"tiers": [{"backend": "cpu", "capacity": "1MiB"}]}),
        SimpleNamespace(model_config=None, parallel_config=SimpleNamespace(world_size=1)),
        SimpleNamespace(num_blocks=64, kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec())]),
    )
    begin_with(made, TierStatus("cpu", Capabilities(capacity_blocks=64, addressable=True), []))
    return made


def begin_with(made, *tiers):
    made._planner = Planner([tiers], block_tokens=TOKENS)
    made._tally = Tally(made._planner, [tiers], TOKENS, 4096)


def request(name, tokens, **other):
    return SimpleNamespace(
        request_id=name, all_token_ids=tokens, num_tokens=len(tokens), lora_request=None, cache_salt=None,
        mm_features=(), prompt_embeds=None, skip_reading_prefix_cache=False, **other,
    )  # fmt: skip


def step(made, scheduled=None, *, new=(), cached=(), resumed=(), preempted=()):
    """Tell of a step: tokens by request, new requests and cached ones as (name, computed, blocks)."""
    names, computed, blocks = zip(*cached, strict=True) if cached else ((), (), ())
    output = SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, num_computed_tokens=tokens, block_ids=(list(given),))
            for name, tokens, given in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(names),
            num_computed_tokens=list(computed),
            new_block_ids=[None if given is None else (list(given),) for given in blocks],
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens=scheduled or {},
        total_num_scheduled_tokens=sum((scheduled or {}).values()),
        preempted_req_ids=set(preempted),
    )
    return made.step(output).plan


def begin(made, name, tokens, computed, blocks):
    asked = request(name, tokens)
    made.match(asked, computed)
    made.allocated(asked, list(blocks), 0)
    return asked, step(made, {name: len(tokens) - computed}, new=[(name, computed, blocks)])


def end(made, plan):
    made.outcomes(Outcomes([Report(op.op, tier) for op in plan.stores for tier in op.tiers]))


def test_a_new_requests_blocks_are_overwritten_but_for_those_with_its_cached_prefix():
    _, plan = begin(half(), "a", [*range(10)], 0, [5, 6, 7])
    assert plan.overwrites == [5, 6, 7]
    _, plan = begin(half(), "a", [*range(10)], 2 * TOKENS, [5, 6, 7])
    assert plan.overwrites == [7]
    # A whole prefix is cached, and its last token computed again.
    _, plan = begin(half(), "a", [*range(8)], 2 * TOKENS - 1, [5, 6])
    assert plan.overwrites == [6]


def test_a_decoding_request_overwrites_what_it_gets():
    made = half()
    begin(made, "a", [*range(7)], 0, [5, 6])
    assert step(made, {"a": 1}, cached=[("a", 7, None)]).overwrites == []
    plan = step(made, {"a": 3}, cached=[("a", 8, [9])])  # One token, two proposed by a drafting model.
    assert plan.overwrites == [9]
    assert step(made).overwrites == []


def test_a_preempted_requests_blocks_are_stored_in_the_step_that_gives_them_away():
    made = half()
    tokens = [*range(10)]
    asked, _ = begin(made, "a", tokens, 0, [5, 6, 7])
    other = request("b", [*range(50, 60)])
    made.match(other, 0)
    made.allocated(other, [7, 6, 5], 0)
    plan = step(made, {"b": 10}, new=[("b", 0, [7, 6, 5])], preempted=["a"])
    assert [op.blocks for op in plan.stores] == [[5, 6]]
    assert plan.overwrites == [7, 6, 5]
    end(made, plan)
    # It comes back with one block found in vLLM's cache: the whole list is given, its head is not written.
    made.allocated(asked, [20, 21, 22], 0)
    plan = step(made, {"a": 6}, cached=[("a", TOKENS, [20, 21, 22])], resumed=["a"])
    assert plan.overwrites == [21, 22]


def test_a_finished_requests_blocks_are_stored_in_the_step_that_gives_them_away():
    made = half()
    asked, _ = begin(made, "a", [*range(10)], 0, [5, 6, 7])
    made.finished(asked)
    _, plan = begin(made, "b", [*range(50, 60)], 0, [7, 5, 6])
    assert [op.blocks for op in plan.stores] == [[5, 6]]
    assert plan.overwrites == [7, 5, 6]


def test_a_loaded_prefix_is_overwritten_by_the_load_alone():
    made = half()
    tokens = [*range(10)]
    asked, _ = begin(made, "a", tokens, 0, [5, 6, 7])
    made.finished(asked)
    end(made, step(made))
    again = request("b", tokens)
    assert made.match(again, 0) == (2 * TOKENS, True)
    made.allocated(again, [10, 11], 2 * TOKENS)
    plan = step(made)
    assert [op.blocks for op in plan.loads] == [[10, 11]]
    assert plan.overwrites == []
    made.outcomes(Outcomes([Report(op.op, op.tier) for op in plan.loads]))
    assert step(made, {"b": 2}, new=[("b", 2 * TOKENS, [10, 11, 12])]).overwrites == [12]


def test_a_request_whose_blocks_are_not_stored_overwrites_all_the_same():
    made = half()
    asked = request("a", [*range(10)])
    asked.prompt_embeds = object()
    assert made.match(asked, 0) == (0, False)
    made.allocated(asked, [5, 6, 7], 0)
    assert step(made, {"a": 10}, new=[("a", 0, [5, 6, 7])]).overwrites == [5, 6, 7]
    plan = step(made, {"a": 3}, cached=[("a", 10, [8])])
    assert plan.overwrites == [8]
    assert plan.stores == []


def test_a_request_that_must_wait_for_room_is_judged_once():
    """vLLM asks in every step until it has blocks for it: a try is not used up by asking."""
    made = half()
    tokens = [*range(100 * TOKENS + 1)]
    capabilities = Capabilities(capacity_blocks=200, durable=True)
    keys = made._sequence(request("b", tokens)).keys.first(100)
    begin_with(made, TierStatus("disk", capabilities, keys))
    made._planner.guard.computed(1600, 4.0, 1.0)  # 10 ms a block
    made._planner.guard.loaded(0, 100, 4.0, 1.0)  # 40 ms a block
    made._planner.guard._tried_s[0] = float("-inf")
    asked = request("b", tokens)
    tried = made.match(asked, 0)
    assert tried == (1 * TOKENS, True)
    for _ in range(3):
        assert made.match(asked, 0) == tried
    made.allocated(asked, list(range(101)), TOKENS)
    assert made.counts["disk"].declined == 99
    assert [op.blocks for op in step(made).loads] == [[0]]
    assert made.match(request("c", tokens), 0) == (0, False)
