"""`kvbm size`: what models keep, by their config.json. `test_real_shapes` compares with vLLM's planner."""

import json
import re

import pytest
from model_configs import CONFIGS
from pages import DOCS
from published import published

from kvbm_cli._app import run as kvbm
from kvbm_core.command import ExitCode


@pytest.fixture
def sized(tmp_path, capsys):
    """Gives a function that sizes a model: a name of `CONFIGS`, or a configuration."""

    def size(config, *arguments):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(CONFIGS[config] if isinstance(config, str) else config))
        assert kvbm(["size", str(tmp_path), "--json", *arguments]) == 0
        return published("size", capsys.readouterr().out)

    return size


GROUPS = {
    # Rule, its tokens, layers, tokens of a block, bytes of a page.
    "Llama-3.1-8B": [("all", 0, 32, 16, 65_536)],
    "Llama-3.3-70B": [("all", 0, 80, 16, 65_536)],
    "Qwen3-32B": [("all", 0, 64, 16, 65_536)],
    "DeepSeek-V3": [("all", 0, 61, 64, 73_728)],
    "gpt-oss-120b": [("window", 127, 18, 16, 32_768), ("all", 0, 18, 16, 32_768)],
    "Gemma-3-27B": [
        *[("window", 1023, 9, 16, 131_072)] * 4, *[("window", 1023, 8, 16, 131_072)] * 2,
        ("all", 0, 10, 16, 131_072),
    ],
    "Gemma-4-like": [*[("window", 1023, 10, 16, 262_144)] * 5, ("all", 0, 10, 32, 262_144)],
    "Llama-4-Scout": [*[("chunk", 8192, 12, 16, 65_536)] * 3, ("all", 0, 12, 16, 65_536)],
    "Qwen3.6-27B": [*[("state", 0, 16, 784, 3_211_264)] * 3, ("all", 0, 16, 784, 3_211_264)],
    "Kimi-Linear-48B": [
        *[("state", 0, 7, 1920, 2_211_840)] * 2, ("state", 0, 6, 1920, 2_211_840),
        ("all", 0, 7, 1920, 2_211_840),
    ],
    "Nemotron-3-Nano": [
        *[("state", 0, 6, 2096, 2_146_304)] * 3, ("state", 0, 5, 2096, 2_146_304),
        ("all", 0, 6, 2096, 2_146_304),
    ],
}  # fmt: skip


@pytest.mark.parametrize("model", CONFIGS)
def test_the_groups_of_models_that_people_serve(sized, model):
    found = sized(model)
    assert [
        (each["rule"], each["rule_tokens"], each["layers"], each["block_tokens"],
         each["rank_block_bytes"] // each["layers"])
        for each in found["groups"]
    ] == GROUPS[model]  # fmt: skip


def test_the_page_on_sizes_says_what_the_command_says(sized):
    page = (DOCS / "how-to" / "plan-sizes.md").read_text()
    rows = re.findall(r"^\| (\S+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", page, re.MULTILINE)
    assert len(rows) == 8
    for model, *written in rows:
        plain, short = sized(model), sized(model, "--kv-cache-dtype", "fp8")
        found = (plain["bytes_per_token"], plain["tokens_per_gib"], short["tokens_per_gib"])
        assert written == [f"{number:,.0f}" for number in found], model


def test_tokens_that_a_gib_holds(sized):
    found = sized("Llama-3.1-8B", "--prompt-tokens", "4096")
    block = 32 * 65_536 + found["seal_bytes"]
    assert found["bytes_per_token"] == block / 16
    assert found["tokens_per_gib"] == int((1 << 30) / (block / 16))


def test_ranks_divide_heads_and_no_latent_kv(sized):
    assert sized("Llama-3.1-8B", "-tp", "4")["groups"][0]["rank_block_bytes"] == 32 * 65_536 // 4
    # More ranks than heads: each has one.
    assert sized("Llama-3.1-8B", "-tp", "16")["groups"][0]["rank_block_bytes"] == 32 * 65_536 // 8
    assert sized("DeepSeek-V3", "-tp", "8")["groups"][0]["rank_block_bytes"] == 61 * 73_728
    stages = sized("Llama-3.1-8B", "-pp", "3")
    assert (stages["ranks"], stages["groups"][0]["layers"]) == (3, 11)


def test_the_kv_caches_own_type_and_block(sized):
    assert sized("Llama-3.1-8B", "--kv-cache-dtype", "fp8")["block_bytes"] == 32 * 32_768
    assert sized("Llama-3.1-8B", "--block-size", "128")["block_bytes"] == 32 * 65_536 * 8


def test_windows_are_stored_where_a_prefix_may_end(sized):
    found = sized("gpt-oss-120b", "--prompt-tokens", "4000")
    # Ahead of 2,048 tokens, of the two ends of the prompt, which share all blocks but one, and of 4,096.
    window, full = found["groups"]
    assert window["prompt_blocks"] == 8 + 9 + 1
    assert full["prompt_blocks"] == 250


def test_what_is_assumed_is_said(sized):
    plain = {**CONFIGS["Llama-3.1-8B"], "model_type": "brand_new", "torch_dtype": "float32"}
    found = sized(plain)
    assert not found["proved"]
    assert any("'brand_new' is none of those that were started" in note for note in found["notes"])
    assert any("weights are float32" in note for note in found["notes"])
    assert sized("gpt-oss-120b")["proved"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "cannot be read as JSON"),
        ({"model_type": "llama"}, "'num_hidden_layers' is None; a whole number above 0 was expected"),
        ({"is_encoder_decoder": True}, "an encoder-decoder model"),
        ({**CONFIGS["Llama-3.1-8B"], "layer_types": ["rwkv"] * 32}, "layers called rwkv"),
        ({**CONFIGS["Llama-3.1-8B"], "compress_ratios": [4]}, "compresses several tokens into one"),
        ({**CONFIGS["Llama-3.1-8B"], "mamba_d_state": 128}, "some layers keep a state, and it does not say"),
        (
            {**CONFIGS["Gemma-4-like"], "global_head_dim": 500},
            "how vLLM puts them together is not known here",
        ),
        (
            {**CONFIGS["Nemotron-3-Nano"], "hybrid_override_pattern": "MM"},
            "every layer keeps a state",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path, config, said, capsys):
    file = tmp_path / "config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    assert kvbm(["size", str(file)]) == ExitCode.WRONG
    assert said in capsys.readouterr().err


def test_the_table_for_people(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt-oss-120b"]))
    assert kvbm(["size", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "window of 127 tokens" in shown
    assert "576KiB (589,824)" in shown
    assert "tokens a GiB" in shown
    assert kvbm(["size", str(tmp_path), "--kv-cache-dtype", "int3"]) == ExitCode.WRONG
    assert "'int3' is not known; write one of auto" in capsys.readouterr().err
    assert kvbm(["size", "/no/such"]) == ExitCode.WRONG
    assert "MODEL: /no/such is not there" in capsys.readouterr().err
