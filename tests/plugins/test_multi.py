"""Beside other connectors, in vLLM's MultiConnector."""

import shutil

import pytest

pytest.importorskip("vllm")
import other_connector
from engines import BLOCK_TOKENS, connector, drain, forget, generate, loaded, make_prompts
from other_connector import OtherConnector

pytestmark = pytest.mark.engine


def child(name, extra, **settings):
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra, **settings}


def kvbm(*tiers):
    tiers = tiers or [{"backend": "cpu", "capacity": "64MiB"}]
    return child("KvbmConnector", {"tiers": list(tiers), "only_faster": False})


def multi(*children):
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both", kv_load_failure_policy="recompute",
        kv_connector_extra_config={"connectors": list(children)},
    )  # fmt: skip


def in_both_orders(*children):
    return [pytest.param(order, id="-".join(order)) for order in (children, children[::-1])]


@pytest.fixture(scope="module")
def cold(llama):
    """Prompts, and what an engine without any cache answers."""
    from engines import make_engine

    prompts = [prompt for prompt in make_prompts(40, seed=41, longest=900) if len(prompt) > 200][:4]
    llm = make_engine(llama, None, enable_prefix_caching=False)
    answers = [generate(llm, [prompt])[0] for prompt in prompts]
    llm.llm_engine.engine_core.shutdown()
    return list(zip(prompts, answers, strict=True))


def blocks_of(cold):
    return sum((len(prompt) - 1) // BLOCK_TOKENS for prompt, _ in cold)


def serve(llm, cold):
    """Answer each from an empty prefix cache, as without any cache. Gives the number of our blocks loaded."""
    before = sum(loaded(llm).values())
    for prompt, answer in cold:
        forget(llm)
        assert generate(llm, [prompt])[0] == answer
    drain(llm)
    return sum(loaded(llm).values()) - before


@pytest.fixture
def begin(llama, start, monkeypatch):
    """Start an engine with ours and the stand-in of `other_connector`, nested if that is asked for.

    Ours is given by the path of its module, as where vLLM's plug-ins are switched off.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    def begin(order, *, nested=False, **options):
        other_connector.begin()
        # A MultiConnector asks for its children's statistics by name, also where they are given by a path.
        monkeypatch.setitem(KVConnectorFactory._registry, "OtherConnector", lambda: OtherConnector)
        monkeypatch.delitem(KVConnectorFactory._registry, "KvbmConnector", raising=False)
        other = child("OtherConnector", {}, kv_connector_module_path="other_connector")
        children = {"kvbm": {**kvbm(), "kv_connector_module_path": "kvbm_vllm"}, "other": other}
        if nested:
            children["kvbm"] = child("MultiConnector", {"connectors": [children["kvbm"]]})
        transfer = multi(*(children[name] for name in order))
        return start(llama, None, kv_transfer_config=transfer, disable_log_stats=False, **options)

    return begin


@pytest.mark.parametrize("order", in_both_orders("kvbm", "other"))
def test_beside_a_connector_with_a_handshake_and_asynchronous_loads(begin, cold, order):
    # And where MultiConnector is a child of another one.
    llm = begin(order, nested=order[0] == "other")
    state = other_connector.state
    # It gets what it said, and nothing of ours.
    assert state.handshakes == [["OtherHandshake"]]
    assert connector(llm).counts == {}
    drain(llm)
    assert list(connector(llm).counts) == ["cpu"]
    assert serve(llm, cold) == state.loaded == 0
    # Both have everything; the first loads.
    blocks = blocks_of(cold)
    assert serve(llm, cold) == (blocks if order[0] == "kvbm" else 0)
    assert state.loaded == (0 if order[0] == "kvbm" else blocks)
    # Only one has something.
    kept, state.store = state.store, {}
    assert serve(llm, cold) == blocks
    state.store, state.loaded = kept, 0
    assert connector(llm).reset_cache()
    assert serve(llm, cold) == 0
    assert state.loaded == blocks
    # What the other one has loaded was stored by us, too.
    state.store = {}
    assert serve(llm, cold) == blocks
    assert connector(llm).counts["cpu"].failed == {}
    read = {metric.name for metric in llm.get_metrics()}
    assert "vllm:kvbm_saved_tokens" in read


@pytest.mark.parametrize("order", in_both_orders("kvbm", "other"))
def test_what_another_connector_failed_to_load_is_computed_and_stored_right(begin, cold, order):
    llm = begin(order)
    state = other_connector.state
    drain(llm)
    serve(llm, cold)
    assert connector(llm).reset_cache()
    state.fails = True
    assert serve(llm, cold) == 0
    assert state.loaded > 0
    state.store = {}
    assert serve(llm, cold) == blocks_of(cold)


def test_vllm_up_to_0_29_reads_statistics_as_if_they_had_been_sent():
    from kvbm_vllm._stats import KvbmStats

    assert KvbmStats(data={"asked_tokens": 4})["data"] == {"asked_tokens": 4}


@pytest.mark.ranks
def test_two_ranks_answer_when_they_are_asked(begin, monkeypatch):
    # Two workers and the scheduler share the machine; threads that spin would take all of it.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    llm = begin(["other", "kvbm"], tensor_parallel_size=2, max_model_len=2048)
    assert other_connector.state.handshakes == [["OtherHandshake", "OtherHandshake"]]
    drain(llm)
    prompts = [prompt for prompt in make_prompts(40, seed=42, longest=900) if len(prompt) > 200][:3]
    answers = [generate(llm, [prompt])[0] for prompt in prompts]
    # The stand-in keeps its copies in the workers, where its scheduler's half does not see them.
    assert serve(llm, list(zip(prompts, answers, strict=True))) == blocks_of(
        zip(prompts, answers, strict=True)
    )


@pytest.mark.parametrize("order", in_both_orders("kvbm", "example"))
def test_beside_a_connector_that_loads_synchronously(llama, start, tmp_path, cold, order):
    children = {"kvbm": kvbm(), "example": child("ExampleConnector", {"shared_storage_path": str(tmp_path)})}
    llm = start(llama, None, kv_transfer_config=multi(*(children[name] for name in order)))
    drain(llm)
    assert serve(llm, cold) == 0
    assert serve(llm, cold) == (blocks_of(cold) if order[0] == "kvbm" else 0)
    # What the other one has loaded was stored by us, too.
    assert connector(llm).reset_cache()
    serve(llm, cold)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    assert serve(llm, cold) == blocks_of(cold)
