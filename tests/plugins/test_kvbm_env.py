"""KVBM's environment variables: each does what the table says, and the documentation shows the table."""

import importlib
import math
import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from kvbm_core import ConfigError, StackConfig, check_stack, load_config
from kvbm_vllm.kvbm import (
    VARIABLES,
    Use,
    answer_module_paths,
    check_environment,
    explain,
    leads_here,
    makes_stack,
    read_tiers,
)

PAGE = Path(__file__).parent.parent.parent / "docs" / "how-to" / "from-kvbm.md"
BLOCK_BYTES = 1 << 20

OF_THE_WHEEL = re.findall(
    r"\S+",
    """
    DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS DYN_KVBM_CACHE_STATS_MAX_REQUESTS DYN_KVBM_CPU_CACHE_GB
    DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER
    DYN_KVBM_DISABLE_WRITE_COMBINED DYN_KVBM_DISK_ALLOCATOR_TYPE DYN_KVBM_DISK_CACHE_DIR
    DYN_KVBM_DISK_CACHE_GB DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS DYN_KVBM_DISK_DISABLE_O_DIRECT
    DYN_KVBM_DISK_ZEROFILL_FALLBACK DYN_KVBM_ENABLE_NUMA DYN_KVBM_ENABLE_RECORD
    DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE
    DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS
    DYN_KVBM_LEADER_ZMQ_ACK_PORT DYN_KVBM_LEADER_ZMQ_HOST DYN_KVBM_LEADER_ZMQ_PUB_PORT
    DYN_KVBM_MAX_CONCURRENT_TRANSFERS DYN_KVBM_MAX_TRANSFER_BATCH_SIZE DYN_KVBM_METRICS
    DYN_KVBM_METRICS_PORT DYN_KVBM_NCCL_MAX_CTAS DYN_KVBM_NCCL_MLA_MODE DYN_KVBM_TRTLLM_ZMQ_PORT
    DYN_MEMORY_DISABLE_NUMA DYN_RUNTIME_ENABLED_KVBM
    """,
)
"""The names in the files of the wheel kvbm 1.6.1."""

SIZES = {"DYN_KVBM_CPU_CACHE_GB": "4", "DYN_KVBM_DISK_CACHE_GB": "8"}


def tiers(environ, world_size=1, block_bytes=BLOCK_BYTES, engines=1):
    check_environment(environ)
    return read_tiers(environ, lambda: block_bytes, world_size, engines)


def test_the_table_has_every_variable_of_the_wheel_once():
    names = [variable.name for variable in VARIABLES]
    assert len(names) == len(set(names))
    assert set(OF_THE_WHEEL) <= set(names)


def test_the_documentation_shows_the_table():
    shown = re.findall(
        r"^\| `(DYN_\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE
    )
    written = [
        (each.name, each.use.value, " or ".join(f"`{value}`" for value in each.accepts) or "-", each.text)
        for each in VARIABLES
    ]
    assert shown == written


# One row each.


@pytest.mark.parametrize("variable", [v for v in VARIABLES if v.use is Use.REFUSED], ids=lambda v: v.name)
@pytest.mark.parametrize("value", ["0", "something"])
def test_a_refused_variable_says_what_to_do(variable, value):
    with pytest.raises(ConfigError) as caught:
        check_environment({variable.name: value})
    shown = "(hidden)" if variable.name.endswith("_KEY") else value
    assert f"{variable.name}={shown}: {variable.text}" in str(caught.value)


@pytest.mark.parametrize("variable", [v for v in VARIABLES if v.use is Use.FIXED], ids=lambda v: v.name)
def test_a_fixed_variable_takes_what_is_so_anyway_and_nothing_else(variable):
    for value in variable.accepts:
        check_environment({variable.name: value})
        assert explain({variable.name: value}) == [f"{variable.name}={value}: {variable.text}"]
    other = "true" if variable.accepts == ("false",) else "false" if variable.accepts == ("true",) else "7"
    with pytest.raises(ConfigError) as caught:
        check_environment({variable.name: other})
    for word in (f"{variable.name}={other}", variable.text, variable.accepts[0]):
        assert word in str(caught.value)


