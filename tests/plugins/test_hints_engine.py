"""Hints, tenants and reading ahead under vLLM with a real model: what is answered, and what is there."""

import time

import pytest
from engines import connector, drain, forget, generate, loaded, story_tokens
from servers import FaultProxy

pytestmark = pytest.mark.engine

PATIENCE_S = 120
BLOCKS, TOKENS = 2, 65
"""Of a prompt."""


def sampling(hints=None, max_tokens=2):
    from vllm import SamplingParams

    extra = None if hints is None else {"kv_transfer_params": {"kvbm": hints}}
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=extra
    )


def ask(llm, prompt, hints=None, max_tokens=2):
    """Give the answer to a prompt, what became of its hints, and the blocks that were loaded for it."""
    before = sum(loaded(llm).values())
    forget(llm)
    params = sampling(hints, max_tokens)
    [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    drain(llm)
    told = output.kv_transfer_params
    restored = sum(loaded(llm).values()) - before
    return tuple(output.outputs[0].token_ids), told and told["kvbm"], restored


def counted(llm, name):
    """What metrics have counted so far, by labels."""
    found = connector(llm)._leader.session._tally._told
    return {key.split("|", 1)[1]: n for key, n in found.items() if key.startswith(f"{name}|") and n}


@pytest.mark.early
def test_what_a_request_asks_for_is_answered_and_a_flood_takes_no_ones_share(start):
    model, tokens = story_tokens()
    prompts = [tokens[at : at + TOKENS] for at in range(0, 192, 12)]
    quiet, kept, plain, hidden, *floods = prompts
    llm = start(
        model, [{"backend": "cpu", "capacity": "12MiB"}], max_model_len=2048, num_gpu_blocks_override=300,
        dtype="float32", extra={
            "keep_fraction": 0.5, "max_keep_s": 3600,
            "tenants": {"quiet": {"cpu": "4MiB"}, "default": {"cpu": "5MiB"}},
        },
    )  # fmt: skip
    bare = {at: generate(llm, [prompt], max_tokens=2)[0] for at, prompt in enumerate(prompts)}
    connector(llm).reset_cache()
    right = {tuple(prompt): bare[at] for at, prompt in enumerate(prompts)}

    def answers(prompt, hints=None):
        answer, told, restored = ask(llm, prompt, hints)
        assert answer == right[tuple(prompt)]
        return told, restored

    accepted = {"answer": "accepted"}
    assert answers(quiet, {"tenant": "quiet"}) == ({"tenant": accepted}, 0)
    told, _ = answers(kept, {"keep": 1e9})
    assert told["keep"]["answer"] == "clipped"
    assert (told["keep"]["seconds"], told["keep"]["reason"]) == (3600, "3600 seconds at most")
    assert answers(plain) == (None, 0)
    assert answers(hidden, {"no_store": True, "keep": 5}) == (
        {"no_store": accepted, "keep": {"answer": "refused", "reason": "no_store: nothing is stored"}}, 0,
    )  # fmt: skip
    assert answers(hidden) == (None, 0)
    assert answers(plain)[1] == BLOCKS
    for flood in floods[:6]:
        answers(flood, {"tenant": "noisy"})
    for flood in floods[6:]:
        answers(flood)
    # The tier holds 8 blocks; each flood alone brings 12.
    assert answers(plain)[1] == 0
    assert answers(floods[0], {"tenant": "noisy"})[1] == 0
    assert answers(kept)[1] == BLOCKS
    assert answers(quiet, {"tenant": "quiet"})[1] == BLOCKS
    levels = {level.tenant: level for level in connector(llm)._leader.session.planner.tenants.levels()}
    assert 0 < levels["noisy"].used_bytes <= levels["noisy"].quota_bytes
    assert levels["quiet"].used_bytes > 0

    for hints, reason in [
        ("keep", "a str; write a mapping"),
        ({"kepe": 5}, "did you mean keep"),
        ({"keep": -1}, "-1; write seconds above 0"),
        ({"tenant": "a|b"}, "'a|b'; write a name of 1 to 64 letters"),
        ({"no_store": "yes"}, "'yes'; write true or false"),
        ({"prefetch_only": True}, "may compute 2 tokens; write max_tokens: 1"),
        ({"tenant": "third"}, "no room for the quotas of another tenant"),
    ]:
        told, restored = answers(kept, hints)
        [answer] = told.values()
        assert answer["answer"] == "refused"
        assert reason in answer["reason"]
        assert restored == BLOCKS
    generate(llm, [[5]], max_tokens=1)  # A step after everything has ended, so that all is told.
    assert counted(llm, "hints") == {
        "tenant|accepted": 9, "keep|clipped": 1, "no_store|accepted": 1, "keep|refused": 2,
        "unknown|refused": 2, "tenant|refused": 2, "no_store|refused": 1, "prefetch_only|refused": 1,
    }  # fmt: skip


@pytest.fixture
def s3(s3_server, monkeypatch):
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.mark.early
def test_blocks_of_a_request_that_waits_are_read_from_a_slow_store_before_its_turn(start, s3, tmp_path):
    model, tokens = story_tokens()
    first, wanted, also = tokens[:20], tokens[50:355], tokens[100:230]
    options = {"num_gpu_blocks_override": 300, "max_model_len": 4096, "dtype": "float32", "max_num_seqs": 1}
    extra = {"lookup_deadline_s": 30, "load_deadline_s": 60}

    def tiers(endpoint):
        place = {"url": f"s3://kvbm-test/{tmp_path.name}", "storage_options": {"endpoint_url": endpoint}}
        return [{"backend": "cpu", "capacity": "128MiB"}, {"backend": "remote", **place}]

    llm = start(model, tiers(s3.endpoint), extra=extra, **options)
    right = {len(prompt): generate(llm, [prompt], max_tokens=2)[0] for prompt in (wanted, also)}
    drain(llm)
    with FaultProxy(s3, delay_s=0.02) as proxy:
        llm = start(model, tiers(proxy.endpoint), extra=extra, **options)
        proxy.mode = "slow"
        engine = llm.llm_engine
        engine.add_request("runs", {"prompt_token_ids": first}, sampling(max_tokens=3500))
        engine.step()  # It has no block that is to be asked for, and runs at once.
        engine.add_request("waits", {"prompt_token_ids": wanted}, sampling())
        give_up_s = time.monotonic() + PATIENCE_S
        blocks = (len(wanted) - 1) // 32
        cpu = connector(llm).counts["cpu"]
        while cpu.stored < blocks:
            assert time.monotonic() < give_up_s
            assert engine.has_unfinished_requests()
            engine.step()
        assert dict(cpu.filled_bytes) == {(1, "prefetch"): cpu.stored_bytes}
        assert loaded(llm) == {"cpu": 0, "remote": 0}
        engine.abort_request(["runs"], internal=False)
        [output] = [done for _ in iter(engine.has_unfinished_requests, False) for done in engine.step()][-1:]
        assert tuple(output.outputs[0].token_ids) == right[len(wanted)]
        assert loaded(llm) == {"cpu": blocks, "remote": 0}
        # Who wants nothing but that: from the store into host memory and the engine's.
        answer, told, restored = ask(llm, also, {"prefetch_only": True}, max_tokens=1)
        assert answer == right[len(also)][:1]
        assert told == {"prefetch_only": {"answer": "accepted", "blocks": {"cpu": (len(also) - 1) // 32}}}
        assert restored == (len(also) - 1) // 32
