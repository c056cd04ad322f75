"""`kvbm inspect`: what lies in a tier's place, beside an engine too, and how two namespaces differ."""

import copy
import os
import time

import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from published import published

from kvbm_cli._app import run as kvbm
from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.command import ExitCode
from kvbm_core.testing import MemoryDevice

BLOCK_BYTES, BLOCKS, SEAL_BYTES = 8192, 4, 96
KEYS = chain_keys(root_key(), range(64), block_tokens=16)
FACTS = {
    "format": 2,
    "vllm": "0.32",
    "models": [
        {
            "config": {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "rope_theta": 10000.0},
            "dtype": "torch.bfloat16",
            "quantization": "None",
            "max_model_len": None,
            "weights": "sha256:0123456789abcdef",
        }
    ],
    "cache_dtype": "auto",
    "block_tokens": 16,
    "layers": [["layers.0", ["torch.bfloat16", [2, 16, 8, 128], [0, 1, 2, 3]]]],
    "ranks": [1, 1, 0],
}


def tiers(folder, **codecs):
    return {
        "gds": {"backend": "gds", "capacity": "16MiB", "path": f"{folder}/gds"},
        "lmdb": {"backend": "lmdb", "capacity": "32MiB", "path": f"{folder}/lmdb", **codecs},
        "remote": {"backend": "remote", "url": f"file://{folder}/remote"},
    }


def opened(tier, facts):
    return Stack.open(
        {"tiers": [tier]}, MemoryDevice(BLOCKS, BLOCK_BYTES), make_namespace(facts), facts=facts
    )


def fill(tier, facts=FACTS, blocks=BLOCKS):
    with opened(tier, facts) as stack:
        stack.store(KEYS[:blocks], list(range(blocks)))
        stack.wait()


@pytest.fixture
def inspect(capsys):
    def run(place, *arguments):
        capsys.readouterr()
        assert kvbm(["inspect", str(place), "--json", *arguments]) == 0
        return published("inspect", capsys.readouterr().out)

    return run


@pytest.mark.parametrize("name", ["gds", "lmdb", "remote"])
@pytest.mark.parametrize("how", ["directory", "configuration"])
def test_what_lies_in_a_place(tmp_path, inspect, name, how):
    tier = tiers(tmp_path)[name]
    fill(tier)
    file = tmp_path / "kvbm.yaml"
    file.write_text(yaml.safe_dump({"tiers": [{"backend": "cpu", "capacity": "1MiB"}, tier]}))
    [found] = inspect(tmp_path / name if how == "directory" else file)["namespaces"]
    assert found["tier"] == name
    assert found["namespace"] == make_namespace(FACTS).hex()
    assert found["model"] == "LlamaForCausalLM (weights sha256:0123456789abc)"
    assert found["layout"] == "vLLM 0.32; tokens 16; KV auto; ranks [1, 1, 0]"
    assert (found["objects"], found["nbytes"]) == (BLOCKS, BLOCKS * (BLOCK_BYTES + SEAL_BYTES))
    assert (found["rank"], found["held_by"]) == (0, None)
    assert 0 <= found["age_s"] < 300
    assert found["world_size"] == (1 if name == "remote" else None)


@pytest.mark.parametrize("name", ["gds", "lmdb"])
def test_beside_an_engine_it_says_who_holds_the_place(tmp_path, inspect, name):
    with opened(tiers(tmp_path)[name], FACTS) as stack:
        stack.store(KEYS, list(range(BLOCKS)))
        stack.wait()
        [found] = inspect(tmp_path / name)["namespaces"]
        assert found["held_by"] == str(os.getpid())
        # LMDB's file is not read while another process writes to it.
        assert found["objects"] == (None if name == "lmdb" else BLOCKS)
        assert stack.load(KEYS, list(range(BLOCKS))) == BLOCKS


def test_codecs_are_part_of_the_layout(tmp_path, inspect):
    fill(tiers(tmp_path, codecs=["zstd"])["lmdb"])
    [found] = inspect(tmp_path / "lmdb")["namespaces"]
    assert "codecs [['zstd'" in found["layout"]


def test_a_url_is_listed(inspect):
    MemoryFileSystem.store.clear()
    fill({"backend": "remote", "url": "memory://inspected"})
    [found] = inspect("memory://inspected")["namespaces"]
    assert found["objects"] == BLOCKS
    MemoryFileSystem.store.clear()


