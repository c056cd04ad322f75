"""Movements between tiers under a real engine: right answers, and loads counted where they must be."""

import math
import time

import pytest
from engines import (
    assert_restored,
    connector,
    drain,
    forget,
    generate,
    make_prompts,
    own_answers,
    restore,
    story_tokens,
)

from kvbm_core import Op
from kvbm_core.leader import cost_model

pytestmark = pytest.mark.engine

PATIENCE_S = 120


def test_what_was_demoted_is_restored_with_the_same_answers(start, tmp_path):
    """Host memory holds few of the blocks; each is stored there alone, and on the disk when it must go."""
    model, tokens = story_tokens()
    places = ((0, 300), (50, 416), (99, 555), (300, 480), (20, 200))
    prompts = [tokens[at : at + length] for at, length in places]
    movement = {"stores": "demotion", "copies": "exclusive", "low_watermark": 0.5, "high_watermark": 0.7}
    tiers = [
        {"backend": "cpu", "capacity": "56MiB"},  # 37 blocks; the longest prompt has 17.
        {"backend": "lmdb", "capacity": "512MiB", "path": str(tmp_path / "lmdb"), "movement": movement},
    ]
    options = {"num_gpu_blocks_override": 300, "max_model_len": 2048, "dtype": "float32"}
    llm = start(model, tiers, extra={"load_deadline_s": 60}, **options)
    own = own_answers(llm, prompts)
    assert_restored(prompts, own, restore(llm, prompts))
    drain(llm)
    counts = connector(llm).counts
    assert counts["lmdb"].loaded > 0
    assert counts["lmdb"].filled_bytes == {(0, "demotion"): counts["lmdb"].stored_bytes}
    assert counts["cpu"].filled_bytes[1, "promotion"] > 0
    assert counts["lmdb"].dropped.total() == counts["lmdb"].failed.total() == 0


def test_a_lower_tier_that_becomes_slow_is_computed_instead_and_comes_back(faulty, llama, start, monkeypatch):
    """Each load below takes a second while it is slow; that many tokens are computed in a fraction of one."""
    prompts = [p for p in make_prompts(60, seed=17, longest=1900) if len(p) > 1200][:3]
    tiers = [
        {"backend": "cpu", "capacity": "2560KiB"},
        {"backend": "faulty", "capacity": "256MiB",
         "movement": {"stores": "demotion", "low_watermark": 0.5, "high_watermark": 0.9}},
    ]  # fmt: skip
    llm = start(llama, tiers, extra={"only_faster": True})
    counts = connector(llm).counts["faulty"]
    answers = [generate(llm, [prompt]) for prompt in prompts]

    def ask_all():
        """Each prompt with an empty prefix cache; the blocks that came from below."""
        before = counts.loaded
        for prompt, answer in zip(prompts, answers, strict=True):
            forget(llm)
            assert generate(llm, [prompt]) == answer
        return counts.loaded - before

    def until(condition):
        give_up_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < give_up_s, connector(llm)._leader.session.planner.cost_model

    until(lambda: ask_all() > 20)
    faulty.fault = lambda transfer: "late" if transfer.op is Op.LOAD else None
    until(lambda: ask_all() == 0)
    stored, declined = counts.stored, counts.declined
    monkeypatch.setattr(cost_model, "TRIAL_EVERY_S", math.inf)
    assert [ask_all(), ask_all()] == [0, 0]
    assert counts.declined > declined
    assert counts.stored >= stored
    # A slow tier is tried again after a while; here at once.
    monkeypatch.setattr(cost_model, "TRIAL_EVERY_S", 0.0)
    faulty.fault = None
    until(lambda: ask_all() > 20)
    assert counts.failed.total() == 0
