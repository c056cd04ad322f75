"""What the connector overrides and reads of vLLM, against the version that is installed; see `tools/surface`.

`make compat` compares the same with every version that is promised.
"""

import functools
import importlib
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
surface = importlib.import_module("surface")
examine, judge = surface.examine, surface.judge

PLUGIN = ROOT / "plugins" / "kvbm_vllm"
ENGINE = ROOT / "plugins" / "kvbm_engine"
BASE = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"


def installed():
    [folder] = importlib.util.find_spec("vllm").submodule_search_locations
    return Path(folder).parent


@pytest.fixture
def changed(tmp_path):
    """Give a function that changes our sources in one place and says what does not fit then."""

    def change(file, old, new):
        copy = shutil.copytree(PLUGIN, tmp_path / "kvbm_vllm", dirs_exist_ok=True)
        shutil.copytree(ENGINE, tmp_path / "kvbm_engine", dirs_exist_ok=True)
        path = copy / file
        text = path.read_text()
        assert text.count(old) >= 1, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new, 1))
        return [line for line in judge({"here": examine(copy, installed())}) if line not in alone()]

    return change


@functools.cache
def alone():
    """What one version alone says of methods that only others call."""
    return judge({"here": examine(PLUGIN, installed())})


def test_everything_fits_the_version_that_is_installed():
    found = examine(PLUGIN, installed())
    assert found.problems == frozenset()
    assert [read for read in found.reads if not read.found and not read.has_default] == []