def test_damage_costs_knowledge_and_nothing_else(tmp_path, inspect):
    for name, tier in tiers(tmp_path).items():
        if name != "remote":
            fill(tier)
    (tmp_path / "lmdb/rank0/data.mdb").write_bytes(b"nothing of LMDB's" * 1000)
    (tmp_path / "gds/rank0/index").write_bytes(b"?" * 9000)
    for name in ("lmdb", "gds"):
        [facts] = (tmp_path / name / "rank0/namespaces").glob("*.json")
        facts.write_text("{")
        [found] = inspect(tmp_path / name)["namespaces"]
        assert (found["objects"], found["model"]) == (None, None)


def test_links_are_not_followed(tmp_path, inspect):
    fill(tiers(tmp_path)["lmdb"])
    folder = tmp_path / "lmdb/rank0/namespaces"
    secret = tmp_path / "secret.json"
    [facts] = folder.glob("*.json")
    facts.rename(secret)
    facts.symlink_to(secret)
    assert [each["model"] for each in inspect(tmp_path / "lmdb")["namespaces"]] == [None]


# ---- why is nothing found after the upgrade


def change(path, value):
    """Facts of which one is another."""
    facts = copy.deepcopy(FACTS)
    inner = facts
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return facts


CHANGES = {
    "format": (["format"], 3),
    "vllm": (["vllm"], "0.33"),
    "models[0].config.rope_theta": (["models", 0, "config", "rope_theta"], 500000.0),
    "models[0].config.hidden_size": (["models", 0, "config", "hidden_size"], 2048),
    "models[0].dtype": (["models", 0, "dtype"], "torch.float16"),
    "models[0].quantization": (["models", 0, "quantization"], "fp8"),
    "models[0].max_model_len": (["models", 0, "max_model_len"], 32768),
    "models[0].weights": (["models", 0, "weights"], "sha256:fedcba9876543210"),
    "cache_dtype": (["cache_dtype"], "fp8"),
    "block_tokens": (["block_tokens"], 32),
    "ranks": (["ranks"], [2, 1, 0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_fact_is_named(tmp_path, inspect, name):
    other = change(*CHANGES[name])
    tier = tiers(tmp_path)["lmdb"]
    fill(tier)
    time.sleep(0.01)  # The times of the files tell which is the later.
    fill(tier, other)
    pair = [make_namespace(facts).hex()[:12] for facts in (FACTS, other)]
    found = inspect(tmp_path / "lmdb", "--diff", *pair)
    [said] = found["differences"]
    assert said.startswith(f"{name} (")
    assert {each["namespace"][:12] for each in found["namespaces"]} == set(pair)
    assert found["namespaces"][0]["namespace"].startswith(pair[1]), "the latest comes first"


def test_namespaces_of_a_store_are_compared(tmp_path, inspect, capsys):
    other = change(["block_tokens"], 32)
    for facts in (FACTS, other):
        fill(tiers(tmp_path)["remote"], facts, blocks=2)
    found = inspect(tmp_path / "remote")
    assert [each["objects"] for each in found["namespaces"]] == [2, 2]
    pair = [make_namespace(facts).hex()[:8] for facts in (FACTS, other)]
    assert inspect(tmp_path / "remote", "--diff", *pair)["differences"] == [
        "block_tokens (16 here, 32 there)"
    ]
    assert inspect(tmp_path / "remote", "--diff", pair[0], pair[0])["differences"] == []
    assert kvbm(["inspect", str(tmp_path / "remote"), "--diff", pair[0], "zz"]) == ExitCode.WRONG
    assert "--diff: 'zz' is of none; write the first digits of one of: " in capsys.readouterr().err


# ---- for people, and what is wrong


def test_the_table_for_people(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    fill(tiers(tmp_path)["gds"])
    assert kvbm(["inspect", str(tmp_path / "gds")]) == 0
    shown = capsys.readouterr().out
    for cell in (make_namespace(FACTS).hex()[:12], "LlamaForCausalLM", "tokens 16", "nobody", "32.37KiB"):
        assert cell in shown


@pytest.mark.parametrize(
    ("place", "said", "status"),
    [
        ("/no/such", "configuration file /no/such: No such file or directory", ExitCode.WRONG),
        ("EMPTY", "no tier keeps objects there; write the 'path' or 'url' of a tier", ExitCode.WRONG),
        ("ess3://bucket", "no file system is called 'ess3'", ExitCode.UNUSABLE),
    ],
)
def test_what_cannot_be_inspected_is_said(tmp_path, capsys, place, said, status):
    assert kvbm(["inspect", str(tmp_path) if place == "EMPTY" else place]) == status
    assert said in capsys.readouterr().err
