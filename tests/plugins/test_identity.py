"""The promise "never a wrong token", and that blocks were really loaded: on a real engine.

A restored prompt is compared with what the same engine answers when its own prefix cache serves the
same prefix, and page by page with what was computed.
"""

import json
import logging

import pytest
import xxhash
from engines import (
    ANSWER_TOKENS,
    BLOCK_TOKENS,
    assert_restored,
    connector,
    generate,
    loaded,
    make_prompts,
    own_answers,
    restore,
    story_tokens,
)

from kvbm_core import Region
from kvbm_vllm import KvbmConnector

pytestmark = pytest.mark.engine


class Pages:
    """Digests of device pages: by key when stored, compared when loaded."""

    def __init__(self, monkeypatch):
        from kvbm_engine import Progress, Rank

        self.stored, self.compared, self.different = {}, 0, 0
        begin, end = Rank.begin, Progress.end

        ranks = {}

        def watch_begin(rank, step):
            ranks[rank.progress] = rank
            for store in step.plan.stores:
                self.stored.update(zip(store.keys, self._read(rank, store.blocks), strict=False))
            begin(rank, step)

        def watch_end(progress, load, failures):
            for key, digest in zip(load.keys, self._read(ranks[progress], load.blocks), strict=True):
                self.compared += 1
                self.different += digest != self.stored[key]
            end(progress, load, failures)

        monkeypatch.setattr(Rank, "begin", watch_begin)
        monkeypatch.setattr(Progress, "end", watch_end)

    @staticmethod
    def _read(rank, blocks):
        import ctypes

        device = rank.worker._engine._device
        memory = (ctypes.c_ubyte * device.traits.block_bytes[0])()
        region = Region(ctypes.addressof(memory), device.traits.block_bytes[0], owner=memory)
        digests = []
        for block in blocks:
            assert device.gather([block], [region]).done()
            digests.append(xxhash.xxh3_128_digest(memory))
        return digests


def stack(tmp_path):
    return [
        {"backend": "cpu", "capacity": "256MiB"},
        {"backend": "lmdb", "capacity": "512MiB", "path": str(tmp_path / "lmdb")},
    ]


