"""What the scheduler's half tells the workers of a step: which blocks are stored, loaded and overwritten."""

import json
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from kvbm_core import Capabilities, ConfigError, Op, Reason, Report, TierStatus, load_config
from kvbm_core.groups import KvGroup
from kvbm_engine import Ledger, Parked
from kvbm_engine._requests import RequestState
from kvbm_metrics import rate_reading
from kvbm_vllm import _scheduler
from kvbm_vllm._keys import request_keys
from kvbm_vllm._scheduler import SchedulerHalf, has_one_queue
from kvbm_vllm._startup import open_recorder
from kvbm_vllm._values import Handshake, Outcomes
from kvbm_vllm._weights import AdapterDigests

TOKENS = 4


class FullAttentionSpec:
    block_size = TOKENS


CLOCK = SimpleNamespace(ahead_s=0.0)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Let tests say how much time passes, see `pass_time`."""
    monkeypatch.setattr(CLOCK, "ahead_s", 0.0)
    told = SimpleNamespace(monotonic=lambda: time.monotonic() + CLOCK.ahead_s)
    monkeypatch.setattr(_scheduler, "time", told)


def pass_time():
    """Let the time pass for which the last blocks of finished requests wait."""
    CLOCK.ahead_s += 1


def bare(*, runner_v2=False, zeroes=False, world_size=1, most_loads=32):
    """A leader that has not heard of its workers."""
    return SchedulerHalf(
        load_config(
            {"tiers": [{"backend": "cpu", "capacity": "1MiB"}], "max_load_fraction": most_loads / 64}
        ),
        SimpleNamespace(
            model_config=None, parallel_config=SimpleNamespace(world_size=world_size),
            use_v2_model_runner=runner_v2, observability_config=SimpleNamespace(otlp_traces_endpoint=None),
        ),
        SimpleNamespace(
            num_blocks=64, kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec())],
            needs_kv_cache_zeroing=zeroes,
        ),
    )  # fmt: skip


CPU = Capabilities(capacity_bytes=64, addressable=True)


def half(*tiers, joins=False, most_loads=32):
    """A leader over these tiers, or an empty one in host memory."""
    made = bare(most_loads=most_loads)
    made.start([Handshake(0, [*tiers] or [TierStatus("cpu", CPU, [])], {}, joins)])
    return made


PROMPT = [*range(10)]
"""Two blocks, and tokens to be computed."""


def keys_of(tokens):
    """The keys of all complete blocks."""
    asked = request("found", tokens)
    return request_keys(asked, (KvGroup(TOKENS),), AdapterDigests()).slice(0, len(tokens) // TOKENS)


def idle(*tiers, joins=True, most_loads=32):
    """An engine that does nothing, whose device joins, over tiers that hold so many blocks of the prompt."""
    keys = keys_of(PROMPT)
    made = (
        TierStatus(
            name,
            Capabilities(capacity_bytes=64, addressable=name == "cpu"),
            [(key, 1) for key in keys[:count]],
        )
        for name, count in tiers or [("cpu", 2)]
    )
    return half(*made, joins=joins, most_loads=most_loads)


def request(name, tokens, **other):
    return SimpleNamespace(
        request_id=name, all_token_ids=tokens, num_tokens=len(tokens), lora_request=None, cache_salt=None,
        mm_features=(), prompt_embeds=None, skip_reading_prefix_cache=False,
        num_computed_tokens=1 << 30, **{"kv_transfer_params": None, "max_tokens": 16, **other},
    )  # fmt: skip


def step(made, scheduled=None, **told):
    """Give the plan of a step, see `step_plan`."""
    return step_plan(made, scheduled, **told).plan


def step_plan(made, scheduled=None, *, new=(), cached=(), resumed=(), preempted=()):
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
    return made.step(output)


def begin(made, name, tokens, computed, blocks):
    asked = request(name, tokens)
    made.match(asked, computed)
    made.allocated(asked, (list(blocks),), 0)
    return asked, step(made, {name: len(tokens) - computed}, new=[(name, computed, blocks)])


def end(made, plan):
    made.outcomes(Outcomes([Report(op.op, tier) for op in [*plan.stores, *plan.fills] for tier in op.tiers]))


@pytest.mark.parametrize(
    ("runner_v2", "zeroes"), [(False, False), (False, True), (True, False), (True, True)]
)
def test_blocks_that_vllm_clears_before_they_are_read_are_refused(runner_v2, zeroes):
    """vLLM's second model runner clears them before it lets a connector start the step's plan."""
    if runner_v2 and zeroes:
        with pytest.raises(ConfigError, match=r"VLLM_USE_V2_MODEL_RUNNER.*Set it to 0"):
            bare(runner_v2=True, zeroes=True)
    else:
        bare(runner_v2=runner_v2, zeroes=zeroes)


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
    made.outcomes(Outcomes([], 1))
    other = request("b", [*range(50, 60)])
    made.match(other, 0)
    made.allocated(other, ([7, 6, 5],), 0)
    plan = step(made, {"b": 10}, new=[("b", 0, [7, 6, 5])], preempted=["a"])
    assert [op.blocks for op in plan.stores] == [[5, 6]]
    assert plan.overwrites == [7, 6, 5]
    end(made, plan)
    # It comes back with one block found in vLLM's cache: the whole list is given, its head is not written.
    made.match(asked, TOKENS)
    made.allocated(asked, ([20, 21, 22],), 0)
    plan = step(made, {"a": 6}, cached=[("a", TOKENS, [20, 21, 22])], resumed=["a"])
    assert plan.overwrites == [21, 22]


def test_a_finished_requests_blocks_are_stored_in_the_step_that_gives_them_away():
    made = half()
    finish(made, "a", [*range(10)], [5, 6, 7])
    _, plan = begin(made, "b", [*range(50, 60)], 0, [7, 5, 6])
    assert [op.blocks for op in plan.stores] == [[5, 6]]
    assert plan.overwrites == [7, 5, 6]


def test_a_loaded_prefix_is_overwritten_by_the_load_alone():
    made = half()
    tokens = [*range(10)]
    asked, _ = begin(made, "a", tokens, 0, [5, 6, 7])
    made.finished(asked)
    made.outcomes(Outcomes([], 1))
    pass_time()
    end(made, step(made))
    again = request("b", tokens)
    assert made.match(again, 0) == (2 * TOKENS, True)
    made.allocated(again, ([10, 11],), 2 * TOKENS)
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
    made.allocated(asked, ([5, 6, 7],), 0)
    assert step(made, {"a": 10}, new=[("a", 0, [5, 6, 7])]).overwrites == [5, 6, 7]
    plan = step(made, {"a": 3}, cached=[("a", 10, [8])])
    assert plan.overwrites == [8]
    assert plan.stores == []


def test_a_request_that_must_wait_for_room_is_judged_once():
    """vLLM asks in every step until it has blocks for it: a try is not used up by asking."""
    tokens = [*range(100 * TOKENS + 1)]
    capabilities = Capabilities(capacity_bytes=200, durable=True)
    made = half(TierStatus("disk", capabilities, [(key, 1) for key in keys_of(tokens)]))
    made.session.planner.cost_model.computed(1600, 4.0, 1.0)  # 10 ms a block
    made.session.planner.cost_model.loaded(0, 100, 4.0, 1.0)  # 40 ms a block
    asked = request("b", tokens)
    tried = made.match(asked, 0)
    assert tried == (1 * TOKENS, True)
    for _ in range(3):
        assert made.match(asked, 0) == tried
    made.allocated(asked, (list(range(101)),), TOKENS)
    assert made.counts["disk"].declined == 99
    assert [op.blocks for op in step(made).loads] == [[0]]
    assert made.match(request("c", tokens), 0) == (0, False)


def load(made, name, blocks, count=2):
    """Have a request match and be given blocks; say whether vLLM is told of the load's end."""
    asked = request(name, PROMPT)
    found, later = made.match(asked, 0)
    assert found == count * TOKENS
    made.allocated(asked, (list(blocks),), found)
    return later


