"""Whatever a tier does, a request completes with the right answer and the engine lives."""

import time
from types import SimpleNamespace

import pytest
from engines import connector, drain, forget, generate, keys_of, loaded, make_prompts

from kvbm_core import Op

pytestmark = pytest.mark.engine

PATIENCE_S = 300


def failures(llm, tier):
    counts = connector(llm).counts[tier].failed
    return {reason: n for (operation, reason), n in counts.items() if operation == "load"}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("error", "error"),
        ("hang", "deadline"),
        ("raise", "error"),
        ("block", "deadline"),
        ("lie", "corrupt"),
        ("flip", "corrupt"),
    ],
)
def test_a_tier_that_fails_costs_a_load_and_nothing_else(faulty, llama, start, fault, reason):
    prompts = [p for p in make_prompts(30, seed=11, longest=900) if len(p) > 100][:4]
    llm = start(llama, [{"backend": "faulty", "capacity": "64MiB"}], extra={"load_deadline_s": 0.5})
    answers = [generate(llm, [p])[0] for p in prompts]
    forget(llm)
    faulty.fault = lambda transfer: fault if transfer.op is Op.LOAD else None
    assert [generate(llm, [p])[0] for p in prompts] == answers
    assert failures(llm, "faulty")[reason] > 0
    assert loaded(llm)["faulty"] == 0

    faulty.fault = None
    fresh = make_prompts(1, seed=12, longest=300)[-1]
    answer = generate(llm, [fresh])[0]
    forget(llm)
    assert generate(llm, [fresh])[0] == answer


def test_what_loads_more_slowly_than_it_computes_is_computed_after_one_try(faulty, llama, start):
    """Each load takes a second, whatever it loads; so many tokens take a fraction of one to compute."""
    prompt = next(p for p in make_prompts(60, seed=17, longest=1900) if len(p) > 1500)
    llm = start(llama, [{"backend": "faulty", "capacity": "256MiB"}], extra={"only_faster": True})
    answer = generate(llm, [prompt])
    drain(llm)
    faulty.fault = lambda transfer: "late" if transfer.op is Op.LOAD else None
    forget(llm)
    assert generate(llm, [prompt]) == answer
    tried = loaded(llm)["faulty"]
    assert 0 < tried <= 16 < (len(prompt) - 1) // 32
    for _ in range(2):
        forget(llm)
        assert generate(llm, [prompt]) == answer
    counts = connector(llm).counts["faulty"]
    assert (counts.loaded, counts.failed.total()) == (tried, 0)
    assert counts.declined == 3 * ((len(prompt) - 1) // 32) - tried


def test_a_tier_with_a_slow_codec_is_computed_after_one_try_and_comes_back_when_it_is_fast(
    slow, llama, start, monkeypatch
):
    """Two threads decode four blocks a second; the engine computes a multiple of that."""
    from kvbm_vllm import _scheduler

    passed_s, true_s = [0.0], time.monotonic
    monkeypatch.setattr(_scheduler, "time", SimpleNamespace(monotonic=lambda: true_s() + passed_s[0]))
    prompt = next(p for p in make_prompts(60, seed=17, longest=1900) if len(p) > 1500)
    blocks = (len(prompt) - 1) // 32
    tier = {"backend": "memory", "capacity": "256MiB", "codecs": [{"name": "slow"}]}
    llm = start(llama, [tier], extra={"only_faster": True, "load_deadline_s": 60})
    answer = generate(llm, [prompt])

    def ask():
        """Give how many blocks were loaded; half a minute has passed."""
        forget(llm)
        passed_s[0] += 31
        before = loaded(llm)["memory"]
        assert generate(llm, [prompt]) == answer
        return loaded(llm)["memory"] - before

    slow.takes_s = 0.5
    assert 0 < ask() <= 16
    assert max(ask() for _ in range(3)) <= 1
    slow.takes_s = 0.0
    give_up_s = time.monotonic() + PATIENCE_S
    while ask() < blocks:
        assert time.monotonic() < give_up_s, connector(llm)._leader.session.planner.cost_model


def test_only_the_part_before_a_failed_block_is_used(faulty, llama, start):
    prompt = make_prompts(1, seed=13, longest=640)[-1]
    llm = start(llama, [{"backend": "faulty", "capacity": "64MiB"}])
    answer = generate(llm, [prompt])[0]
    forget(llm)
    seen = []

    def tenth_fails(transfer):
        seen.append(transfer)
        return "error" if transfer.op is Op.LOAD and len(seen) == 10 else None

    faulty.fault = tenth_fails
    assert generate(llm, [prompt])[0] == answer
    assert failures(llm, "faulty") == {"error": 1}


def test_an_inventory_that_lies_costs_a_load(faulty, llama, start):
    prompt = make_prompts(1, seed=14, longest=320)[-1]
    faulty.claims = keys_of(prompt, 9)
    answer = generate(start(llama, None), [prompt])[0]
    llm = start(llama, [{"backend": "faulty", "capacity": "64MiB"}])
    assert generate(llm, [prompt])[0] == answer
    assert failures(llm, "faulty") == {"missing": 9}


def test_stores_that_fail_are_counted_and_change_nothing(faulty, llama, start):
    prompt = make_prompts(1, seed=15, longest=320)[-1]
    faulty.fault = lambda transfer: "error" if transfer.op is Op.STORE else None
    llm = start(llama, [{"backend": "faulty", "capacity": "64MiB"}])
    answer = generate(llm, [prompt])[0]
    forget(llm)
    assert generate(llm, [prompt])[0] == answer
    assert loaded(llm)["faulty"] == 0
    assert connector(llm).counts["faulty"].failed["store", "error"] >= 9


def test_an_aborted_load_leaves_nothing_behind(faulty, llama, start):
    prompt = make_prompts(1, seed=16, longest=640)[-1]
    llm = start(llama, [{"backend": "faulty", "capacity": "64MiB"}])
    answer = generate(llm, [prompt])[0]
    forget(llm)
    faulty.fault = lambda transfer: "late" if transfer.op is Op.LOAD else None
    from vllm import SamplingParams

    engine = llm.llm_engine
    request_id = engine.add_request("gone", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=4))
    for _ in range(3):
        engine.step()
    engine.abort_request([request_id or "gone"])
    drain(llm)
    scheduler = engine.engine_core.engine_core.scheduler
    assert not scheduler.requests
    faulty.fault = None
    forget(llm)
    assert generate(llm, [prompt])[0] == answer


def test_reset_forgets_every_tier(llama, start, tmp_path):
    tiers = [{"backend": "cpu", "capacity": "64MiB"},
             {"backend": "lmdb", "capacity": "64MiB", "path": str(tmp_path / "lmdb")}]  # fmt: skip
    prompt = make_prompts(1, seed=17, longest=640)[-1]
    llm = start(llama, tiers)
    answer = generate(llm, [prompt])[0]
    drain(llm)
    assert llm.llm_engine.engine_core.engine_core.reset_prefix_cache(reset_connector=True)
    drain(llm)
    assert generate(llm, [prompt])[0] == answer
    assert loaded(llm) == {"cpu": 0, "lmdb": 0}
    assert connector(llm)._leader.session.planner.occupancy == {"cpu": 20, "lmdb": 20}
