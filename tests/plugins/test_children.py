"""Beside another connector in a MultiConnector: what our tiers fail to load ends no request."""

import json
import os
import subprocess
import sys

import pytest
from engines import connector, drain, generate, make_prompts

from kvbm_core import Op

pytestmark = pytest.mark.engine


def several(tmp_path, tiers):
    """KvbmConnector, and a connector of vLLM's that keeps KV in files."""
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "connectors": [
                {
                    "kv_connector": "KvbmConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"tiers": tiers, "only_faster": False},
                },
                {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "theirs")},
                },
            ]
        },
    }


def test_a_load_that_fails_ends_no_request(faulty, llama, start, tmp_path):
    from vllm.config import KVTransferConfig

    prompt = make_prompts(1, seed=51, longest=640)[-1]
    answer = generate(start(llama, None), [prompt])
    transfer = KVTransferConfig(**several(tmp_path, [{"backend": "faulty", "capacity": "64MiB"}]))
    llm = start(llama, None, kv_transfer_config=transfer)
    ours = connector(llm)
    assert generate(llm, [prompt]) == answer
    drain(llm)
    assert llm.reset_prefix_cache()
    faulty.fault = lambda transfer: "error" if transfer.op is Op.LOAD else None
    assert generate(llm, [prompt]) == answer
    assert ours.counts["faulty"].failed["load", "error"] > 0


_ENGINE = """
import json, sys, time
from pathlib import Path

def main():
    model, objects, transfer = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=model, kv_transfer_config=KVTransferConfig(**transfer), enforce_eager=True, dtype="bfloat16",
        skip_tokenizer_init=True, max_model_len=1024, block_size=32, num_gpu_blocks_override=100,
    )
    prompt = {"prompt_token_ids": [2 + 7 * at % 1900 for at in range(640)]}
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)

    def ask():
        [output] = llm.generate([prompt], params, use_tqdm=False)
        return [output.outputs[0].finish_reason, list(output.outputs[0].token_ids)]

    first, until = ask(), time.monotonic() + 60
    while len(files := [each for each in objects.rglob("*") if each.is_file()]) < 20:
        assert time.monotonic() < until, f"only {len(files)} blocks are stored"
        time.sleep(0.1)
    for file in files:
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
    assert llm.reset_prefix_cache()
    Path(sys.argv[4]).write_text(json.dumps([first, ask()]))

if __name__ == "__main__":
    main()
"""


@pytest.mark.early
def test_nor_where_the_engine_is_a_process_of_its_own(llama, tmp_path):
    """The setting is corrected in the process that the user started, and travels to vLLM's scheduler."""
    script = tmp_path / "engine.py"
    script.write_text(_ENGINE)
    (tmp_path / "objects").mkdir()
    transfer = several(tmp_path, [{"backend": "remote", "url": f"file://{tmp_path}/objects"}])
    answers = tmp_path / "answers.json"
    ran = subprocess.run(
        [sys.executable, script, llama, tmp_path / "objects", json.dumps(transfer), answers],
        capture_output=True, text=True, timeout=600, check=False,
        env={
            **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        },
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    [first, second] = json.loads(answers.read_text())
    assert first[0] == "length"
    assert second == first
    assert "Recovered from KV load failure" in ran.stdout + ran.stderr