def test_an_engine_that_does_nothing_else_loads_in_the_step_that_computes_the_rest():
    made = idle()
    assert not load(made, "a", [5, 6, 7])
    told = step_plan(made, {"a": 2}, new=[("a", 2 * TOKENS, [5, 6, 7])])
    assert [(op.request, op.blocks, op.in_step) for op in told.plan.loads] == [("a", [5, 6], True)]
    assert told.plan.overwrites == [7]
    assert (told.computes, told.idle) == (True, False)


def other_is_computed(made):
    begin(made, "other", [*range(50, 60)], 0, [1, 2, 3])


def nobody_joins(made):
    made.session.matching.joins = False


def another_was_scheduled_last(made):
    other_is_computed(made)
    made.outcomes(Outcomes([], 1))
    assert not made.ledger.steps


def an_outcome_is_due(made):
    other_is_computed(made)
    made.finished(request("other", []))
    assert not made.ledger.others.running


def another_load_is_under_way(made):
    nobody_joins(made)
    assert load(made, "other", [1, 2, 3])
    step(made)
    made.session.matching.joins = True


def another_was_given_blocks(made):
    other = request("other", [*range(50, 60)])
    made.match(other, 0)
    made.allocated(other, ([1, 2, 3],), 0)


def another_has_come(made):
    made.arrived(request("a", PROMPT))
    made.arrived(request("other", [*range(50, 60)]))


def another_is_loaded_in_this_step(made):
    assert not load(made, "other", [1, 2, 3])


