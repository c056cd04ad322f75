"""Several ranks: differences found at start, and real engines with two workers."""

import json
import multiprocessing
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from kvbm_core import Capabilities, ConfigError, TierStatus, load_config
from kvbm_vllm._ranks import check_ranks, rank_facts
from kvbm_vllm._values import Handshake

REMOTE = {"backend": "remote", "url": "s3://me:secret@host/kv", "storage_options": {"key": "secret"}}


def said(rank, *, namespace=None, **config):
    facts = {
        "format": 1, "vllm": "0.32", "cache_dtype": "auto", "block_tokens": 32, "layers": [["0", "bf16"]],
        "ranks": [2, 1, rank],
        "models": [{"config": json.dumps({"rope_theta": 10000, "hidden": 8}), "weights": f"unknown:{rank}"}],
        **(namespace or {}),
    }  # fmt: skip
    stack = load_config({"tiers": [{"backend": "cpu", "capacity": "1GiB"}, REMOTE], **config})
    status = [
        TierStatus("cpu", Capabilities(8, addressable=True), []),
        TierStatus("remote", Capabilities(None), []),
    ]
    return Handshake(rank, status, rank_facts(stack, facts))


def refusal(*handshakes, world_size=2):
    with pytest.raises(ConfigError) as caught:
        check_ranks(handshakes, world_size)
    return str(caught.value)


def test_ranks_that_are_alike_pass_in_any_order():
    check_ranks([said(1), said(0)], 2)
    check_ranks([said(0)], 1)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"load_deadline_s": 3}, "configuration.load_deadline_s is 3.0, there 5.0"),
        ({"tiers": [{"backend": "cpu", "capacity": "2GiB"}, REMOTE]},
         "configuration.tiers.0.settings.capacity is 2GiB, there 1GiB"),
        ({"tiers": [{"backend": "cpu", "capacity": "1GiB"}]},
         "configuration.tiers.1.backend is not there, there remote"),
        ({"namespace": {"vllm": "0.33"}}, "vllm is 0.33, there 0.32"),
        ({"namespace": {"models": [{"config": '{"rope_theta": 5, "hidden": 8}', "weights": "unknown:7"}]}},
         "models.0.config.rope_theta is 5, there 10000"),
        ({"namespace": {"models": [{"config": '{"rope_theta": 10000, "hidden": 8}', "weights": "blake3:a"}]}},
         "models.0.weights is blake3:a, there unknown"),
        ({"namespace": {"layers": [["0", "fp8"]]}}, "layers.0.1 is fp8, there bf16"),
    ],
)  # fmt: skip
def test_a_rank_that_differs_is_named_with_the_difference(other, words):
    message = refusal(said(0), said(1, **other))
    assert message.startswith("rank 1 differs from rank 0: ")
    assert words in message


def test_another_version_is_found(monkeypatch):
    first = said(0)
    monkeypatch.setattr("kvbm_vllm._ranks.metadata.version", lambda name: "9.9")
    assert "version of kvbm-core is 9.9, there " in refusal(first, said(1))


def test_a_tier_that_works_in_another_way_is_found():
    other = said(1)
    other.status[1] = TierStatus("remote", Capabilities(None, shared=True), [])
    assert "tier remote: shared is True, there False" in refusal(said(0), other)


def test_a_rank_that_is_missing_or_comes_twice_is_found():
    assert "1 of 2 ranks have opened their tiers; missing: 1" in refusal(said(0))
    assert "none, but one came twice" in refusal(said(0), said(1), said(1))


def test_no_password_is_shown():
    other = {"backend": "remote", "url": "s3://you:word@host/other", "storage_options": {"key": "word"}}
    tiers = [{"backend": "cpu", "capacity": "1GiB"}, other]
    message = refusal(said(0), said(1, tiers=tiers))
    assert "url is s3://(hidden)@host/other, there s3://(hidden)@host/kv" in message
    assert "secret" not in message
    assert "word" not in message


def test_no_password_of_a_strangers_backend_or_coordinator_is_shown():
    words = []
    for secret in ("word1", "word2"):
        tier = {"backend": "toy", "password": secret, "path": "/kv", "deep": {"er": [secret]}}
        coordinator = {"backend": "toy", "token": secret}
        words.append({"tiers": [tier], "coordinator": coordinator})
    message = refusal(said(0, **words[0]), said(1, **words[1]))
    assert "settings.password is (hidden), there (hidden)" in message
    assert "settings.deep.er.0 is (hidden)" in message
    assert "coordinator.token is (hidden)" in message
    assert "word1" not in message
    assert "word2" not in message


def test_many_differences_are_counted():
    other = {"load_deadline_s": 1, "store_deadline_s": 1, "lookup_deadline_s": 1, "max_store_blocks": 1,
             "max_load_fraction": 0.1, "staging": 1, "weights_id": "x"}  # fmt: skip
    assert "and 2 more" in refusal(said(0), said(1, **other))


def test_the_layers_of_a_pipelines_stages_are_their_own():
    first = said(0, namespace={"ranks": [1, 2, 0]})
    check_ranks([first, said(1, namespace={"ranks": [1, 2, 1], "layers": [["1", "bf16"]]})], 2)


def test_ranks_of_a_model_with_mla_are_replicas_and_no_others_are():
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    from kvbm_vllm._settings import replicas

    engine = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=4))
    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 576, "dtype": torch.bfloat16}
    for spec, count in ((MLAAttentionSpec(**shape), 4), (FullAttentionSpec(**shape), 1)):
        assert (
            replicas(engine, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])) == count
        )