def test_what_is_compared():
    found = examine(PLUGIN, installed())
    assert found.overrides >= {
        "KvbmConnector.build_kv_connector_stats", "KvbmConnector.get_num_new_matched_tokens",
        "KvbmConnector.requires_kv_delivery", "KvbmPromMetrics.observe", "KvbmStats.aggregate",
        "Outcomes.aggregate",
    }  # fmt: skip
    names = {f"{read.of}.{read.name}" for read in found.reads}
    # Through parameters, attributes of ours, loops, patterns, loops over names, and annotations of theirs.
    assert names >= {
        "CachedRequestData.resumed_req_ids", "KVCacheBlocks.get_block_ids", "KVCacheConfig.num_blocks",
        "KVCacheSpec.block_size", "KVConnectorBase_V1._connector_metadata", "KVConnectorFactory._registry",
        "KVConnectorOutput.kv_connector_worker_meta", "KVConnectorStats.data", "KVTransferConfig.engine_id",
        "LoRARequest.lora_path", "LoadConfig.load_format", "ModelConfig.get_num_kv_heads",
        "NewRequestData.block_ids", "ParallelConfig.decode_context_parallel_size", "ParallelConfig.rank",
        "PlaceholderRange.offset", "Request.all_token_ids", "Request.mm_features", "Request.num_tokens",
        "SchedulerConfig.enable_chunked_prefill", "SchedulerOutput.preempted_req_ids",
        "SpeculativeConfig.draft_model_config", "VllmConfig.__post_init__", "vllm.__version__",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        pytest.param(
            "_connector.py",
            "    @classmethod\n    def build_kv_connector_stats(cls, data",
            "    def build_kv_connector_stats(self, data",
            "KvbmConnector.build_kv_connector_stats is a method, in KVConnectorBase_V1 it is a classmethod",
            id="wrong kind",
        ),
        pytest.param(
            "_connector.py",
            "    def has_pending_push_work(self)",
            "    @property\n    def has_pending_push_work(self)",
            "KvbmConnector.has_pending_push_work is a property, in KVConnectorBase_V1 it is a method",
            id="property",
        ),
        pytest.param(
            "_connector.py",
            "blocks: Any, num_external_tokens: int",
            "blocks: Any",
            "KvbmConnector.update_state_after_alloc takes no 'num_external_tokens' at position 3, unlike",
            id="missing parameter",
        ),
        pytest.param(
            "_connector.py",
            "layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any",
            "layer_name: str, kv_layer: Any, attn_metadata: Any",
            "KvbmConnector.save_kv_layer takes no further names, unlike",
            id="missing **kwargs",
        ),
        pytest.param(
            "_connector.py",
            "wait_for_layer_load(self, layer_name: str)",
            "wait_for_layer_load(self, name: str)",
            "KvbmConnector.wait_for_layer_load calls 'layer_name' 'name', unlike",
            id="renamed parameter",
        ),
        pytest.param(
            "_stats.py", "engine_idx: int = 0", "engine_idx: int",
            "KvbmPromMetrics.observe requires 'engine_idx', unlike", id="missing default",
        ),
        pytest.param(
            "_connector.py", "def wait_for_save(self)", "def wait_for_saves(self)",
            "KvbmConnector.wait_for_save is missing: it is abstract in KVConnectorBase_V1", id="abstract",
        ),
        pytest.param(
            "_connector.py", "def on_new_request(", "def on_a_new_request(",
            "KvbmConnector.on_a_new_request is called by none", id="never called",
        ),
        pytest.param(
            "_connector.py",
            "super().__init__(vllm_config, role, kv_cache_config)", "super().__init__(vllm_config)",
            "KVConnectorBase_V1.__init__ requires 'kv_cache_config'", id="call of a base",
        ),
        pytest.param(
            "_connector.py", "self._connector_metadata", "self._connector_meta",
            "no KVConnectorBase_V1._connector_meta, read at _connector.py:", id="attribute of a base",
        ),
        pytest.param(
            "_worker.py", "parallel.data_parallel_size", "parallel.data_parallel_ranks",
            "no ParallelConfig.data_parallel_ranks, read at _worker.py:", id="attribute",
        ),
        pytest.param(
            "../kvbm_engine/_values.py", "def num_tokens(", "def number_of_tokens(",
            "no Request.number_of_tokens, read at _values.py:", id="protocol",
        ),
        pytest.param(
            "_keys.py", "mm_position.offset", "mm_position.start",
            "no PlaceholderRange.start, read at _keys.py:", id="attribute of an attribute",
        ),
        pytest.param(
            "_keys.py", '"resumable", False', '"resumabel", False',
            "no version has Request.resumabel, read at _keys.py:", id="with a default",
        ),
        pytest.param(
            "_models.py", '"decode_context_parallel_size",', '"decode_context_parallel",',
            "no version has ParallelConfig.decode_context_parallel, read at", id="names in a loop",
        ),
        pytest.param(
            "register.py", "KVConnectorFactory._registry", "KVConnectorFactory._registered",
            "no KVConnectorFactory._registered, read at register.py:", id="attribute of a class",
        ),
        pytest.param(
            "register.py", "import VllmConfig", "import VllmConfiguration as VllmConfig",
            "no vllm.config.VllmConfiguration, read at register.py:", id="import",
        ),
        pytest.param(
            "_models.py", 'def replicas(vllm_config: Any, kv_cache_config: Any) -> int:',
            'def replicas(vllm_config: Any, kv_cache_config: Any, kind="MLASpec") -> int:',
            "no version has a kind of KV 'MLASpec'", id="kind",
        ),
        pytest.param(
            "_models.py", "(vllm_config.parallel_config, key, 1)",
            "(vllm_config.parallel_config, key[1:], 1)",
            "which attribute of ParallelConfig is read cannot be told", id="unknown name",
        ),
        pytest.param(
            "_keys.py", "def cacheable(request: Any)", "def cacheable(requested: Any)",
            "the parameter 'requested' may be anything; name it in HELD or NOT_HELD", id="unknown parameter",
        ),
    ],
)  # fmt: skip
def test_a_mistake_of_ours_is_found(changed, file, old, new, said):
    found = changed(file, old, new)
    assert any(said in line for line in found), found


VERSION = """
class KVConnectorBase_V1:
    def __init__(self, vllm_config, role, kv_cache_config): ...
    {extra}
"""
KINDS = "class KVCacheSpec: ...\nclass MambaSpec(KVCacheSpec): ...\n"
OURS = """
from typing import Any
from vllm.base import KVConnectorBase_V1
class Ours(KVConnectorBase_V1):
    pass
    {method}
    {read}
ROWS = (("inner", "number"), ("inner", "missing"))
"""