@pytest.mark.parametrize(
    "busy",
    [
        nobody_joins, another_was_scheduled_last, an_outcome_is_due, another_load_is_under_way,
        another_was_given_blocks, another_has_come, another_is_loaded_in_this_step,
    ],
)  # fmt: skip
def test_a_load_that_others_would_wait_for_is_not_part_of_a_step(busy):
    made = idle()
    busy(made)
    assert load(made, "a", [5, 6, 7])
    assert [op.in_step for op in step(made).loads if op.request == "a"] == [False]


@pytest.mark.parametrize("end", ["match", "finished"])
def test_a_request_that_has_been_looked_at_or_has_gone_is_nobody_to_wait_for(end):
    made = idle()
    other = request("other", [*range(50, 60)])
    made.arrived(other)
    made.arrived(request("a", PROMPT))
    made.match(other, 0) if end == "match" else made.finished(other)
    assert not load(made, "a", [5, 6, 7])


def test_a_load_whose_step_has_ended_holds_nobody_back_though_its_report_has_not_come():
    made = idle()
    assert not load(made, "a", [5, 6, 7])
    plan = step(made, {"a": 2}, new=[("a", 2 * TOKENS, [5, 6, 7])])
    made.finished(request("a", []))
    made.outcomes(Outcomes([], 1))
    assert not load(made, "b", [1, 2, 3])
    pass_time()
    plan.loads.extend(step(made).loads)
    made.outcomes(Outcomes([Report(op.op, 0) for op in plan.loads]))
    assert made.session.planner.loading_blocks == 0
    assert not made.busy()


@pytest.mark.parametrize("tiers", [[("cpu", 1), ("disk", 2)], [("cpu", 0), ("disk", 2)], [("disk", 2)]])
def test_a_step_waits_for_host_memory_alone(tiers):
    made = idle(*tiers)
    assert load(made, "a", [5, 6, 7])
    assert {op.in_step for op in step(made).loads} == {False}


def test_a_request_that_finds_no_room_may_be_loaded_otherwise_later():
    made = idle()
    asked = request("a", PROMPT)
    assert made.match(asked, 0) == (2 * TOKENS, False)  # vLLM has no blocks for it.
    other_is_computed(made)
    assert made.match(asked, 0) == (2 * TOKENS, True)
    made.finished(request("other", []))
    made.outcomes(Outcomes([], 1))
    assert made.match(asked, 0) == (2 * TOKENS, False)


@pytest.mark.parametrize("joins", [(True, True), (True, False), (False, True)])
def test_a_load_is_part_of_a_step_where_every_ranks_device_joins(joins):
    made = bare(world_size=2)
    status = [TierStatus("cpu", CPU, [(key, 1) for key in keys_of(PROMPT)])]
    made.start([Handshake(rank, status, {}, each) for rank, each in enumerate(joins)])
    assert load(made, "a", [5, 6, 7]) is not all(joins)


def test_of_what_ranks_have_measured_the_slowest_is_told():
    made = bare(world_size=2)
    status = [TierStatus("cpu", CPU, [])]
    measured = [{rate_reading("staged", "host_to_device", chosen=True): speed} for speed in (50, 40)]
    made.start([Handshake(rank, status, {}, False, each) for rank, each in enumerate(measured)])
    assert measured[1].items() <= made.take_stats().data.items()


@pytest.mark.parametrize("joins", [True, False])
def test_a_step_that_waits_for_a_load_says_nothing_of_how_fast_the_engine_computes(joins):
    made = idle(joins=joins)
    load(made, "a", [5, 6, 7])
    plan = step(made, {"a": 1000}, new=[("a", 2 * TOKENS, [5, 6, 7])])
    made.outcomes(Outcomes([Report(op.op, 0) for op in plan.loads], 1))
    assert (made.session.planner.cost_model._computing.seconds is None) is joins


def test_what_a_step_computed_is_stored_after_its_outcome():
    made = half()
    asked, _ = begin(made, "a", [*range(10)], 0, [5, 6, 7])
    assert not step(made)
    made.outcomes(Outcomes([], 1))
    assert [op.blocks for op in step(made).stores] == [[5, 6]]
    step(made, {"a": 6}, cached=[("a", 10, [8])])
    asked.all_token_ids, asked.num_tokens = [*range(17)], 17
    made.finished(asked)
    assert not step(made)
    assert made.busy()
    made.outcomes(Outcomes([], 4))
    _, plan = begin(made, "b", [*range(50, 60)], 0, [8, 7, 6])
    assert [op.blocks for op in plan.stores] == [[7, 8]]