# Real engines with two workers. They are processes of their own, so faults travel as files.

_HALF = """
from dataclasses import replace
from pathlib import Path

from kvbm_core import Backend, Op, hookimpl
from kvbm_core.testing import FaultyTier
from kvbm_lmdb import LmdbConfig, LmdbTier


class Half(FaultyTier):
    pass


def open_half(config, context):
    folder, second = Path(config.path).parent, context.rank == 1

    def fault(transfer):
        return "error" if second and transfer.op is Op.LOAD and (folder / "loads-fail").exists() else None

    tier = Half(LmdbTier(config, context), fault)
    if second and (folder / "asked").exists():
        changed = replace(tier.capabilities, remote_lookup=True, capacity_bytes=None)
        Half.capabilities = property(lambda self: changed)
    return tier


@hookimpl
def kvbm_backends():
    return [Backend("half", LmdbConfig, open_half)]
"""


@pytest.fixture
def half(tmp_path, monkeypatch):
    """A stranger's backend, LMDB that fails on rank 1 as files in its folder say."""
    site = tmp_path / "site"
    info = site / "kvbm_half-0.1.dist-info"
    info.mkdir(parents=True)
    (site / "kvbm_half.py").write_text(_HALF)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvbm-half\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[kvbm_core]\nhalf = kvbm_half\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    # Two workers and the scheduler share the machine; threads that spin would take all of it.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return {"backend": "half", "capacity": "512MiB", "path": str(tmp_path / "kv")}


CPU = {"backend": "cpu", "capacity": "256MiB"}


@pytest.mark.engine
@pytest.mark.ranks
def test_two_tensor_parallel_ranks_over_a_restart_and_through_the_failure_of_one(
    llama, start, half, tmp_path
):
    from engines import BLOCK_TOKENS, assert_restored, connector, loaded, make_prompts, own_answers, restore

    options = {"tensor_parallel_size": 2, "max_model_len": 2048, "extra": {"only_faster": False}}
    prompts = make_prompts(24, seed=41, longest=600)
    blocks = [(len(prompt) - 1) // BLOCK_TOKENS for prompt in prompts]
    llm = start(llama, [CPU, half], **options)
    own = own_answers(llm, prompts)
    already = sum(loaded(llm).values())
    assert_restored(prompts, own, restore(llm, prompts))
    assert loaded(llm) == {"cpu": already + sum(blocks), "half": 0}

    llm = start(llama, [CPU, half], **options)
    whole = prompts[:-6]
    assert_restored(whole, own[:-6], restore(llm, whole))
    assert loaded(llm)["half"] > 0

    # One rank fails: its part of a block is missing, so the block is, and it is computed by both.
    (tmp_path / "loads-fail").touch()
    before, failed = loaded(llm), connector(llm).counts["half"].failed
    alone = [number for number in range(len(whole), len(prompts)) if number % 3 and blocks[number]]
    restored = restore(llm, [prompts[number] for number in alone])
    assert [answer for answer, _ in restored] == [own[number] for number in alone]
    assert len(alone) >= 3
    assert loaded(llm) == before
    assert failed["load", "error"] > 0

    # What was computed is in host memory again, on both.
    again = [prompts[number] for number in alone]
    assert_restored(again, [own[number] for number in alone], restore(llm, again))


@pytest.mark.engine
@pytest.mark.ranks
def test_two_pipeline_stages_restore_what_they_have_stored(llama, start, half):
    from engines import assert_restored, loaded, make_prompts, own_answers, restore

    # vLLM's CPU build makes the tensors between the stages only where it warms the model up for compiling.
    compiling = {"enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}}
    options = {
        "pipeline_parallel_size": 2,
        "max_model_len": 2048,
        "extra": {"only_faster": False},
        **compiling,
    }
    prompts = make_prompts(14, seed=43, longest=600)
    llm = start(llama, [half], **options)
    own = own_answers(llm, prompts)
    assert_restored(prompts, own, restore(llm, prompts))
    assert loaded(llm)["half"] > 0


@pytest.mark.engine
@pytest.mark.ranks
def test_an_engine_does_not_start_with_ranks_that_differ(llama, half, tmp_path):
    from engines import make_engine

    (tmp_path / "asked").touch()
    differs = "rank 1 differs from rank 0: tier half: remote_lookup is True, there False"
    with pytest.raises(ConfigError, match=differs):
        make_engine(llama, [CPU, half], tensor_parallel_size=2)
    # Nobody has the executor, by which its workers would be ended.
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """The configuration of a small model with MLA, of DeepSeek's kind, without its weights."""
    from transformers import DeepseekV2Config

    config = DeepseekV2Config(
        vocab_size=2000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1,
        moe_intermediate_size=64, first_k_dense_replace=2, max_position_embeddings=4096,
        initializer_range=0.15, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("latent")
    config.save_pretrained(folder)
    return folder


@pytest.mark.vllm
def test_mla_is_refused_where_vllm_cannot_go_on_after_a_prefix(latent):
    """Before the model is loaded. On a CPU loads gave other tokens, with every byte as it was stored."""
    from test_configuration import configure

    with pytest.raises(Exception, match="enable_chunked_prefill: False; for a model with MLA"):
        configure(latent, [CPU], engine={"enable_chunked_prefill": False, "block_size": 16})