@pytest.mark.early
def test_a_hundred_prompts_from_host_memory_and_after_a_restart_from_lmdb(
    llama, start, tmp_path, monkeypatch, capsys
):
    prompts = make_prompts(100, seed=1)
    cold = generate(start(llama, None, enable_prefix_caching=False), prompts)
    pages = Pages(monkeypatch)
    llm = start(llama, stack(tmp_path))
    assert isinstance(connector(llm), KvbmConnector)
    own = own_answers(llm, prompts)
    already = pages.compared
    restored = restore(llm, prompts)
    assert_restored(prompts, own, restored)
    assert loaded(llm)["lmdb"] == 0
    # Against a cold run a sum may round differently, with vLLM's own prefix cache as with ours.
    rounded = sum(a != b for a, b in zip(cold, own, strict=True))
    with capsys.disabled():
        print(f"\nof 100 answers {rounded} differ from a run without any prefix cache")

    llm = start(llama, stack(tmp_path))
    restored = restore(llm, prompts)
    assert_restored(prompts, own, restored)
    assert loaded(llm)["lmdb"] > 0
    assert pages.compared - already == sum(2 * ((len(p) - 1) // BLOCK_TOKENS) for p in prompts)
    assert pages.different == 0


def test_output_depends_on_the_context(llama, start):
    llm = start(llama, None)
    prompt = make_prompts(1, seed=3, longest=200)[-1]
    other = [prompt[0] + 1, *prompt[1:]]
    assert generate(llm, [prompt]) != generate(llm, [other])


def test_chunked_prefill_stores_and_restores_every_block(llama, start, tmp_path):
    prompts = make_prompts(24, seed=5, longest=3000)
    options = {"max_num_batched_tokens": 256, "enable_chunked_prefill": True}
    llm = start(llama, stack(tmp_path), **options)
    own = own_answers(llm, prompts)
    assert_restored(prompts, own, restore(llm, prompts))


def test_decoded_blocks_are_stored_too(llama, start, tmp_path):
    llm = start(llama, stack(tmp_path))
    prompt = make_prompts(1, seed=7, longest=40)[-1]
    answer = generate(llm, [prompt], max_tokens=100)[0]
    follow_up = [*prompt, *answer, 5, 6, 7]
    [(_, count)] = restore(llm, [follow_up])
    assert count == (len(prompt) + len(answer) - 1) // BLOCK_TOKENS


def test_preempted_requests_restore_and_answer_as_without_the_connector(llama, start, tmp_path, monkeypatch):
    """float32, so that a sum that rounds differently in another batch does not change a token."""
    from vllm.v1.core.sched.scheduler import Scheduler

    prompts = [p for p in make_prompts(60, seed=9, longest=1200) if len(p) > 300][:12]
    options = {"dtype": "float32", "max_model_len": 2048}
    reference = generate(start(llama, None, **options), prompts, 150)
    preempted = []
    original = Scheduler._preempt_request
    monkeypatch.setattr(
        Scheduler,
        "_preempt_request",
        lambda self, r, *a, **k: (preempted.append(r), original(self, r, *a, **k))[1],
    )
    llm = start(llama, stack(tmp_path), num_gpu_blocks_override=72, **options)
    for _ in range(2):
        assert generate(llm, prompts, 150) == reference
    assert preempted
    assert sum(loaded(llm).values()) > 0


def test_a_dozen_prompts_with_smollm2(start, tmp_path, monkeypatch):
    """A real model and real text: pieces of one story, so that many share a prefix."""
    model, tokens = story_tokens()
    starts = [0, 0, 0, 0, 0, 0, 0, 50, 50, 99, 7, 7]
    lengths = [33, 64, 65, 200, 416, 700, 1000, 100, 320, 555, 31, 802]
    prompts = [tokens[at : at + length] for at, length in zip(starts, lengths, strict=True)]
    pages = Pages(monkeypatch)
    options = {"num_gpu_blocks_override": 300, "max_model_len": 2048, "dtype": "float32"}
    llm = start(model, stack(tmp_path), **options)
    own = own_answers(llm, prompts)
    already = pages.compared
    assert_restored(prompts, own, restore(llm, prompts))
    assert pages.compared - already == sum((len(p) - 1) // BLOCK_TOKENS for p in prompts)
    assert pages.different == 0


def test_requests_preempted_between_steps_store_what_they_have_computed_and_nothing_else(
    llama, start, tmp_path, monkeypatch
):
    """`reset_running_requests` takes a running request's blocks away and gives it others in the next step."""
    from vllm import SamplingParams

    pages = Pages(monkeypatch)
    prompts = make_prompts(14, seed=31, longest=2000)[-3:]
    options = {"dtype": "float32", "max_num_batched_tokens": 256, "enable_chunked_prefill": True}
    reference = [generate(llm, [p])[0] for llm in [start(llama, None, **options)] for p in prompts]
    llm = start(llama, stack(tmp_path), **options)
    engine, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False)
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    answers, steps = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id.split("-")[0])] = tuple(output.outputs[0].token_ids)
        steps += 1
        if steps in (3, 6, 9, 15) and not any(
            r.status.name == "WAITING_FOR_REMOTE_KVS" for r in scheduler.requests.values()
        ):
            scheduler.reset_prefix_cache(reset_running_requests=True)
    assert [answers[number] for number in range(len(prompts))] == reference
    restored = restore(llm, prompts)
    assert [answer for answer, _ in restored] == reference
    assert pages.compared > 0
    assert pages.different == 0


def test_an_engine_that_was_configured_otherwise_says_what_was_changed(llama, start, tmp_path, caplog):
    prompts = make_prompts(2, seed=9)
    caplog.set_level(logging.INFO, "kvbm_lmdb")
    generate(start(llama, stack(tmp_path)), prompts)
    assert "starts empty" not in caplog.text
    generate(start(llama, stack(tmp_path), block_size=2 * BLOCK_TOKENS), prompts)
    [said] = [line for line in caplog.messages if "starts empty" in line]
    assert said.startswith(f"tier lmdb: starts empty; {tmp_path}/lmdb/rank0 was used with 1 other conf")
    assert f"block_tokens ({2 * BLOCK_TOKENS} here, {BLOCK_TOKENS} there)" in said
    first, second = sorted(
        (tmp_path / "lmdb/rank0/namespaces").iterdir(), key=lambda each: each.stat().st_mtime
    )
    for file, tokens in ((first, BLOCK_TOKENS), (second, 2 * BLOCK_TOKENS)):
        facts = json.loads(file.read_text())["facts"]
        assert facts["block_tokens"] == tokens
        assert facts["models"][0]["config"]["model_type"] == "llama"
        # The digest of the weights, and not where they lie.
        assert str(llama) not in file.read_text()