@pytest.mark.parametrize("gone", ["preempted", "finished"])
def test_what_no_outcome_has_confirmed_is_given_up_with_its_blocks(gone):
    """Nobody knows whether the step has written them, and somebody else does now."""
    made = half()
    asked, _ = begin(made, "a", [*range(10)], 0, [5, 6, 7])
    if gone == "finished":
        made.finished(asked)
    told = {"new": [("b", 0, [7, 6, 5])], "preempted": ["a"] if gone == "preempted" else []}
    other = request("b", [*range(50, 60)])
    made.match(other, 0)
    made.allocated(other, ([7, 6, 5],), 0)
    plans = [step(made, {"b": 10}, **told)]
    made.outcomes(Outcomes([], 1))
    pass_time()
    plans.append(step(made))
    assert [op.blocks for plan in plans for op in plan.stores] == []


@pytest.mark.parametrize("after", ["running", "finished"])
def test_what_a_step_that_failed_was_to_write_is_never_stored(after):
    """With vLLM's fault tolerance the engine goes on without an outcome of it."""
    made = half()
    failed, _ = begin(made, "a", [*range(10)], 0, [5, 6, 7])
    if after == "finished":
        made.finished(failed)
    begin(made, "b", [*range(50, 60)], 0, [1, 2, 3])
    made.outcomes(Outcomes([], 2))
    pass_time()
    plans = [step(made, {"a": 2}, cached=[("a", 10, None)])]
    made.outcomes(Outcomes([], 3))
    plans.append(step(made))
    assert [op.blocks for plan in plans for op in plan.stores] == [[1, 2]]


def test_what_was_computed_behind_another_connectors_failed_load_is_not_stored():
    """vLLM takes the tokens back with the step's result, and computes them again."""
    made = half()
    asked, _ = begin(made, "a", [*range(14)], 0, [5, 6, 7, 8])
    step(made, {"a": 1}, cached=[("a", 14, None)])  # Under way already.
    asked.num_computed_tokens = TOKENS
    made.outcomes(Outcomes([], 1))
    made.outcomes(Outcomes([], 2))
    plan = step(made, {"a": 10}, cached=[("a", TOKENS, None)])
    assert [op.blocks for op in plan.stores] == [[5]]
    asked.num_computed_tokens = 14
    made.outcomes(Outcomes([], 3))
    assert [op.blocks for op in step(made).stores] == [[6, 7]]


def test_tokens_that_were_proposed_and_rejected_are_stored_when_others_have_come():
    made = half()
    asked, _ = begin(made, "a", [*range(7)], 0, [5, 6])
    asked.num_computed_tokens = 7
    made.outcomes(Outcomes([], 1))
    assert [op.blocks for op in step(made).stores] == [[5]]
    asked.all_token_ids, asked.num_tokens = [*range(8)], 8
    step(made, {"a": 3}, cached=[("a", 7, [7])])  # One token, and two that a drafting model proposed.
    asked.num_computed_tokens = 8  # Both were rejected.
    made.outcomes(Outcomes([], 3))
    assert not step(made).stores
    asked.all_token_ids, asked.num_tokens = [*range(9)], 9
    step(made, {"a": 1}, cached=[("a", 8, None)])
    asked.num_computed_tokens = 9
    made.outcomes(Outcomes([], 5))
    assert [op.blocks for op in step(made).stores] == [[6]]


def finish(made, name, tokens, blocks):
    """Compute a request, and have vLLM finish it and free its blocks."""
    asked, _ = begin(made, name, tokens, 0, blocks)
    made.finished(asked)
    made.outcomes(Outcomes([], made.ledger.steps.number))


def test_what_a_finished_request_has_left_waits_for_the_next_ones_step_to_be_under_way():
    made = half()
    finish(made, "a", PROMPT, [5, 6, 7])
    assert not step(made).stores
    asked, plan = begin(made, "b", [*range(50, 60)], 0, [1, 2, 3])
    assert not plan.stores
    pass_time()
    assert [op.blocks for op in step(made).stores] == [[5, 6]]
    made.finished(asked)
    made.outcomes(Outcomes([], 3))
    pass_time()
    assert [op.blocks for op in step(made).stores] == [[1, 2]]
    assert not step(made).stores


@pytest.mark.parametrize("blocks", [[6, 10, 11], [10, 6, 11], [10, 11, 6]])
def test_what_a_finished_request_has_left_is_stored_with_the_load_that_takes_its_blocks(blocks):
    made = idle(joins=False)
    finish(made, "a", [*range(50, 60)], [5, 6, 7])
    assert load(made, "b", blocks)
    plan = step(made)
    assert [op.blocks for op in plan.stores] == [[5, 6]]
    assert [op.blocks for op in plan.loads] == [blocks[:2]]


def test_a_finished_request_with_nothing_to_store_keeps_no_engine_stepping():
    made = half()
    finish(made, "a", [*range(TOKENS)], [5])
    assert not made.busy()
    finish(made, "b", PROMPT, [5, 6, 7])
    assert made.busy()
    made.reset()
    assert not made.busy()