@pytest.mark.parametrize("variable", [v for v in VARIABLES if v.use is Use.PLUGIN], ids=lambda v: v.name)
def test_a_plugins_variable_is_left_to_it(variable):
    check_environment({variable.name: "1"})
    assert makes_stack({variable.name: "1"}) == []
    assert explain({variable.name: "1"}) == [f"{variable.name}=1: {variable.text}"]
    assert re.search(r"`kvbm_\w+`", variable.text)


def test_a_port_of_dynamos_is_said_to_be_nobodys_and_stops_nothing():
    check_environment({"DYN_SYSTEM_PORT": "8081"})
    [line] = explain({"DYN_SYSTEM_PORT": "8081"})
    assert line.startswith("DYN_SYSTEM_PORT=8081: The port of Dynamo's runtime")
    assert "DYN_KVBM_METRICS_PORT" in line


GDS = {"backend": "gds", "capacity": 8 * 10**9, "path": f"/tmp/kvbm-{os.geteuid()}", "queue_depth": 64}
STACKS = {
    "DYN_KVBM_CPU_CACHE_GB": ("0.5", [{"backend": "cpu", "capacity": 5 * 10**8}, GDS]),
    "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": (
        "10", [{"backend": "cpu", "capacity": 10 * (BLOCK_BYTES + 4096)}, GDS],
    ),
    "DYN_KVBM_DISK_CACHE_GB": ("0", [{"backend": "cpu", "capacity": 4 * 10**9}]),
    "DYN_KVBM_DISK_CACHE_DIR": (
        "/nvme", [{"backend": "cpu", "capacity": 4 * 10**9}, {**GDS, "path": f"/nvme/kvbm-{os.geteuid()}"}],
    ),
    "DYN_KVBM_MAX_CONCURRENT_TRANSFERS": (
        "8", [{"backend": "cpu", "capacity": 4 * 10**9}, {**GDS, "queue_depth": 128}],
    ),
    "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE": (
        "1", [{"backend": "cpu", "capacity": 4 * 10**9}, {**GDS, "queue_depth": 4}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_a_variable_that_makes_the_stack_changes_it(name):
    value, expected = STACKS[name]
    assert tiers(SIZES) == [{"backend": "cpu", "capacity": 4 * 10**9}, GDS]
    assert tiers({**SIZES, name: value}) == expected
    load_config({"tiers": expected})


def test_every_variable_that_makes_the_stack_has_a_row():
    stack = {variable.name for variable in VARIABLES if variable.use is Use.STACK}
    assert stack == {*STACKS, "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS"}


@pytest.mark.parametrize("blocks", [1, 37, 1000])
@pytest.mark.parametrize(("world_size", "engines"), [(1, 1), (2, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("medium", ["CPU", "DISK"])
def test_a_number_of_blocks_is_what_the_tiers_of_all_engines_hold(
    medium, world_size, engines, blocks, tmp_path
):
    from kvbm_core import TierContext
    from kvbm_core.config import convert
    from kvbm_core.layers import SEAL_BYTES
    from kvbm_core.registry import Registry

    name = f"DYN_KVBM_{medium}_CACHE_OVERRIDE_NUM_BLOCKS"
    environ = {name: str(blocks), "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path)}
    [entry] = load_config({"tiers": tiers(environ, world_size, 3 * 32768, engines)}).tiers
    backend = Registry().backend(entry.backend)
    settings = convert(entry.settings, backend.config_type, "tiers[0]")
    nbytes = 3 * 32768 // world_size + SEAL_BYTES
    context = TierContext(bytes(16), nbytes, world_size=world_size * engines)
    tier = backend.open(settings, context)
    try:
        capabilities = tier.capabilities
        assert capabilities.capacity_bytes // capabilities.charge(nbytes) == math.ceil(blocks / engines)
    finally:
        tier.close()


# What a user may get wrong.


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"DYN_KVBM_CPU_CACHE_GIB": "4"}, ["DYN_KVBM_CPU_CACHE_GIB=4", "mean DYN_KVBM_CPU_CACHE_GB?"]),
        ({"DYN_KVBM_CPU_CACHE_GB": "4GB"}, ["DYN_KVBM_CPU_CACHE_GB=4GB", "like 4 or 0.5"]),
        ({"DYN_KVBM_CPU_CACHE_GB": "nan"}, ["DYN_KVBM_CPU_CACHE_GB=nan"]),
        ({"DYN_KVBM_CPU_CACHE_GB": "-1"}, ["DYN_KVBM_CPU_CACHE_GB=-1"]),
        ({"DYN_KVBM_CPU_CACHE_GB": "0"}, ["no tier has a size", "DYN_KVBM_DISK_CACHE_GB"]),
        ({"DYN_KVBM_DISK_CACHE_DIR": "/nvme"}, ["DYN_KVBM_DISK_CACHE_DIR", "no tier has a size"]),
        ({"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "1.5"}, ["=1.5", "whole number"]),
        ({**SIZES, "DYN_KVBM_MAX_CONCURRENT_TRANSFERS": "0"}, ["DYN_KVBM_MAX_CONCURRENT_TRANSFERS=0"]),
        ({**SIZES, "DYN_KVBM_MAX_CONCURRENT_TRANSFERS": "65"}, ["=65", "at most 1024"]),
    ],
)  # fmt: skip
def test_a_mistake_names_the_variable_the_value_and_what_to_write(environ, words):
    with pytest.raises(ConfigError) as caught:
        tiers(environ)
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_are_named_at_once():
    environ = {"DYN_KVBM_SLEEP": "1", "DYN_KVBM_ENABLE_RECORD": "yes", "DYN_KVBM_NEW_THING": "x"}
    with pytest.raises(ConfigError) as caught:
        check_environment({**environ, "PATH": "/bin", "DYN_SYSTEM_PORT": "1"})
    assert all(f"{name}={value}: " in str(caught.value) for name, value in environ.items())
    assert str(caught.value).count("\n") == 3


def test_what_is_empty_is_not_set():
    environ = {**dict.fromkeys((v.name for v in VARIABLES), ""), **SIZES, "DYN_KVBM_WHATEVER": " "}
    assert tiers(environ) == tiers(SIZES)


def test_blocks_of_a_model_that_is_not_understood_are_asked_for_in_gigabytes():
    with pytest.raises(
        ConfigError, match=r"DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS=9: .* DYN_KVBM_DISK_CACHE_GB"
    ):
        tiers({"DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "9"}, block_bytes=None)


def test_a_directory_that_is_not_this_users_is_refused(tmp_path):
    """`/tmp` is everybody's: whoever made the directory first could read prompts from it."""
    environ = {"DYN_KVBM_DISK_CACHE_GB": "1", "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path)}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"kvbm-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is not a directory of uid"):
        tiers(environ)


def test_the_stack_is_one_that_can_be_opened(tmp_path):
    environ = {"DYN_KVBM_CPU_CACHE_GB": "0.01", "DYN_KVBM_DISK_CACHE_GB": "0.02",
               "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path)}  # fmt: skip
    config = load_config({"tiers": tiers(environ)})
    assert isinstance(config, StackConfig)
    check_stack(config, block_bytes=BLOCK_BYTES)


# In vLLM's configuration, before a model is loaded.


def configure(model, environ, monkeypatch, **transfer):
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    settings = {"kv_connector": "DynamoConnector", "kv_role": "kv_both", **transfer}
    return EngineArgs(
        model=str(model), skip_tokenizer_init=True, dtype="bfloat16", block_size=32, max_model_len=4096,
        kv_transfer_config=KVTransferConfig(**settings),
    ).create_engine_config()  # fmt: skip


PATHS = [None, "kvbm_vllm", "kvbm.vllm_integration.connector", "dynamo.llm.vllm_integration.connector"]


@pytest.mark.vllm
@pytest.mark.parametrize("path", PATHS)
def test_the_guides_connector_is_found_by_any_of_its_paths(llama, tmp_path, monkeypatch, path):
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from kvbm_vllm import KvbmConnector
    from kvbm_vllm._settings import read_settings

    environ = {**SIZES, "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path)}
    config = configure(llama, environ, monkeypatch, kv_connector_module_path=path)
    assert KVConnectorFactory.get_connector_class(config.kv_transfer_config) is KvbmConnector
    assert [tier.backend for tier in read_settings(config).tiers] == ["cpu", "gds"]
    with pytest.raises(Exception, match="DYN_KVBM_SLEEP=1: "):
        configure(llama, {"DYN_KVBM_SLEEP": "1"}, monkeypatch, kv_connector_module_path=path)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "extra", [{"tiers": [{"backend": "cpu", "capacity": "64MiB"}]}, {"config": "kvbm.yaml"}]
)
def test_tiers_in_both_places_are_refused_and_both_are_named(llama, monkeypatch, extra):
    with pytest.raises(Exception, match=rf"has '{next(iter(extra))}', .* DYN_KVBM_CPU_CACHE_GB: both say"):
        configure(llama, {"DYN_KVBM_CPU_CACHE_GB": "1"}, monkeypatch, kv_connector_extra_config=extra)


def install(folder, monkeypatch, name, version):
    """Make a distribution known, as pip would."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def fresh():
    """Modules as in a process that has imported nothing of NVIDIA's yet, and again so after the test."""
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("kvbm", "dynamo")}
    for name in kept:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("kvbm", "dynamo")]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("path", PATHS[2:])
def test_a_path_of_the_guides_is_a_module_only_once_it_is_imported(path):
    from kvbm_vllm import KvbmConnector

    answer_module_paths()
    assert path not in sys.modules
    assert path.split(".")[0] not in sys.modules
    module = importlib.import_module(path)
    assert module.DynamoConnector is module.KvbmConnector is KvbmConnector
    assert leads_here(path)
    with pytest.raises(AttributeError):
        _ = module.PdConnector
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{path}.other")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("kvbm.other")


@pytest.mark.usefixtures("fresh")
def test_where_nvidias_package_is_installed_its_path_leads_to_it(tmp_path, monkeypatch):
    theirs, older = PATHS[2:]
    install(tmp_path, monkeypatch, "kvbm", "1.6.1")
    answer_module_paths()
    assert not leads_here(theirs)
    assert leads_here(older)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(theirs)
    folder = tmp_path / "kvbm" / "vllm_integration"
    folder.mkdir(parents=True)
    (folder / "connector.py").write_text("class DynamoConnector: ...\n")
    importlib.invalidate_caches()
    assert importlib.import_module(theirs).DynamoConnector.__module__ == theirs


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("init", [True, False])
def test_the_older_path_leads_here_beside_an_ai_dynamo_that_has_other_modules(tmp_path, monkeypatch, init):
    """A stand-in for ai-dynamo, with a package and as a namespace: the real wheel was not tried."""
    from kvbm_vllm import KvbmConnector

    package = tmp_path / "dynamo"
    (package / "vllm").mkdir(parents=True)
    (package / "vllm" / "__init__.py").write_text("theirs = True\n")
    if init:
        (package / "__init__.py").write_text("")
    install(tmp_path, monkeypatch, "ai_dynamo", "1.6.1")
    answer_module_paths()
    assert importlib.import_module("dynamo.vllm").theirs
    assert leads_here(PATHS[3])
    assert importlib.import_module(PATHS[3]).DynamoConnector is KvbmConnector
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dynamo.other")


@pytest.mark.usefixtures("fresh")
def test_a_module_of_that_name_without_a_distribution_wins_too(tmp_path, monkeypatch):
    theirs = PATHS[2]
    folder = tmp_path / "kvbm" / "vllm_integration"
    folder.mkdir(parents=True)
    (folder / "connector.py").write_text("class DynamoConnector: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    answer_module_paths()
    assert not leads_here(theirs)
    assert importlib.import_module(theirs).DynamoConnector.__module__ == theirs


@pytest.mark.vllm
def test_other_keys_stand_beside_the_environment(llama, monkeypatch):
    from kvbm_vllm._settings import read_settings

    extra = {"load_deadline_s": 2}
    config = configure(llama, {"DYN_KVBM_CPU_CACHE_GB": "1"}, monkeypatch, kv_connector_extra_config=extra)
    assert read_settings(config).load_deadline_s == 2


@pytest.mark.vllm
def test_without_any_size_the_error_names_both_ways(llama, monkeypatch):
    with pytest.raises(Exception, match=r"'tiers' or 'config'.*DYN_KVBM_CPU_CACHE_GB"):
        configure(llama, {}, monkeypatch)


@pytest.mark.vllm
def test_a_number_of_blocks_follows_from_the_model_and_is_for_all_ranks(llama, monkeypatch):
    from kvbm_vllm._settings import read_settings

    config = configure(llama, {"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "100"}, monkeypatch)
    # 3 layers of K and V of 2 heads of 32 numbers of 2 bytes, for 32 tokens: 24,576, and the footer.
    assert read_settings(config).tiers[0].settings["capacity"] == 100 * 28672
