"""The workers' handshake comes once, twice, late or in parts; and so do other calls of vLLM's."""

import copy
import time
import urllib.request
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from engines import ANSWER_TOKENS, connector, drain, forget, generate, loaded, make_prompts
from prometheus import free_port

from kvbm_core import (
    Capabilities,
    CoordinatorError,
    DeviceTraits,
    KvbmError,
    Planner,
    Report,
    TierStatus,
    load_config,
)
from kvbm_core.plan import Load, Lookup, Plan, Store
from kvbm_engine import Step
from kvbm_vllm._scheduler import SchedulerHalf
from kvbm_vllm._startup import RollCall
from kvbm_vllm._values import Handshake, Outcomes, StepPlan
from kvbm_vllm._worker import Opened, WorkerHalf

CPU = {"backend": "cpu", "capacity": "64MiB"}
KEYS = [bytes([number]) * 32 for number in range(1, 9)]


class FullAttentionSpec:
    block_size = 4


CACHE = SimpleNamespace(
    num_blocks=64, kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec())],
    needs_kv_cache_zeroing=False,
)  # fmt: skip


def engine(world_size=1):
    """vLLM's configuration, as far as it is asked for."""
    parallel = SimpleNamespace(world_size=world_size, rank=0, tensor_parallel_size=1)
    model = SimpleNamespace(
        use_mla=False, served_model_name="m", is_hybrid=False, is_attention_free=False,
        is_prefix_caching_supported=True, hf_text_config=SimpleNamespace(),
    )  # fmt: skip
    return SimpleNamespace(
        model_config=model, parallel_config=parallel, cache_config=SimpleNamespace(),
        observability_config=SimpleNamespace(otlp_traces_endpoint=None),
    )  # fmt: skip


def leader(world_size=1):
    return SchedulerHalf(load_config({"tiers": [CPU]}), engine(world_size), CACHE)


def said(rank=0, incarnation="a", found=(), **other):
    status = TierStatus("cpu", Capabilities(capacity_bytes=64, addressable=True), [(key, 1) for key in found])
    return Handshake(rank, [status], {}, incarnation=incarnation, **other)


def empty_step():
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[], new_block_ids=[], resumed_req_ids=set())
    return SimpleNamespace(
        scheduled_new_reqs=[], scheduled_cached_reqs=cached, num_scheduled_tokens={},
        total_num_scheduled_tokens=0, preempted_req_ids=set(),
    )  # fmt: skip


def request(name="r", tokens=range(10)):
    return SimpleNamespace(
        request_id=name, all_token_ids=[*tokens], num_tokens=len(tokens), lora_request=None, cache_salt=None,
        mm_features=(), prompt_embeds=None, skip_reading_prefix_cache=False, num_computed_tokens=1 << 30,
        kv_transfer_params=None, max_tokens=16,
    )  # fmt: skip


# The leader.


def test_a_leader_asks_until_it_has_heard_of_every_rank_and_matches_nothing_before():
    made = leader(world_size=2)
    made.start([])  # What vLLM brings beside other connectors: nothing of ours.
    assert made.asks()
    assert made.match(request(), 0) == (0, False)
    assert not made.step(empty_step()).plan
    made.outcomes(Outcomes([], handshakes=[said(1)]))
    assert made.asks()
    made.outcomes(Outcomes([], handshakes=[said(1), said(0)]))
    assert not made.asks()
    assert list(made.counts) == ["cpu"]


def test_an_idle_engine_steps_for_an_answer_but_not_for_ever():
    made = leader()
    steps = 0
    while made.busy() and steps < 1000:
        made.asks()
        steps += 1
    assert 2 <= steps < 1000
    assert made.asks()
    made.outcomes(Outcomes([], handshakes=[said()]))
    assert not made.busy()


def test_ranks_that_differ_are_named_wherever_the_handshake_comes_from():
    other = said(1)
    other.facts = {"configuration.load_deadline_s": "3.0"}
    for bring in (
        lambda made: made.start([said(0), other]),
        lambda made: made.outcomes(
            Outcomes([], handshakes=[said(0)]).aggregate(Outcomes([], handshakes=[other]))
        ),
    ):
        with pytest.raises(
            KvbmError, match=r"rank 1 differs from rank 0: configuration.load_deadline_s is 3.0"
        ):
            bring(leader(world_size=2))