def test_what_a_preempted_request_computed_is_stored_with_the_step_that_takes_its_blocks():
    made = half()
    begin(made, "a", [*range(10)], 0, [5, 6, 7])
    made.outcomes(Outcomes([], 1))
    assert [op.blocks for op in step(made, preempted=["a"]).stores] == [[5, 6]]


def test_what_a_finished_request_computed_is_stored_before_a_running_one_gets_its_blocks():
    made = half()
    begin(made, "a", [*range(7)], 0, [1, 2])
    made.outcomes(Outcomes([], 1))
    finish(made, "b", [*range(50, 60)], [5, 6, 7])
    step(made)
    plan = step(made, {"a": 1}, cached=[("a", 8, [6])])  # vLLM says so in the step alone.
    assert [op.blocks for op in plan.stores] == [[5, 6]]
    assert plan.overwrites == [6]


def test_a_step_says_of_which_outcomes_the_leader_has_heard():
    made = half()
    assert step_plan(made).acked_step == 0
    begin(made, "a", [*range(10)], 0, [5, 6, 7])
    made.outcomes(Outcomes([], 2))
    assert step_plan(made).acked_step == 2
    assert step_plan(made).acked_step == 2


def test_what_is_left_to_store_of_a_finished_request_keeps_the_engine_stepping():
    made = half()
    asked, _ = begin(made, "a", [*range(10)], 0, [5, 6, 7])
    made.finished(asked)
    made.outcomes(Outcomes([], 1))
    assert made.busy()
    assert not step(made).stores
    assert made.busy()
    pass_time()
    end(made, step(made))
    assert not made.busy()


def test_a_lost_outcome_does_not_keep_the_engine_stepping_for_ever():
    made = half()
    asked, _ = begin(made, "a", [*range(10)], 0, [5, 6, 7])
    made.finished(asked)
    stores = []
    for _ in range(70):
        pass_time()
        stores += step(made).stores
    assert not stores
    assert not made.busy()


def test_a_request_that_is_not_cached_is_not_delayed_by_a_load():
    made = idle()
    other = request("other", [*range(50, 60)], resumable=True)
    made.match(other, 0)
    made.allocated(other, ([1, 2, 3],), 0)
    step(made, {"other": 10}, new=[("other", 0, [1, 2, 3])])
    made.outcomes(Outcomes([], made.ledger.steps.number))
    assert load(made, "a", [5, 6, 7])  # In a later step: this one is the other's, too.


def a_step_that_writes(made):
    begin(made, "b", [*range(50, 60)], 0, [1, 2, 3])


def a_load(made):
    assert load(made, "b", [1, 2, 3])
    step(made)


@pytest.mark.parametrize("writes", [a_step_that_writes, a_load])
def test_what_ended_before_the_last_step_that_writes_is_stored_beside_it(writes):
    """And not after it: by then the accelerator would be through with the step."""
    made = idle(joins=False)
    finish(made, "a", [*range(70, 80)], [5, 6, 7])
    writes(made)
    pass_time()
    plan = step(made)
    assert [op.blocks for op in plan.stores] == [[5, 6]]
    assert plan.blocks_final


def nothing(made):
    pass


def a_step_that_writes_into_blocks_given_before(made):
    step(made, {"other": 1}, cached=[("other", 10, None)])


def a_step_that_is_stored_with_it(made):
    a_step_that_writes(made)
    for number in range(made.ledger.steps.number):
        made.outcomes(Outcomes([], number + 1))


@pytest.mark.parametrize(
    "since", [nothing, a_step_that_writes_into_blocks_given_before, a_step_that_is_stored_with_it]
)
def test_what_nothing_was_written_since_is_stored_after_all_that_runs(since):
    made = half()
    begin(made, "other", [*range(30, 40)], 0, [8, 9, 10])
    finish(made, "a", [*range(70, 80)], [5, 6, 7])
    since(made)
    pass_time()
    plan = step(made)
    assert any({5, 6} <= {*op.blocks} for op in plan.stores)
    assert not plan.blocks_final


@pytest.mark.parametrize("end", ["scheduled", "finished"])
def test_what_has_loaded_and_does_not_run_counts_as_what_loads(end):
    """It cannot be preempted either: with all blocks parked nobody could go on."""
    made = idle(joins=False, most_loads=4)
    assert load(made, "a", [5, 6, 7])
    plan = step(made)
    other = request("b", PROMPT)
    assert made.match(other, 0) == (None, False)
    made.outcomes(Outcomes([Report(op.op, 0) for op in plan.loads]))
    assert made.session.planner.loading_blocks == 0
    assert made.match(other, 0) == (None, False)
    if end == "scheduled":
        step(made, {"a": 2}, new=[("a", 2 * TOKENS, [5, 6, 7])])
    else:
        made.finished(request("a", []))
    assert made.match(other, 0) == (2 * TOKENS, True)


