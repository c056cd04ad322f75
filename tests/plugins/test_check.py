"""`kvbm check`: reads what the connector would read, tries every tier, and leaves all as it was."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from model_configs import CONFIGS
from published import published

from kvbm_cli._app import run as kvbm
from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.command import ExitCode
from kvbm_core.memory import MemoryTier
from kvbm_core.testing import MemoryDevice

BLOCK_BYTES, BLOCKS = 8192, 4


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DYN_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def check(tmp_path, capsys):
    """Gives a function that checks tiers, and gives what was found by the tier's name, and of the stack."""

    def run(tiers, *arguments, status=0, **stack):
        file = tmp_path / "kvbm.yaml"
        # What is slow here is warned of: the machine may be busy.
        patient = {"load_deadline_s": 600, "store_deadline_s": 600}
        file.write_text(yaml.safe_dump({"tiers": tiers, **patient, **stack}))
        capsys.readouterr()
        assert kvbm(["check", str(file), "--json", "--block-bytes", "64KiB", *arguments]) == status
        found = published("check", capsys.readouterr().out)
        return {each["name"]: each for each in found["tiers"]}, found

    return run


def everywhere(folder):
    return [
        {"backend": "cpu", "capacity": "4MiB"},
        {"backend": "gds", "capacity": "16MiB", "path": f"{folder}/gds"},
        {"backend": "lmdb", "capacity": "32MiB", "path": f"{folder}/lmdb", "codecs": ["zstd"]},
        {"backend": "remote", "url": f"file://{folder}/remote"},
    ]


def tree(folder):
    return sorted((str(file), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file())


def test_every_tier_is_tried_and_left_as_it_was(tmp_path, check):
    place = tmp_path / "tiers"
    place.mkdir()
    namespace, keys = make_namespace({"model": "m"}), chain_keys(root_key(), range(64), block_tokens=16)
    for tier in everywhere(place)[1:]:
        with Stack.open({"tiers": [tier]}, MemoryDevice(BLOCKS, BLOCK_BYTES), namespace) as stack:
            stack.store(keys, list(range(BLOCKS)))
            stack.wait()
    before = tree(place)
    tiers, found = check(everywhere(place))
    assert found["problems"] == found["warnings"] == []
    for name, tier in tiers.items():
        assert tier["problem"] is tier["not_tried"] is None
        assert tier["tried_objects"] >= 1
        assert tier["store_bytes_per_s"] > 0
        assert tier["load_bytes_per_s"] > 0
        assert tier["plugin"].startswith("kvbm-core "), name
    assert tiers["lmdb"]["traits"] == ["durable"]
    assert tiers["remote"]["detail"].startswith(f"file://{place}/remote by ")
    assert tree(place) == before
    for tier in everywhere(place)[1:]:
        with Stack.open({"tiers": [tier]}, MemoryDevice(BLOCKS, BLOCK_BYTES), namespace) as stack:
            assert stack.load(keys, list(range(BLOCKS))) == BLOCKS, tier["backend"]


def test_a_place_that_is_not_there_yet_is_not_made(tmp_path, check):
    tiers, _ = check([{"backend": "lmdb", "capacity": "32MiB", "path": f"{tmp_path}/new/kv"}])
    assert tiers["lmdb"]["load_bytes_per_s"] > 0
    assert tiers["lmdb"]["free_bytes"] > 0
    assert [each.name for each in tmp_path.iterdir()] == ["kvbm.yaml"]


def test_nothing_is_left_in_a_shared_store(check):
    MemoryFileSystem.store.clear()
    tiers, _ = check([{"backend": "remote", "url": "memory://checked"}])
    assert tiers["remote"]["tried_objects"] == 64
    assert MemoryFileSystem.store == {}


def test_a_tier_that_others_fill_is_opened_and_not_written(check):
    tiers, _ = check([{"backend": "remote", "url": "memory://filled", "read_only": True}])
    assert tiers["remote"]["not_tried"] == "not tried: it is read-only, others fill it"


def test_the_tokens_that_fit(tmp_path, check):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["Llama-3.1-8B"]))
    tiers, found = check(
        [{"backend": "cpu", "capacity": "1GiB"}], "--model", str(config), "--prompt-tokens", "4096"
    )
    assert found["block_bytes"] == 2 << 20
    # A block of 16 tokens, with its seal, in pages.
    assert tiers["cpu"]["fits_tokens"] == (1 << 30) * 16 // ((2 << 20) + 4096)
    divided, found = check([{"backend": "cpu", "capacity": "1GiB"}], "--model", str(config), "-tp", "2")
    assert (found["block_bytes"], found["ranks"]) == (1 << 20, 2)
    assert divided["cpu"]["fits_tokens"] < tiers["cpu"]["fits_tokens"]