@pytest.fixture
def versions(tmp_path):
    """Give a function that writes an engine of a few lines for each version, and judges ours with them."""

    def write(extras, method="", read="", sometimes=None):
        ours = tmp_path / "ours" / "kvbm_vllm"
        ours.mkdir(parents=True)
        (ours / "_settings.py").write_text(OURS.format(method=method, read=read))
        surfaces = {}
        for version, extra in extras.items():
            engine = tmp_path / version
            files = {
                "vllm/base.py": VERSION.format(extra=extra),
                "vllm/v1/kv_cache_interface.py": KINDS,
                "vllm/v1/request.py": f"class Request:\n    number: int\n    {extra}\n",
            }
            for name, text in files.items():
                (engine / name).parent.mkdir(parents=True, exist_ok=True)
                (engine / name).write_text(text)
            surfaces[version] = examine(ours, engine)
        return judge(surfaces, sometimes or {})

    return write


def test_a_property_that_becomes_a_classmethod_is_found_in_that_version_alone(versions):
    method = "@property\n    def supports_sleep_mode(self): return False"
    extras = {"1.0": "", "2.0": "@classmethod\n    def supports_sleep_mode(cls, config): ..."}
    kinds = "is a property, in KVConnectorBase_V1 it is a classmethod"
    assert versions(extras, method) == [f"2.0: Ours.supports_sleep_mode {kinds}"]


def test_a_parameter_that_is_added_later_is_found_in_that_version_alone(versions):
    extras = {"1.0": "def f(self, a): ...", "2.0": "def f(self, a, b=1): ..."}
    assert versions(extras, "def f(self, a): ...") == [
        "2.0: Ours.f takes no 'b' at position 2, unlike KVConnectorBase_V1"
    ]


@pytest.mark.parametrize(
    ("ours", "base", "said"),
    [
        ("def f(self, a, b=1): ...", "def f(self, a): ...", None),
        ("def f(self, *args, **kwargs): ...", "def f(self, a, b, *, c): ...", None),
        ("def f(self, a, **kwargs): ...", "def f(self, a, *, c=1): ...", None),
        ("def f(self, b): ...", "def f(self, a, /): ...", None),
        ("def f(self, a, c): ...", "def f(self, a, *, c): ...", None),
        ("def f(self, a, b): ...", "def f(self, a): ...", "requires 'b', which is not given"),
        ("def f(self, a): ...", "def f(self, a, *, c=1): ...", "takes no 'c'"),
        ("def f(self, a): ...", "def f(self, a, *rest): ...", "takes no further positions"),
        ("def f(self, b, a): ...", "def f(self, a, b): ...", "calls 'a' 'b'"),
        ("@staticmethod\n    def f(a): ...", "@classmethod\n    def f(cls, a): ...", "is a staticmethod"),
        ("_hidden = 1", "_hidden: int = 0", "is a private name of KVConnectorBase_V1, too"),
    ],
)
def test_what_a_method_must_accept(versions, ours, base, said):
    found = versions({"1.0": base}, ours)
    assert found == [] if said is None else any(said in line for line in found), found


def test_a_read_with_a_default_may_be_missing_in_some_versions_if_that_is_said(versions, tmp_path):
    extras = {"1.0": "", "2.0": "later: int = 0"}
    read = "def g(self, request: Any): return getattr(request, 'later', 0)"
    found = versions(extras, "g_ = None", read)
    assert "1.0: no Request.later, read at _settings.py:7: name it in SOMETIMES" in found
    shutil.rmtree(tmp_path / "ours")
    assert not any("later" in line for line in versions(extras, "", read, {"Request.later": "since 2.0"}))
    shutil.rmtree(tmp_path / "ours")
    stale = versions(extras, "", "", {"Request.later": "since 2.0"})
    assert stale == ["every version has Request.later: take it out of SOMETIMES"]


def test_a_place_that_one_version_lets_us_follow_and_another_does_not_is_named(versions):
    extras = {"1.0": "inner: 'Request'", "2.0": "inner: object"}
    found = versions(extras, "", "def g(self, request: Any): return request.inner.number")
    assert "2.0: what 'number' is read of at _settings.py:7 cannot be told" in found


def test_rows_of_names_and_what_only_subclasses_have_are_followed(versions):
    inner = "inner: 'Inner'\nclass Inner: ...\nclass Leaf(Inner):\n    number: int = 0"
    read = (
        "def g(self, request: Any):\n        for part, key in ROWS:\n"
        "            getattr(getattr(request, part), key, None)"
    )
    found = versions({"1.0": inner}, "", read)
    assert found[1:] == ["no version has Inner.missing, read at _settings.py:9"]