# Requests that wait are asked for in every step.


def remote(*keys):
    """A tier that cannot list its blocks, and of which nothing is known."""
    return TierStatus(
        "remote",
        Capabilities(capacity_bytes=None, shared=True, remote_lookup=True),
        [(key, 1) for key in keys],
    )


def counted(made, monkeypatch):
    """Count how often tiers are looked through for a prefix."""
    times, match = [], made.session.planner.match
    monkeypatch.setattr(made.session.planner, "match", lambda *args: times.append(1) or match(*args))
    return times


def test_a_request_that_finds_no_room_is_looked_for_once(monkeypatch):
    made = idle()
    times, asked = counted(made, monkeypatch), request("a", PROMPT)
    assert [made.match(asked, 0) for _ in range(9)] == [(2 * TOKENS, False)] * 9
    assert len(times) == 1


def test_a_request_that_waits_for_others_to_run_is_looked_for_once(monkeypatch):
    made = idle(joins=False, most_loads=3)
    assert load(made, "a", [5, 6, 7])
    times, asked = counted(made, monkeypatch), request("b", PROMPT)
    assert [made.match(asked, 0) for _ in range(9)] == [(None, False)] * 9
    assert len(times) == 1
    step(made, {"a": 2}, new=[("a", 2 * TOKENS, [5, 6, 7])])
    made.outcomes(Outcomes([Report(1, 0)], 1))
    assert made.match(asked, 0) == (2 * TOKENS, True)


def test_a_request_need_not_wait_for_room_when_nothing_is_left_to_load():
    made = idle(joins=False, most_loads=3)
    assert load(made, "a", [5, 6, 7])
    asked = request("b", PROMPT)
    assert made.match(asked, 0) == (None, False)
    made.session.planner.reset()
    assert made.match(asked, 0) == (0, False)


def test_a_request_that_waits_for_an_answer_is_looked_for_when_it_has_come(monkeypatch):
    made = half(remote())
    asked = request("a", PROMPT)
    times = counted(made, monkeypatch)
    assert [made.match(asked, 0) for _ in range(9)] == [(None, False)] * 9
    assert len(times) == 1
    [op] = step(made).lookups
    assert made.match(asked, 0) == (None, False)
    made.outcomes(Outcomes([Report(op.op, 0)], 1))
    assert made.match(asked, 0) == (2 * TOKENS, True)
    assert len(times) == 2


def test_what_a_remote_tier_had_not_is_asked_for_again_when_that_is_due(monkeypatch):
    made = half(remote())
    asked = request("a", PROMPT)
    assert made.match(asked, 0) == (None, False)
    [op] = step(made).lookups
    missing = {at: Reason.MISSING for at in range(len(op.keys))}
    made.outcomes(Outcomes([Report(op.op, 0, missing)], 1))
    times = counted(made, monkeypatch)
    assert [made.match(asked, 0) for _ in range(9)] == [(0, False)] * 9
    assert len(times) == 1
    CLOCK.ahead_s += 6
    assert made.match(asked, 0) == (None, False)


@pytest.mark.parametrize("change", ["evicted", "stored", "failing"])
def test_a_finding_is_remembered_until_another_one_would_be_made(change):
    made = idle(("cpu", 1 if change == "stored" else 2), joins=False)
    keys, planner, asked = keys_of(PROMPT), made.session.planner, request("a", PROMPT)
    assert made.match(asked, 0) == ((TOKENS if change == "stored" else 2 * TOKENS), True)
    if change == "evicted":
        planner.tiers[0].drop(keys[1])
    elif change == "stored":
        planner.store(keys[1:], [3], keys, 0.0)
        end(made, step(made))
    else:
        for _ in range(3):
            planner._tiers[0].breaker.note(Op.STORE, Reason.ERROR, time.monotonic())
    assert made.match(asked, 0)[0] == {"evicted": TOKENS, "stored": 2 * TOKENS, "failing": 0}[change]


def test_a_step_ends_for_a_thousand_requests_at_once_in_one_look_at_what_has_ended(monkeypatch):
    made = half()
    asked = [begin(made, str(at), [at, *range(9)], 0, [5])[0] for at in range(3)]
    looks = []
    monkeypatch.setattr(RequestState, "is_to_offer", lambda state, tokens: looks.append(state) or True)
    for each in asked:
        made.finished(each)
    assert len(looks) == 3


# Who writes into a block.


