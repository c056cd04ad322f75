"""What a worker tells vLLM and the leader of a step, and when it waits, over a worker that does nothing."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from kvbm_core import ConfigError, DeviceTraits, Reason, Report, load_config
from kvbm_core.plan import Load, Plan, Store
from kvbm_engine import Step
from kvbm_vllm._values import StepPlan
from kvbm_vllm._worker import Opened, WorkerHalf, layers_by_group

KEY = bytes(32)


class FullAttentionSpec:
    block_size = 4


class Still:
    """Stands for a `Worker`: a test says what it reports."""

    def __init__(self):
        self.plans, self.waits, self.ended = [], [], []

    def submit(self, plan):
        self.plans.append(plan)

    def wait(self, timeout_s):
        self.waits.append(timeout_s)
        return False

    def reports(self):
        ended, self.ended = self.ended, []
        return ended

    def status(self):
        return []


def half(**cache):
    one = {"num_blocks": 64, "kv_cache_groups": [SimpleNamespace(kv_cache_spec=FullAttentionSpec())]}
    made = WorkerHalf(
        load_config({"tiers": [{"backend": "cpu", "capacity": "1MiB"}]}),
        SimpleNamespace(
            model_config=None,
            parallel_config=SimpleNamespace(rank=0, world_size=1, tensor_parallel_size=1),
        ),
        SimpleNamespace(**(cache or one)),
    )
    made.attach(Opened(Still(), SimpleNamespace(traits=DeviceTraits((4096,), 4)), {}))
    made.handshake()  # vLLM brings it.
    return made


def step(made, number, *reports, plan=None, **said):
    """Run a step in which these reports come.

    Returns:
        The requests whose loads have ended, what the leader is told, and whether the step waited.
    """
    made.rank.worker.ended, made.rank.worker.waits = list(reports), []
    told = StepPlan(Step(plan or Plan(), number, **said))
    made.begin(told)
    made.begin(told)  # vLLM calls twice.
    return made.collect(), made.take_outcomes(), bool(made.rank.worker.waits)


def load(op, request, blocks, *, in_step=False):
    return Load(op, request, 0, -1, [KEY] * len(blocks), blocks, in_step)


def test_vllm_is_told_once_that_a_load_has_ended_and_never_of_one_that_its_step_waits_for():
    made = half()
    plan = Plan(loads=[load(1, "a", [1, 2], in_step=True), load(2, "b", [3]), load(3, "b", [4])])
    assert step(made, 1, plan=plan, computes=True)[0] == set()
    assert made.rank.worker.plans == [plan]
    ended, told, _ = step(made, 2, Report(1, 0), Report(2, 0))
    assert (ended, [report.op for report in told.reports]) == (set(), [1, 2])
    assert step(made, 3, Report(3, 0))[0] == {"b"}
    assert step(made, 4)[0] == set()


def test_only_blocks_that_vllm_waits_for_are_named_as_failed():
    made = half()
    plan = Plan(loads=[load(1, "a", [1, 2], in_step=True), load(2, "b", [3, 4])])
    failed = [Report(op, 0, {1: Reason.ERROR}) for op in (1, 2)]
    assert step(made, 1, *failed, plan=plan, computes=True)[0] == {"b"}
    assert made.take_failed_blocks() == {4}
    assert made.take_failed_blocks() == set()


def test_a_step_waits_for_progress_if_it_has_nothing_else_to_do():
    made = half()
    assert step(made, 1, idle=True) == (set(), None, True)
    assert step(made, 2) == (set(), None, False)
    assert not step(made, 3, computes=True)[2]
    step(made, 4, idle=True)
    while_nobody_loads = made.rank.worker.waits
    step(made, 5, plan=Plan(loads=[load(1, "a", [1, 2])]), idle=True)
    # The next request is not seen while it waits.
    assert 0 < while_nobody_loads[0] < made.rank.worker.waits[0] < 0.1


def test_a_step_does_not_wait_while_the_leader_has_yet_to_hear_what_came_last():
    made = half()
    _, told, waited = step(made, 7, Report(1, 0), idle=True)
    assert (told.step, told.reports, waited) == (7, [Report(1, 0)], True)
    # vLLM starts a step before it takes the outcomes of the last.
    assert not step(made, 8, idle=True, acked_step=6)[2]
    assert not step(made, 9, Report(2, 0), idle=True, acked_step=6)[2]
    assert not step(made, 10, idle=True, acked_step=7)[2]
    assert step(made, 11, idle=True, acked_step=9)[2]
    assert step(made, 12, idle=True, acked_step=9)[2]


def test_outcomes_without_a_report_are_nothing_to_be_heard():
    made = half()
    _, told, _ = step(made, 5, computes=True)
    assert (told.step, told.reports) == (5, [])
    assert step(made, 6, idle=True, acked_step=4)[2]


def test_a_plan_is_started_once_and_an_empty_one_not_at_all():
    made = half()
    plan = Plan(stores=[Store(1, [KEY], [3], [0])])
    step(made, 1, plan=plan)
    step(made, 2)
    assert made.rank.worker.plans == [plan]


def test_a_worker_that_cannot_load_what_a_step_needs_ends_the_step(monkeypatch):
    made = half()

    def submit(plan):
        raise RuntimeError("not there")

    monkeypatch.setattr(made.rank.worker, "submit", submit)
    with pytest.raises(RuntimeError, match="not there"):
        step(made, 1, plan=Plan(loads=[load(1, "a", [1], in_step=True)]), computes=True)


def test_beside_a_group_that_is_not_stored_a_load_fails_as_a_whole():
    """vLLM ends the engine where it is told of blocks, as soon as it has several groups."""
    groups = [SimpleNamespace(kv_cache_spec=FullAttentionSpec(), layer_names=[str(at)]) for at in range(2)]
    made = half(num_blocks=64, kv_cache_groups=groups, prefix_cacheable_group_ids=(0,))
    finished, _, _ = step(made, 1, plan=Plan(loads=[load(1, "a", [3])]))
    assert finished == set()
    finished, _, _ = step(made, 2, Report(1, 0, {0: Reason.MISSING}))
    assert (finished, made.take_failed_blocks(), made.take_failed_requests()) == ({"a"}, set(), {"a"})


class TestLayersByGroup:
    """Layer i of each group lies in tensor i, as vLLM lays out layers of one page size."""

    def given(self, *groups):
        return SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=names) for names in groups])

    def tensors(self):
        raw = torch.zeros(2, 4, 1, 2, 8)
        return {"full.0": raw[0], "window.0": raw[0], "full.1": raw[1], "window.1": raw[1]}

    def test_one_group_has_all_that_is_registered(self):
        tensors = self.tensors()
        assert layers_by_group(tensors, self.given(["full.0"]), [0]) == [tensors]

    def test_each_group_has_its_layers_in_the_order_in_which_they_are_registered(self):
        config = self.given(["window.1", "window.0"], ["full.0", "full.1"], [])
        assert [list(layers) for layers in layers_by_group(self.tensors(), config, range(3))] == [
            ["window.0", "window.1"], ["full.0", "full.1"], []
        ]  # fmt: skip

    def test_a_layer_that_uses_the_memory_of_another_needs_no_group(self):
        tensors = self.tensors() | {"reader": self.tensors()["full.0"]}
        config = self.given(["full.0", "full.1"], ["window.0", "window.1"])
        with pytest.raises(ConfigError, match="layer 'reader' is in none of the 2 KV groups"):
            layers_by_group(tensors, config, range(2))
        tensors["reader"] = tensors["full.1"]
        assert ["reader" in layers for layers in layers_by_group(tensors, config, range(2))] == [False, False]