def test_the_same_handshake_again_is_the_same_engine(monkeypatch):
    joined = []
    monkeypatch.setattr("kvbm_vllm._scheduler.join_as_leader", lambda *_: joined.append(1))
    made = leader()
    made.start([said()])
    session = made.session
    made.start([said()])
    made.outcomes(Outcomes([], handshakes=[said()]))
    assert (made.session, len(joined)) == (session, 1)


def test_workers_that_opened_their_tiers_anew_are_planned_for_anew():
    made = leader()
    made.start([said(found=KEYS[:2])])
    made.session.planner.load("r", KEYS[:2], [1, 2], [0, 0])
    [late] = made.session.planner.take(0.0).loads
    state = made.ledger.state(request())
    state.blocks = [[5, 6, 7]]
    made.outcomes(Outcomes([], handshakes=[said(incarnation="b", found=KEYS[2:4])]))
    assert made.session.planner.occupancy == {"cpu": 2}
    assert not state.may_store  # What it has computed may have gone.
    made.session.planner.load("r", KEYS[2:4], [1, 2], [0, 0])
    [load] = made.session.planner.take(0.0).loads
    assert load.op > late.op
    made.outcomes(Outcomes([Report(late.op, 0)], step=7))
    assert made.session.planner.loading_blocks == 2
    made.outcomes(Outcomes([Report(load.op, 0)], step=8))
    assert made.session.planner.loading_blocks == 0


def test_only_some_ranks_anew_ends_storing_and_loading_and_not_the_engine(caplog):
    made = leader(world_size=2)
    made.start([said(0), said(1)])
    made.start([said(0), said(1, incarnation="b")])
    assert "ranks [1] have opened their tiers anew, and ranks [0] have not" in caplog.text
    assert made.match(request(), 0) == (0, False)
    assert not made.busy()
    assert not made.asks()


def test_an_engine_that_serves_is_not_ended_by_its_coordinator_when_its_workers_come_anew(
    monkeypatch, caplog
):
    made = leader()
    made.start([said()])

    def refuse(*_):
        raise CoordinatorError("not there", operation="join")

    monkeypatch.setattr("kvbm_vllm._scheduler.join_as_leader", refuse)
    made.start([said(incarnation="b")])
    assert "nothing is loaded or stored until this engine is started again" in caplog.text
    assert made.counts == {}


def test_a_start_that_fails_leaves_nothing_behind(monkeypatch):
    closed = []
    server = SimpleNamespace(url="http://here:6880/metrics", close=lambda: closed.append("server"))
    coordinator = SimpleNamespace(close=lambda: closed.append("coordinator"))

    def join(config, vllm_config, metrics):
        assert metrics == server.url
        return coordinator

    def refuse(*_):
        raise KvbmError("the file cannot be written", operation="open")

    monkeypatch.setattr("kvbm_vllm._scheduler.open_server", lambda _: server)
    monkeypatch.setattr("kvbm_vllm._scheduler.join_as_leader", join)
    monkeypatch.setattr("kvbm_vllm._scheduler.open_recorder", refuse)
    with pytest.raises(KvbmError, match="cannot be written"):
        leader().start([said()])
    assert closed == ["coordinator", "server"]


def test_calls_before_the_handshake_after_the_end_and_twice_do_nothing():
    made = leader()
    made.outcomes(None)
    made.outcomes(Outcomes([Report(9, 0)]))
    assert made.reset()
    made.finished(request("unknown"))
    made.allocated(request(), ([1, 2, 3],), 0)
    made.finished(request())
    made.finished(request())
    assert made.take_stats() is None
    made.start([said()])
    made.outcomes(Outcomes([Report(9, 0), Report(9, 3)]))
    made.finished(request())
    made.close()
    made.close()
    made.outcomes(Outcomes([Report(9, 0)]))
    assert made.step(empty_step()).plan.overwrites == [1, 2, 3]
    assert not made.step(empty_step()).plan