# ---- what is wrong, and what to write instead


@pytest.mark.parametrize(
    ("tier", "said"),
    [
        ({"backend": "lmbd", "path": "/x"}, "unknown backend 'lmbd'; did you mean 'lmdb'?"),
        ({"backend": "lmdb", "path": "/x", "capcity": 1}, "tiers[1] (lmdb): unknown key 'capcity'"),
        ({"backend": "lmdb", "path": "/proc/no", "capacity": "1GiB"}, "path: /proc"),
        ({"backend": "lmdb", "path": "/tmp", "capacity": "9000TiB"}, "its file system has only"),
        ({"backend": "remote", "url": "ess3://bucket"}, "no file system is called 'ess3'"),
        ({"backend": "memory", "capacity": "1MiB", "policy": "lfu"}, "unknown policy 'lfu'"),
        ({"backend": "memory", "capacity": "1MiB", "codecs": ["zip"]}, "unknown codec 'zip'"),
    ],
)  # fmt: skip
def test_each_tier_says_what_to_mend(check, tier, said):
    good = {"backend": "cpu", "capacity": "1MiB"}
    tiers, _ = check([good, {**tier, "name": tier["backend"]}], status=ExitCode.MEND)
    assert said in tiers[tier["backend"]]["problem"]
    assert tiers["cpu"]["problem"] is None


def test_two_tiers_in_one_place_and_a_wrong_order(tmp_path, check):
    one = {"backend": "lmdb", "capacity": "32MiB", "path": f"{tmp_path}/kv"}
    _, found = check([one, {**one, "name": "two"}], status=ExitCode.MEND)
    assert "have the same path or URL" in found["problems"][0]
    _, found = check(
        [
            {"backend": "remote", "url": f"file://{tmp_path}/remote"},
            {"backend": "cpu", "capacity": "8MiB"},
            {"backend": "memory", "capacity": "4MiB"},
        ]
    )
    assert "tier remote is remote and stands above tier cpu" in found["warnings"][0]
    assert "tier memory (capacity 4MiB) is smaller than tier cpu above it" in found["warnings"][1]


def test_a_tier_that_is_too_slow_for_the_deadlines_is_named(tmp_path, check):
    tier = {"backend": "lmdb", "capacity": "64MiB", "path": f"{tmp_path}/kv"}
    _, found = check([tier], load_deadline_s=1e-9, store_deadline_s=1e-9)
    assert [line.partition(",")[0].split()[2] for line in found["warnings"]] == ["storing", "loading"]
    assert "longer than load_deadline_s (1e-09 s)" in found["warnings"][1]


def test_an_engine_that_uses_the_place_is_named(tmp_path, check):
    tier = {"backend": "lmdb", "capacity": "32MiB", "path": f"{tmp_path}/kv"}
    with Stack.open({"tiers": [tier]}, MemoryDevice(1, BLOCK_BYTES), make_namespace({"m": 1})):
        tiers, _ = check([tier], status=ExitCode.MEND)
    assert f"is in use by another engine (pid {os.getpid()})" in tiers["lmdb"]["problem"]


STRANGER = """
from kvbm_core import Backend, ByteSize, TierConfig, hookimpl
from kvbm_core.memory import MemoryTier

class Config(TierConfig, frozen=True):
    capacity: ByteSize
    file: str = ""
    path: str = ""

class Tier(MemoryTier):
    def poll(self):
        for each in self._objects:
            self._objects[each] = bytes(len(self._objects[each]))
        return super().poll()

@hookimpl
def kvbm_backends():
    return [Backend("strange", Config, Tier, contract_version=2)]
"""


