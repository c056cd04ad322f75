"""Models with several KV groups, restored by vLLM on a real GPU: windows, and recurrent states.

`tests/plugins/test_staged_engine.py` has the same on a simulated one, for CI.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "plugins"))
from models import FAMILIES
from test_staged_engine import prove

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_next"])
def test_restored_as_from_vllms_own_cache(kind, monkeypatch, tmp_path):
    vllm = pytest.importorskip("vllm")
    from kvbm_vllm._models import GROUPS_FROM, STATES_FROM, vllm_version

    needed = STATES_FROM if FAMILIES[kind].has_state else GROUPS_FROM
    if vllm_version() < needed:
        release = ".".join(map(str, needed))
        pytest.skip(f"{kind} beside a connector needs vLLM {release} or newer, this is {vllm.__version__}")
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")  # It is compiled when it is first used.
    if FAMILIES[kind].has_state:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # Beside the second one states are refused.
    prove(kind, tmp_path, dtype="bfloat16", gpu_memory_utilization=0.3)