def test_what_another_connector_did_not_load_in_a_step_is_not_stored(monkeypatch):
    made = leader()
    made.start([said()])
    running, ended, loading = (made.ledger.state(request(name)) for name in ("a", "b", "c"))
    for state, blocks in ((running, [1, 2, 3]), (ended, [4, 5, 6]), (loading, [2, 8, 9])):
        state.blocks = [blocks]
    running.computed_tokens = ended.computed_tokens = 9
    made.finished(ended.request)
    made.lost({2, 5})
    # What is not scheduled yet is computed from where vLLM goes back to.
    assert (running.may_store, ended.may_store, loading.may_store) == (False, False, True)
    made.lost(set())
    # The time has passed for which the last blocks of finished requests wait.
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 1)
    monkeypatch.setattr("kvbm_vllm._scheduler.time", later)
    assert made.step(empty_step()).plan.stores == []


def test_blocks_that_load_when_the_workers_come_anew_are_parked_no_longer():
    """Of one that was aborted nobody would ever hear: it would hold up all others."""
    made = leader()
    made.start([said()])
    made.ledger.parked.add("aborted", 3, loading_blocks=2)
    made.ledger.parked.forget("aborted")
    made.ledger.parked.add("waits", 4, loading_blocks=2)
    assert made.ledger.parked.blocks == 7
    made.start([said(incarnation="b")])
    assert made.ledger.parked.blocks == 4


def test_a_roll_call_knows_who_is_new():
    roll = RollCall(SimpleNamespace(world_size=2))
    assert roll.gather([said(0)]) == []
    assert [each.rank for each in roll.gather([said(1)])] == [0, 1]
    assert roll.admit([said(1), said(0)])
    assert not roll.admit([said(0), said(1)])
    assert roll.gather([said(0), said(1)]) == []  # An answer to a question that was asked twice.
    assert roll.gather([said(0, "b"), said(1)]) == []
    assert len(roll.gather([said(1, "b")])) == 2


def test_a_planner_ignores_reports_of_operations_that_it_does_not_know():
    planner = Planner([[TierStatus("cpu", Capabilities(8, addressable=True), [(KEYS[0], 1)])]])
    assert planner.report([Report(1, 0), Report(77, 0), Report(77, 5)], 0.0) == []
    planner.load("r", KEYS[:1], [1], [0])
    [load] = planner.take(0.0).loads
    assert planner.report([Report(load.op, 4)], 0.0) == []  # Not of a tier that it is about.
    assert [op for op, _ in planner.report([Report(load.op, 0), Report(load.op, 0)], 0.0)] == [load]


# A worker.


class Still:
    """Stands for a `Worker`: a test says what it reports."""

    def __init__(self):
        self.ended, self.at_close, self.plans, self.closed = [], [], [], 0

    def submit(self, plan):
        self.plans.append(plan)

    def wait(self, timeout_s):
        return False

    def reports(self):
        ended, self.ended = self.ended, []
        return ended

    def status(self):
        return []

    def close(self):
        self.closed += 1
        self.ended += self.at_close


def worker():
    """A worker's half with tiers open, of which the leader was told."""
    made = WorkerHalf(load_config({"tiers": [CPU]}), engine(), CACHE)
    made.attach(opened())
    made.handshake()
    return made


def opened():
    return Opened(Still(), SimpleNamespace(traits=DeviceTraits((4096,), 4)), {})


def loads(*ops):
    return Plan(loads=[Load(op, f"r{op}", 0, -1, KEYS[:2], [10 * op, 10 * op + 1]) for op in ops])


def test_a_worker_that_is_asked_answers_and_one_that_is_new_says_so_unasked():
    made = worker()
    made.begin(StepPlan())
    assert made.take_outcomes() is None
    made.begin(StepPlan(asks=True))
    assert len(made.take_outcomes().handshakes) == 1
    before = made.handshake().incarnation
    made.attach(opened())
    made.begin(StepPlan())
    assert made.take_outcomes().handshakes[0].incarnation != before
    made.begin(StepPlan())
    assert made.take_outcomes() is None
    made.attach(opened())
    made.handshake()  # vLLM brings it.
    made.begin(StepPlan())
    assert made.take_outcomes() is None


