"""A mistake in the configuration is found before vLLM loads a model, and says what to change."""

import logging
import pickle

import pytest
from models import write_config

from kvbm_core import Stack
from kvbm_core.testing import MemoryDevice

pytestmark = pytest.mark.vllm

CPU = {"backend": "cpu", "capacity": "64MiB"}


def configure(model, tiers, *, engine=None, **transfer):
    """What `vllm serve` does before it starts an engine."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    settings = {
        "kv_connector": "KvbmConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"tiers": tiers},
    }
    options = {"dtype": "bfloat16", "block_size": 32, "max_model_len": 4096, **(engine or {})}
    return EngineArgs(
        model=str(model), skip_tokenizer_init=True, **options,
        kv_transfer_config=KVTransferConfig(**{**settings, **transfer}),
    ).create_engine_config()  # fmt: skip


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        ([{"backend": "cpuu", "capacity": "1GiB"}], ["cpuu", "did you mean 'cpu'?"]),
        (
            [{"backend": "cpu", "capcity": "1GiB"}],
            ["tiers[0] (cpu)", "'capcity'", "did you mean 'capacity'?"],
        ),
        ([{"backend": "cpu", "capacity": "1Gigabyte"}], ["capacity", "1Gigabyte", "like 8GiB"]),
        (
            [{"backend": "cpu", "capacity": "4KiB"}],
            ["capacity '4KiB'", "smaller than one block of 24KiB"],
        ),
        ([CPU, {"backend": "lmdb", "capacity": "1GiB", "path": "/dev/null/kv"}], ["/dev/null"]),
        ([CPU, CPU], ["two tiers are called 'cpu'", "'name'"]),
        ([], ["tiers", "at least one tier"]),
    ],
)
def test_a_mistake_names_the_key_the_value_and_what_to_write(llama, tiers, words):
    with pytest.raises(Exception) as caught:
        configure(llama, tiers)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_top_level_key_names_the_nearest(llama):
    with pytest.raises(Exception, match="did you mean 'load_deadline_s'"):
        configure(llama, [CPU], kv_connector_extra_config={"tiers": [CPU], "load_deadline": 3})


def test_a_coordinators_mistake_is_found_as_early(llama):
    entry = {"backend": "etcd", "endpoints": ["http://nowhere:1"]}
    extra = {"tiers": [CPU], "coordinator": entry}
    configure(llama, [CPU], kv_connector_extra_config=extra)
    with pytest.raises(Exception, match="unknown key 'lease'; did you mean 'lease_s'"):
        configure(llama, [CPU], kv_connector_extra_config={**extra, "coordinator": {**entry, "lease": 1}})


def test_the_role_must_be_both(llama):
    with pytest.raises(Exception, match='write "kv_both"'):
        configure(llama, [CPU], kv_role="kv_producer")


def test_a_directory_in_use_names_its_owner(llama, tmp_path):
    tier = {"backend": "lmdb", "capacity": "64MiB", "path": str(tmp_path / "kv")}
    with (
        Stack.open({"tiers": [tier]}, MemoryDevice(4, 4096), bytes(16)),
        pytest.raises(Exception, match=r"in use.*path"),
    ):
        configure(llama, [CPU, tier])


def test_a_file_is_read_and_nothing_beside_it(llama, tmp_path):
    file = tmp_path / "stack.yaml"
    file.write_text("tiers:\n  - {backend: cpu, capacity: 64MiB}\n")
    configure(llama, None, kv_connector_extra_config={"config": str(file)})
    with pytest.raises(Exception, match="must be written there"):
        configure(llama, None, kv_connector_extra_config={"config": str(file), "tiers": [CPU]})


def test_a_mistake_in_a_file_names_the_file(llama, tmp_path):
    file = tmp_path / "stack.yaml"
    for text, words in (
        ("{backend: cpu, capcity: 64MiB}", "unknown key 'capcity'"),
        ("{backend: cpu, capacity: 4KiB}", "smaller than one block"),
        ("{backend: cpu}", "missing key 'capacity'"),
        (
            "{backend: gds, path: /x, capacity: 1GiB, engine: fast}",
            "engine: not one of auto, gds, posix, threads",
        ),
    ):
        file.write_text(f"tiers:\n  - {text}\n")
        with pytest.raises(Exception, match=rf"stack\.yaml: .*{words}"):
            configure(llama, None, kv_connector_extra_config={"config": str(file)})


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"confg": "stack.yaml"}, "unknown key 'confg'; did you mean 'config'"),
        (
            {"config": "stack.yaml", "load_deadlin_s": 3},
            "unknown key 'load_deadlin_s'; did you mean 'load_deadline_s'",
        ),
    ],
)
def test_an_unknown_key_beside_config_names_the_nearest(llama, extra, words):
    with pytest.raises(Exception, match=f"kv_connector_extra_config: {words}"):
        configure(llama, None, kv_connector_extra_config=extra)


@pytest.mark.parametrize(("hosts", "refused"), [(1, True), (2, False)])
def test_memory_of_several_hosts_is_checked_by_each_hosts_share(llama, monkeypatch, hosts, refused):
    """vLLM makes no configuration of two hosts on one without the second, so its number is put there."""
    from kvbm_cpu._memory import available_memory
    from kvbm_vllm._settings import check_settings

    config = configure(llama, [CPU])
    monkeypatch.setattr(config.parallel_config, "nnodes", hosts)
    capacity = available_memory()[0] * 3 // 2
    extra = {"tiers": [{"backend": "cpu", "capacity": capacity}]}
    monkeypatch.setattr(config.kv_transfer_config, "kv_connector_extra_config", extra)
    if refused:
        with pytest.raises(Exception, match="all ranks together"):
            check_settings(config)
    else:
        check_settings(config)


def test_a_stack_where_a_files_path_belongs_is_told_where_to_write_it_and_not_shown(llama):
    tier = {**CPU, "password": "S3CRET"}
    with pytest.raises(Exception, match="'config': a dict; write the path of a YAML file") as caught:
        configure(llama, None, kv_connector_extra_config={"config": {"tiers": [tier]}})
    assert "S3CRET" not in str(caught.value)


def test_loaded_by_module_path(llama):
    configure(llama, [CPU], kv_connector_module_path="kvbm_vllm")


# In a MultiConnector.

NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
THEIRS = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def ours(**extra):
    return {"kv_connector": "KvbmConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def several(*connectors):
    return {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": list(connectors)}}


@pytest.mark.parametrize(
    ("children", "words"),
    [
        ([ours(tiers=[{"backend": "cpu", "capcity": "1GiB"}]), THEIRS], ["'capcity'", "mean 'capacity'?"]),
        ([THEIRS, ours(tiers=[CPU], load_deadline=3)], ["did you mean 'load_deadline_s'"]),
        (
            [THEIRS, {"kv_role": "kv_both", **several(ours(tiers=[CPU], load_deadline=3), THEIRS)}],
            ["did you mean 'load_deadline_s'"],
        ),
        ([{**ours(tiers=[CPU]), "kv_role": "kv_producer"}, THEIRS], ['write "kv_both"']),
        (
            [{**ours(tiers=[CPU]), "load_deadline_s": 3}, THEIRS],
            ["KvbmConnector in 'connectors' has 'load_deadline_s'"],
        ),
        (
            [{"kv_connector": "KvbmConnector", "kv_role": "kv_both", "tiers": [CPU]}, THEIRS],
            ["KvbmConnector in 'connectors' has 'tiers'", "write it in the 'kv_connector_extra_config'"],
        ),
        ([ours(tiers=[CPU]), ours(tiers=[CPU])], ["2 of them are KvbmConnector", "write one"]),
    ],
)
def test_ours_among_several_is_checked_as_one_that_is_alone(llama, children, words):
    with pytest.raises(Exception) as caught:
        configure(llama, None, **several(*children))
    for word in words:
        assert word in str(caught.value)


def test_settings_of_ours_beside_connectors_are_refused(llama):
    transfer = several(ours(tiers=[CPU]), THEIRS)
    transfer["kv_connector_extra_config"]["load_deadline_s"] = 3
    with pytest.raises(
        Exception, match="of MultiConnector has 'load_deadline_s', where no connector finds it"
    ):
        configure(llama, None, **transfer)


def test_a_model_is_refused_for_ours_among_several_too(tmp_path):
    with pytest.raises(Exception, match="not causal"):
        configure(
            write_config(tmp_path, "bert"),
            None,
            engine={"max_model_len": 512, "runner": "pooling"},
            **several(THEIRS, ours(tiers=[CPU])),
        )


@pytest.mark.parametrize(
    "children",
    [
        [ours(tiers=[CPU]), THEIRS],
        [THEIRS, {"kv_role": "kv_both", **several(THEIRS, ours(tiers=[CPU]))}],
        [{**ours(tiers=[CPU]), "kv_load_failure_policy": "recompute"}, THEIRS],
    ],
)
def test_what_cannot_be_loaded_is_computed_whoever_failed(llama, children, caplog):
    """vLLM's scheduler reads the setting of the MultiConnector, in another process as a rule."""
    logging.getLogger("kvbm_vllm").propagate = True
    with caplog.at_level(logging.INFO, "kvbm_vllm"):
        config = configure(llama, None, **several(*children))
    assert pickle.loads(pickle.dumps(config)).kv_transfer_config.kv_load_failure_policy == "recompute"
    [line] = [each.message for each in caplog.records if "kv_load_failure_policy" in each.message]
    assert "by any of its connectors" in line