@pytest.fixture
def strange(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    info = folder / "kvbm_strange-2.5.dist-info"
    info.mkdir(parents=True)
    (folder / "kvbm_strange.py").write_text(STRANGER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvbm-strange\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text("[kvbm_core]\nstrange = kvbm_strange\n")
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("kvbm_strange", None)


def test_a_tier_that_gives_other_bytes_is_found(strange, check):
    bad = {"backend": "strange", "capacity": "8MiB", "checked": False}
    tiers, _ = check([bad], status=ExitCode.MEND)
    assert "tier strange: other bytes were read than were written" in tiers["strange"]["problem"]
    tiers, _ = check([{**bad, "checked": True}], status=ExitCode.MEND)
    assert "tier strange: load ended corrupt" in tiers["strange"]["problem"]


def test_what_a_backend_warns_of_is_told(tmp_path, check, monkeypatch):
    monkeypatch.setattr("kvbm_gds._io._NIXL_MODULES", ("no_such_nixl",))  # As where it is not installed.
    tiers, _ = check([{"backend": "gds", "capacity": "16MiB", "path": f"{tmp_path}/kv"}])
    [said] = tiers["gds"]["warnings"]
    assert "NIXL is not installed" in said


def test_a_tier_that_might_lose_what_it_has_is_not_tried(strange, check, tmp_path):
    tiers, _ = check([{"backend": "strange", "capacity": "8MiB", "file": "/var/kv"}])
    assert tiers["strange"]["not_tried"].startswith("not tried: file may say where it keeps its objects")
    tiers, _ = check([{"backend": "strange", "capacity": "8MiB", "path": "/proc/kv"}], status=ExitCode.MEND)
    assert tiers["strange"]["problem"].startswith("path: /proc cannot be used by uid ")
    (tmp_path / "file").touch()
    below = {"backend": "strange", "capacity": "8MiB", "path": f"{tmp_path}/file/kv"}
    tiers, _ = check([below], status=ExitCode.MEND)
    assert "a part of it is a file" in tiers["strange"]["problem"]
    tiers, _ = check([{"backend": "strange", "capacity": "8MiB"}], "--read-only")
    assert tiers["strange"]["not_tried"] == "not asked for"


@pytest.mark.parametrize("name", ["gds", "lmdb", "remote"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file/kv", "[Errno 20] Not a directory), so {place}"),
        ("file/kv", "a part of it is a file: write a directory on a local disk"),
        ("dangling/kv", "dangling leads to /no/such, which is not there: make it, or remove the link"),
        ("x" * 256, "write a shorter path (255 bytes for a name, 4095 for all)"),
        ("missing/" + "x" * 256 + "/kv", "write a shorter path (255 bytes for a name, 4095 for all)"),
        ("xxxxxxxxx/" * 500, "write a shorter path (255 bytes for a name, 4095 for all)"),
    ],
)
def test_a_place_that_cannot_be_made_is_refused(tmp_path, check, name, place, said):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("/no/such")
    where = f"{tmp_path}/{place}"
    entry = {"backend": name, "capacity": "16MiB", "path": where}
    if name == "remote":
        entry = {"backend": name, "url": f"file://{where}"}
    tiers, _ = check([entry], status=ExitCode.MEND)
    assert tiers[name]["problem"].startswith(
        f"tier {name}: {'url' if name == 'remote' else 'path'}: {tmp_path}"
    )
    assert said.format(place=where) in tiers[name]["problem"]


# ---- where it reads


def sources(capsys, *arguments, status=0):
    capsys.readouterr()
    assert kvbm(["check", *arguments, "--json", "--block-bytes", "64KiB"]) == status
    out = capsys.readouterr()
    return published("check", out.out) if out.out else out.err


def test_what_vllm_is_given_is_read(tmp_path, capsys):
    tiers = [{"backend": "cpu", "capacity": "1MiB"}]
    ours = {"kv_connector": "KvbmConnector", "kv_role": "kv_both"}
    given = {**ours, "kv_connector_extra_config": {"tiers": tiers}}
    children = {"connectors": [{"kv_connector": "NixlConnector"}, given]}
    both = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": children}
    file = tmp_path / "kvbm.yaml"
    file.write_text(yaml.safe_dump({"tiers": tiers}))
    named = {**ours, "kv_connector_extra_config": {"config": str(file)}}
    for source in ({"tiers": tiers}, given, both, named):
        found = sources(capsys, json.dumps(source))
        assert [tier["name"] for tier in found["tiers"]] == ["cpu"]
        assert found["source"] == "the JSON given"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{", "CONFIG: begins with { and is no JSON"),
        ('{"kv_connector": "NixlConnector"}', "kv_connector: 'NixlConnector'; write 'KvbmConnector'"),
        ('{"kv_connector": "KvbmConnector", "kv_role": "kv_producer"}', "kv_role: 'kv_producer'"),
        ('{"kv_connector": "KvbmConnector", "kv_role": "kv_both"}', "kv_connector_extra_config is empty"),
        ('{"tires": []}', "unknown key 'tires'; did you mean 'tiers'?"),
        ('{"tiers": [], "config": "x"}', "'config': 'x' names a file"),
        ("/no/such.yaml", "configuration file /no/such.yaml: No such file or directory"),
    ],
)
def test_what_cannot_be_read_is_wrong(capsys, source, said):
    assert said in sources(capsys, source, status=ExitCode.WRONG)


def test_kvbms_variables_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_GB", "0.001")
    monkeypatch.setenv("DYN_KVBM_DISK_CACHE_GB", "0.1")
    monkeypatch.setenv("DYN_KVBM_DISK_CACHE_DIR", str(tmp_path))
    found = sources(capsys)
    assert {tier["name"]: tier["capacity_bytes"] for tier in found["tiers"]} == {
        "cpu": 10**6, "gds": 10**8,
    }  # fmt: skip
    assert found["source"] == "the environment"
    assert "both say what the tiers are" in sources(capsys, '{"tiers": []}', status=ExitCode.WRONG)
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", "10")
    assert "the bytes of this model's blocks are not known" in sources(capsys, status=ExitCode.WRONG)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["Llama-3.1-8B"]))
    [cpu, _] = sources(capsys, "--model", str(config))["tiers"]
    assert cpu["capacity_bytes"] >= 10 * (2 << 20)
    monkeypatch.setenv("DYN_KVBM_CPU_CASH_GB", "1")
    assert "did you mean DYN_KVBM_CPU_CACHE_GB" in sources(capsys, status=ExitCode.WRONG)