def test_a_worker_without_tiers_yet_does_nothing():
    made = WorkerHalf(load_config({"tiers": [CPU]}), engine(), CACHE)
    assert made.handshake() is None
    assert made.take_outcomes() is None
    assert (made.collect(), made.take_failed_blocks()) == (set(), set())
    made.begin(StepPlan(asks=True))
    made.begin(None)
    assert made.take_outcomes() is None
    made.close()


def test_at_the_end_every_load_under_way_fails_and_nobody_waits():
    made = worker()
    still = made.rank.worker
    made.begin(StepPlan(Step(loads(1, 2), 1)))
    still.at_close = [Report(1, 0)]
    made.close()
    made.close()
    assert still.closed == 1
    assert made.collect() == {"r1", "r2"}
    assert made.take_failed_blocks() == {20, 21}
    # And what is planned after it.
    made.begin(StepPlan(Step(loads(3), 2)))
    assert (made.collect(), made.take_failed_blocks()) == ({"r3"}, {30, 31})
    plan = Plan(stores=[Store(4, KEYS[:1], [1], [0])], lookups=[Lookup(5, 0, KEYS[:1])])
    made.begin(StepPlan(Step(plan, 3)))
    assert made.collect() == set()
    with pytest.raises(KvbmError, match="closed"):
        made.begin(StepPlan(Step(Plan(loads=[Load(6, "r6", 0, -1, KEYS[:1], [1], in_step=True)]), 4)))


# Real engines.


@pytest.fixture
def watched(start, monkeypatch):
    """Start an engine and keep the tensors that its worker was given."""
    from kvbm_vllm import KvbmConnector

    tensors = {}
    register = KvbmConnector.register_kv_caches

    def keep(self, kv_caches):
        tensors.update(kv_caches)
        register(self, kv_caches)

    monkeypatch.setattr(KvbmConnector, "register_kv_caches", keep)

    def begin(*args, **options):
        llm = start(*args, **options)
        llm.kvbm_tensors = tensors
        return llm

    return begin