def test_connectors_without_ours_are_left_alone(llama):
    config = configure(llama, None, **several(THEIRS, THEIRS))
    assert config.kv_transfer_config.kv_load_failure_policy == "fail"


@pytest.mark.parametrize("path", [None, "kvbm.vllm_integration.connector", "kvbm_vllm"])
def test_the_pair_of_nvidias_kvbm_is_told_what_takes_its_place(llama, path):
    dynamo = {"kv_connector": "DynamoConnector", "kv_role": "kv_both", "kv_connector_module_path": path}
    children = {"kv_connector_extra_config": {"connectors": [dynamo, NIXL]}}
    with pytest.raises(Exception) as caught:
        configure(llama, None, kv_connector="PdConnector", kv_connector_module_path=path, **children)
    for word in ["kv_connector: 'PdConnector'", 'Write "MultiConnector"', "kv_connector_module_path away"]:
        assert word in str(caught.value)


def test_what_the_pair_is_told_to_write_is_accepted(llama, monkeypatch):
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_GB", "0.1")
    path = "kvbm.vllm_integration.connector"
    dynamo = {"kv_connector": "DynamoConnector", "kv_role": "kv_both", "kv_connector_module_path": path}
    configure(llama, None, **several(dynamo, THEIRS))


def test_what_a_strangers_backend_logs_goes_where_vllms_lines_go(tmp_path, monkeypatch):
    from kvbm_vllm._logging import share_log

    metadata = tmp_path / "kvbm_shelf-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kvbm-shelf\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[kvbm_core]\nshelf = kvbm_shelf.tiers\n")
    monkeypatch.syspath_prepend(tmp_path)
    handler = logging.NullHandler()
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [handler])
    share_log()
    assert all(
        handler in logging.getLogger(name).handlers for name in ("kvbm_shelf", "kvbm_lmdb", "kvbm_core")
    )
    monkeypatch.undo()
    share_log()


def test_a_line_comes_once_where_vllm_makes_its_handlers_anew(monkeypatch):
    """As it does in a process that it forks."""
    from kvbm_vllm._logging import share_log

    theirs, ours = logging.getLogger("vllm"), logging.getLogger("kvbm_core")
    share_log()
    before = list(ours.handlers)
    anew, own = logging.NullHandler(), logging.NullHandler()
    monkeypatch.setattr(theirs, "handlers", [anew])
    monkeypatch.setattr(ours, "handlers", [*before, own])
    share_log()
    assert ours.handlers == [own, anew]
    monkeypatch.undo()
    share_log()
    assert anew not in ours.handlers
