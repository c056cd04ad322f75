"""Several ranks: differences found at start, and real engines with two workers."""

import json

import pytest

pytest.importorskip("vllm")
from kvbm_core import Capabilities, ConfigError, TierStatus, load_config
from kvbm_vllm._ranks import check_ranks, rank_facts
from kvbm_vllm._values import Handshake

REMOTE = {"backend": "remote", "url": "s3://me:secret@host/kv", "options": {"key": "secret"}}


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
    return Handshake(rank, status, 4096, rank_facts(stack, facts))


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
        ({"namespace": {"models": [{"config": '{"rope_theta": 10000, "hidden": 8}', "weights": "xxh3:ab"}]}},
         "models.0.weights is xxh3:ab, there unknown"),
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
    other = {"backend": "remote", "url": "s3://you:word@host/other", "options": {"key": "word"}}
    tiers = [{"backend": "cpu", "capacity": "1GiB"}, other]
    message = refusal(said(0), said(1, tiers=tiers))
    assert "url is s3://(hidden)@host/other, there s3://(hidden)@host/kv" in message
    assert "secret" not in message
    assert "word" not in message


def test_many_differences_are_counted():
    other = {"load_deadline_s": 1, "store_deadline_s": 1, "lookup_deadline_s": 1, "max_store_blocks": 1,
             "max_load_fraction": 0.1, "staging": 1, "weights_id": "x"}  # fmt: skip
    assert "and 2 more" in refusal(said(0), said(1, **other))


def test_the_layers_of_a_pipelines_stages_are_their_own():
    first = said(0, namespace={"ranks": [1, 2, 0]})
    check_ranks([first, said(1, namespace={"ranks": [1, 2, 1], "layers": [["1", "bf16"]]})], 2)