def the_worker():
    """Give the worker's half of an engine in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def shake(llm):
    """Bring the handshake, as vLLM does."""
    answers = llm.llm_engine.engine_core.engine_core.model_executor.get_kv_connector_handshake_metadata()
    content = {rank: each for answer in answers if answer for rank, each in answer.items()}
    assert len(content) == 1
    connector(llm).set_xfer_handshake_metadata_pp_aware(copy.deepcopy(content))


def long_prompts(seed, count=4):
    return [prompt for prompt in make_prompts(40, seed=seed, longest=900) if len(prompt) > 200][:count]


def serve(llm, prompts, expected=None):
    """Answer from an empty prefix cache; every block comes from the tiers."""
    for at, prompt in enumerate(prompts):
        forget(llm)
        before = sum(loaded(llm).values())
        answer = generate(llm, [prompt])[0]
        assert expected is None or answer == expected[at]
        assert sum(loaded(llm).values()) - before == (len(prompt) - 1) // 32


def begin_to_load(llm, prompt):
    """Have a request wait for its load."""
    from vllm import SamplingParams

    forget(llm)
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request("waits", {"prompt_token_ids": prompt}, params)
    for _ in range(10):
        llm.llm_engine.step()
        if connector(llm)._leader.session.planner.loading_blocks:
            return
    raise AssertionError("it does not load")


def end_of(llm):
    """Give the answer of the only request."""
    for _ in range(3000):
        for output in llm.llm_engine.step():
            if output.finished:
                return tuple(output.outputs[0].token_ids)
    raise AssertionError("it has not ended")


@pytest.fixture
def hesitant(monkeypatch):
    """Have no load end before a test says so."""
    from kvbm_core import Worker

    hold = SimpleNamespace(on=False)
    reports = Worker.reports
    monkeypatch.setattr(Worker, "reports", lambda self: [] if hold.on else reports(self))
    return hold


@pytest.mark.engine
def test_a_second_handshake_of_a_running_engine_changes_nothing(
    llama, watched, tmp_path, monkeypatch, hesitant
):
    monkeypatch.setenv("DYN_KVBM_METRICS", "true")
    monkeypatch.setenv("DYN_KVBM_METRICS_PORT", str(free_port()))
    tiers = [CPU, {"backend": "lmdb", "capacity": "64MiB", "path": str(tmp_path / "lmdb")}]
    llm = watched(llama, tiers)
    prompts = long_prompts(seed=31)
    answers = [generate(llm, [prompt])[0] for prompt in prompts]
    serve(llm, prompts, answers)
    planner = connector(llm)._leader.session.planner
    shake(llm)
    the_worker().register_kv_caches(llm.kvbm_tensors)
    shake(llm)
    assert connector(llm)._leader.session.planner is planner
    serve(llm, prompts, answers)
    # With a load under way.
    hesitant.on = True
    begin_to_load(llm, prompts[0])
    shake(llm)
    hesitant.on = False
    assert end_of(llm) == answers[0]
    # What is new is stored, and found again.
    others = long_prompts(seed=32)
    cold = [generate(llm, [prompt])[0] for prompt in others]
    serve(llm, others, cold)
    assert connector(llm).counts["cpu"].failed == {}


@pytest.mark.engine
@pytest.mark.parametrize("brought", [True, False], ids=["brought", "with-the-outcomes"])
def test_a_worker_that_opens_its_tiers_anew_is_an_engine_anew(llama, watched, tmp_path, hesitant, brought):
    llm = watched(llama, [CPU, {"backend": "lmdb", "capacity": "64MiB", "path": str(tmp_path / "lmdb")}])
    prompts = long_prompts(seed=33)
    answers = [generate(llm, [prompt])[0] for prompt in prompts]
    serve(llm, prompts, answers)
    planner = connector(llm)._leader.session.planner
    # Its tiers are closed while a request loads.
    hesitant.on = True
    begin_to_load(llm, prompts[0])
    the_worker().shutdown()
    the_worker().register_kv_caches(llm.kvbm_tensors)
    if brought:
        shake(llm)
    hesitant.on = False
    assert end_of(llm) == answers[0]
    assert connector(llm)._leader.session.planner is not planner
    # From LMDB: the memory tier is empty.
    serve(llm, prompts[1:], answers[1:])
    assert connector(llm).counts["lmdb"].loaded > 0
    others = long_prompts(seed=34)
    cold = [generate(llm, [prompt])[0] for prompt in others]
    drain(llm)
    serve(llm, others, cold)


@pytest.mark.engine
def test_an_engine_that_is_woken_goes_on(llama, start, monkeypatch, hesitant):
    from vllm.v1.engine.core import EngineCore

    if not hasattr(EngineCore, "_set_kv_connector_handshake_metadata"):
        pytest.skip("this version of vLLM brings the handshake once: 0.33 does so again with each wake_up()")
    port = free_port()
    monkeypatch.setenv("DYN_KVBM_METRICS", "true")
    monkeypatch.setenv("DYN_KVBM_METRICS_PORT", str(port))
    llm = start(llama, [CPU])
    prompts = long_prompts(seed=35)
    answers = [generate(llm, [prompt])[0] for prompt in prompts]
    serve(llm, prompts, answers)
    llm.wake_up()  # It did not sleep.
    serve(llm, prompts, answers)
    llm.sleep(level=0)
    llm.wake_up()
    serve(llm, prompts, answers)
    hesitant.on = True
    begin_to_load(llm, prompts[0])
    llm.wake_up()
    hesitant.on = False
    assert end_of(llm) == answers[0]
    others = long_prompts(seed=36)
    cold = [generate(llm, [prompt])[0] for prompt in others]
    serve(llm, others, cold)
    llm.sleep(level=1)  # It forgets every block.
    llm.wake_up()
    forget(llm)
    before = loaded(llm)
    assert generate(llm, [prompts[0]])[0] == answers[0]
    assert loaded(llm) == before
    serve(llm, prompts[:1], answers[:1])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        assert b"kvbm_loaded_blocks" in page.read()