def test_blocks_that_another_connector_may_load_into_are_stored_before():
    """Of MultiConnector's children each hears of all blocks, and only one of how much it shall load."""
    made = half()
    finish(made, "a", PROMPT, [5, 6, 7])
    other = request("b", [*range(50, 62)])
    made.match(other, 0)
    made.allocated(other, ([7, 6, 5],), 0)
    plan = step(made)  # It waits for its load.
    assert [op.blocks for op in plan.stores] == [[5, 6]]
    assert sorted(plan.overwrites) == sorted(plan.unordered) == [5, 6, 7]
    end(made, plan)
    # When it is scheduled vLLM names the blocks once more, with one for the rest.
    made.allocated(other, ([7, 6, 5, 9],), 0)
    plan = step(made, {"b": 1}, new=[("b", 11, [7, 6, 5, 9])])
    assert (plan.overwrites, plan.unordered) == ([5, 9], [])


def test_what_vllms_own_cache_has_is_not_overwritten_when_it_is_given_again():
    made = half()
    finish(made, "a", PROMPT, [5, 6, 7])
    again = request("b", [*PROMPT, *range(90, 95)])
    made.match(again, 2 * TOKENS)
    made.allocated(again, ([5, 6, 8, 9],), 0)
    plan = step(made, {"b": 7}, new=[("b", 2 * TOKENS, [5, 6, 8, 9])])
    assert plan.overwrites == [8, 9]
    assert not plan.stores


# Resets.


def test_a_request_that_waits_loads_nothing_of_before_a_reset():
    made = half(remote())
    asked = request("a", PROMPT)
    before = made.ledger.state(asked).keys.slice(0, 2)
    assert made.match(asked, 0) == (None, False)
    [op] = step(made).lookups
    assert made.reset()
    made.outcomes(Outcomes([Report(op.op, 0)], 1))
    assert made.match(asked, 0) == (None, False)
    [op] = step(made).lookups
    assert not set(before).intersection(op.keys)
    assert made.session.planner.occupancy == {"remote": 0}


def test_a_request_that_ran_at_a_reset_is_stored_again_when_it_began_anew():
    made = half()
    asked, _ = begin(made, "a", PROMPT, 0, [5, 6, 7])
    before = made.ledger.state(asked).keys.slice(0, 2)
    assert made.reset()
    made.outcomes(Outcomes([], 1))
    assert not step(made, preempted=["a"]).stores
    made.match(asked, 0)
    made.allocated(asked, ([8, 9, 10],), 0)
    step(made, {"a": 10}, cached=[("a", 0, [8, 9, 10])], resumed=["a"])
    made.outcomes(Outcomes([], 3))
    [op] = step(made).stores
    assert op.blocks == [8, 9]
    assert not set(before).intersection(op.keys)


def test_a_reset_is_refused_while_something_of_before_is_loaded_and_does_not_run_yet():
    made = idle(joins=False)
    load(made, "a", [5, 6, 7])
    plan = step(made)
    assert not made.reset()
    made.outcomes(Outcomes([Report(op.op, op.tier) for op in plan.loads], 1))
    assert made.session.planner.loading_blocks == 0
    assert not made.reset()
    step(made, {"a": 2}, new=[("a", 2 * TOKENS, [5, 6, 7])])
    assert made.reset()


@pytest.mark.parametrize("between", ["reset", "evicted", "nothing"])
def test_what_vllm_was_promised_and_is_gone_when_it_gives_the_blocks_is_computed(between):
    """vLLM 0.33 may give the blocks for a load in a later step than the one it asked in."""
    made = idle(joins=False)
    asked = request("a", PROMPT)
    assert made.match(asked, 0) == (2 * TOKENS, True)
    keys = made.ledger.state(asked).keys.slice(0, 2)
    step(made)
    if between == "reset":
        assert made.reset()
    elif between == "evicted":
        made.session.planner.tiers[0].drop(keys[1])
    made.allocated(asked, ([5, 6, 7],), 2 * TOKENS)
    plan = step(made)
    gone = {"reset": [5, 6], "evicted": [6], "nothing": []}[between]
    assert sorted(block for op in plan.loads for block in op.blocks) == [5, 6]
    reports = []
    for op in plan.loads:
        failures = {at: Reason.MISSING for at, block in enumerate(op.blocks) if block in gone}
        reports.append(Report(op.op, op.tier, failures))
    made.outcomes(Outcomes(reports, made.ledger.steps.number))
    assert made.session.planner.loading_blocks == 0
    assert not made.session.planner._in_flight
    assert repr(made.session.planner._tiers[0].index).endswith("0 pinned, 0 filling, 0 leaving>")


def test_a_request_of_which_nothing_is_found_does_not_wait_for_room():
    made = idle(joins=False, most_loads=1)
    assert load(made, "a", [5, 6, 7])
    assert made.match(request("b", [*range(50, 60)]), 0) == (0, False)


