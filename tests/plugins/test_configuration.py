"""A mistake in the configuration is found before vLLM loads a model, and says what to change."""

import pytest

from kvbm_core import Stack
from kvbm_core.testing import MemoryDevice

pytestmark = pytest.mark.engine

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
            ["capacity '4KiB'", "smaller than one block of 24,576 bytes"],
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


def test_loaded_by_module_path(llama):
    configure(llama, [CPU], kv_connector_module_path="kvbm_vllm")