def test_it_needs_the_core_typer_and_rich_alone(tmp_path):
    file, model = tmp_path / "kvbm.yaml", tmp_path / "config.json"
    file.write_text("tiers: [{backend: cpu, capacity: 8MiB}]")
    model.write_text(json.dumps(CONFIGS["gpt-oss-120b"]))
    program = (
        "import sys\n"
        "for name in ('vllm', 'torch', 'numpy', 'prometheus_client', 'lmdb', 'httpx', 'fsspec', 'obstore'):\n"
        "    sys.modules[name] = None\n"
        "from kvbm_cli._app import run\n"
        "file, model, folder = sys.argv[1:]\n"
        "verbs = (['check', file, '--model', model], ['size', model], ['doctor', file],\n"
        "         ['metrics', 'copy', folder])\n"
        "print([int(run(words)) for words in verbs])\n"
    )
    command = [sys.executable, "-c", program, file, model, tmp_path / "deploy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("\n[0, 0, 0, 0]\n"), done.stdout + done.stderr
    assert "works" in done.stdout


def test_quotas_that_no_tier_can_hold_are_found(check):
    tiers = [{"backend": "memory", "capacity": "4MiB"}]
    _, found = check(tiers, status=ExitCode.MEND, tenants={"a": {"memory": "5MiB"}})
    assert "tenants: a: memory: the quotas add up to 5MiB" in found["problems"][0]


# `kvbm bench tier`


@pytest.fixture
def bench(tmp_path, capsys):
    """Gives a function that measures tiers, and gives what was found by the tier's name, and of all."""

    def run(tiers, *arguments, status=0):
        file = tmp_path / "kvbm.yaml"
        file.write_text(yaml.safe_dump({"tiers": tiers}))
        capsys.readouterr()
        assert kvbm(["bench", "tier", str(file), "--json", "--block-bytes", "64KiB", *arguments]) == status
        found = published("bench tier", capsys.readouterr().out)
        return {each["name"]: each for each in found["tiers"]}, found

    return run


def test_each_tier_is_measured_as_often_as_asked_for_and_left_as_it_was(tmp_path, bench, capsys, monkeypatch):
    place = tmp_path / "tiers"
    place.mkdir()
    tiers, found = bench(everywhere(place), "--objects", "80", "--rounds", "3")
    assert (found["block_bytes"], found["depth"], found["rounds"]) == (1 << 16, None, 3)
    assert list(tiers) == ["cpu", "gds", "lmdb", "remote"]
    for tier in tiers.values():
        assert tier["store_bytes_per_s"] == sorted(tier["stores"])[1] > 0
        assert tier["load_bytes_per_s"] == sorted(tier["loads"])[1] > 0
        assert len(tier["stores"]) == len(tier["loads"]) == 3
        assert tier["not_compared"] is None
        assert min(tier["store_ratio"], tier["load_ratio"], tier["bare_store_bytes_per_s"]) > 0
    first = [tier["bare"].split()[0] for tier in tiers.values()]
    assert first == ["memmove,", "pwrite", "py-lmdb,", "LocalFileSystem"]
    # 4 MiB, of which each object has its seal, in pages.
    assert (tiers["cpu"]["objects"], tiers["remote"]["objects"]) == ((4 << 20) // ((1 << 16) + 4096), 80)
    assert tree(place) == []
    monkeypatch.setenv("COLUMNS", "160")
    assert kvbm(["bench", "tier", str(tmp_path / "kvbm.yaml"), "--objects", "2", "--rounds", "1"]) == 0
    assert capsys.readouterr().out.count("B/s") == 8


def test_no_more_objects_are_on_their_way_than_asked_for(monkeypatch, bench):
    seen, submit = [], MemoryTier.submit

    def counted(self, transfers):
        seen.append(len(transfers))
        return submit(self, transfers)

    monkeypatch.setattr(MemoryTier, "submit", counted)
    tiers, _ = bench(
        [{"backend": "memory", "capacity": "4MiB"}], "--objects", "10", "--depth", "3", "--rounds", "1"
    )
    assert tiers["memory"]["not_compared"] == "its backend gives no bare medium"
    assert sum(seen) == 20
    assert max(seen) == 3


def test_a_tier_that_cannot_be_measured_is_named_and_harms_no_other(tmp_path, bench):
    wrong = {"backend": "lmdb", "capacity": "32MiB", "path": f"{tmp_path}/kv", "shelves": 3}
    filled = {"backend": "remote", "url": "memory://filled", "read_only": True}
    tiers, _ = bench([{"backend": "cpu", "capacity": "4MiB"}, wrong, filled], status=ExitCode.MEND)
    assert tiers["cpu"]["problem"] is None
    assert "shelves" in tiers["lmdb"]["problem"]
    assert tiers["remote"]["not_tried"].startswith("not tried: it is read-only")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--block-bytes", "0"], "write a size above 0"), (["--objects", "0"], "greater than or equal to 1")],
)
def test_an_option_of_the_measurement_that_cannot_be_used_is_named(tmp_path, capsys, arguments, said):
    file = tmp_path / "kvbm.yaml"
    file.write_text(yaml.safe_dump({"tiers": [{"backend": "cpu", "capacity": "4MiB"}]}))
    assert kvbm(["bench", "tier", str(file), *arguments]) == ExitCode.WRONG
    assert said in capsys.readouterr().err