@pytest.mark.parametrize("found", [0, 2])
def test_before_031_a_request_that_finds_no_room_beside_parked_ones_does_not_stop_the_queue(
    monkeypatch, found
):
    """vLLM looked at nobody behind it, and who had loaded could stand there for ever."""
    monkeypatch.setattr(_scheduler, "vllm", SimpleNamespace(__version__="0.30.1"))
    made = idle(joins=False)
    assert load(made, "a", [5, 6, 7])
    plan = step(made)
    large = request("large", [*PROMPT[: found * TOKENS], *range(100, 100 + 62 * TOKENS)])
    small = request("small", PROMPT)
    assert made.match(large, 0) == (None, False)
    assert made.match(small, 0) == (None, False), "or the large one would wait for ever"
    made.outcomes(Outcomes([Report(op.op, 0) for op in plan.loads], 1))
    step(made, {"a": 2}, new=[("a", 2 * TOKENS, [5, 6, 7])])
    assert made.match(large, 0) == ((2 * TOKENS, True) if found else (0, False))
    assert made.match(small, 0) == (2 * TOKENS, True)
    monkeypatch.setattr(_scheduler, "vllm", SimpleNamespace(__version__="0.31.0"))
    made = idle(joins=False)
    assert load(made, "b", [1, 2, 3])
    assert made.match(large, 0)[0] is not None


def test_two_queues_came_with_vllm_031():
    assert [has_one_queue(each) for each in ("0.26.0", "0.30.2", "0.31.0", "0.33.1rc1", "1.0")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_blocks_of_a_request_that_was_aborted_while_it_loads_are_parked_until_that_has_ended():
    made = idle(joins=False, most_loads=4)
    assert load(made, "a", [5, 6, 7])
    plan = step(made)
    made.finished(request("a", []))
    assert made.match(request("b", PROMPT), 0) == (None, False)
    assert not made.reset()
    made.outcomes(Outcomes([Report(op.op, 0) for op in plan.loads], 1))
    assert not made.ledger.parked
    assert made.reset()


def test_a_block_in_a_tier_that_is_left_alone_does_not_make_a_finding_untrue(monkeypatch):
    made = idle(("cpu", 1), ("disk", 2), joins=False)
    for _ in range(3):
        made.session.planner._tiers[1].breaker.note(Op.STORE, Reason.ERROR, time.monotonic())
    times, asked = counted(made, monkeypatch), request("a", PROMPT)
    assert [made.match(asked, 0) for _ in range(5)] == [(TOKENS, True)] * 5
    assert len(times) == 1


# The log of hashes.


def open_log(path, *others, replica=None):
    groups = [KvGroup(16), *others]
    config = load_config({"tiers": [{"backend": "cpu", "capacity": "1MiB"}], "record": str(path)})
    ranks = [
        Handshake(rank, [TierStatus("cpu", CPU, [], (1,) * len(groups), (32,) * len(groups))], {})
        for rank in range(2)
    ]
    ledger = Ledger(lambda _: None, groups, Parked(8, one_queue=False))
    return open_recorder(ranks, config, ledger, replica)


def test_a_log_counts_all_ranks_bytes_and_is_each_replicas_own(tmp_path):
    for replica, name in ((None, "log"), (3, "log.dp3")):
        open_log(tmp_path / "log", replica=replica).close()
        header = json.loads((tmp_path / name).read_text())
        assert (header["block_tokens"], header["token_bytes"]) == (16, 2 * 32 // 16)


HINTS = {"kvbm": {"no_store": True, "keep": -1}}


def answered(made, **params):
    """Give what vLLM is told of a request that comes and ends."""
    asked = request("asks", PROMPT, **params)
    made.arrived(asked)
    made.match(asked, 0)
    return made.finished(asked)


def test_a_requests_hints_are_answered_where_there_are_any():
    assert answered(half()) is None
    assert answered(half(), kv_transfer_params={"do_remote_decode": True}) is None
    told = answered(half(), kv_transfer_params=HINTS)
    assert {hint: each["answer"] for hint, each in told["kvbm"].items()} == {
        "no_store": "accepted", "keep": "refused",
    }  # fmt: skip


def test_hints_that_come_before_the_tiers_are_open_are_refused():
    told = answered(bare(), kv_transfer_params=HINTS)
    refused = {"answer": "refused", "reason": "the tiers were not open when the request came"}
    assert told == {"kvbm": {"no_store": refused, "keep": refused}}


@pytest.mark.parametrize(
    ("version", "others", "may"),
    [("0.26.0", {}, True), ("0.31.0", {"do_remote_decode": True}, False), ("0.32.0", {"x": 1}, True)],
)
def test_before_032_nothing_is_answered_where_another_connector_may_answer_too(
    monkeypatch, version, others, may
):
    monkeypatch.setattr(_scheduler.vllm, "__version__", version)
    told = answered(half(), kv_transfer_params=HINTS | others)
    assert (told is not None) == may
