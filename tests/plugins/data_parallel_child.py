"""An engine with two replicas, as `vllm serve --data-parallel-size 2` has them, and the same once more.

    python data_parallel_child.py MODEL FOLDER        the last line is JSON

Each replica answers a prompt of its own twice, and then the other's.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import re
import sys
import urllib.request
from pathlib import Path
from typing import Any

BLOCKS = 12
"""Whole blocks of each prompt."""


async def main(model: str, folder: Path) -> None:
    from engines import BLOCK_TOKENS, VOCABULARY
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    rng = random.Random(5)
    prompts = [[rng.randrange(2, VOCABULARY) for _ in range(BLOCKS * BLOCK_TOKENS + 5)] for _ in range(2)]
    tiers = [
        {"backend": "cpu", "capacity": "64MiB"},
        {"backend": "lmdb", "capacity": "64MiB", "path": str(folder / "disk")},
        {"backend": "remote", "url": f"file://{folder}/far"},
    ]
    args = AsyncEngineArgs(
        model=model, data_parallel_size=2, enforce_eager=True, dtype="bfloat16", skip_tokenizer_init=True,
        max_model_len=2048, block_size=BLOCK_TOKENS, num_gpu_blocks_override=100, max_num_seqs=4, seed=0,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KvbmConnector", kv_role="kv_both",
            kv_connector_extra_config={
                "tiers": tiers, "only_faster": False, "lookup_deadline_s": 60, "load_deadline_s": 60,
                "store_deadline_s": 60,
            },
        ),
    )  # fmt: skip
    print(json.dumps([await run(args, prompts, folder, first=first) for first in (True, False)]))


async def run(args: Any, prompts: list[list[int]], folder: Path, *, first: bool) -> dict[str, Any]:
    from vllm.v1.engine.async_llm import AsyncLLM

    # As processes that are spawned get it. Those that are forked need not import vLLM anew.
    config = pickle.loads(pickle.dumps(args.create_engine_config()))
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    llm = AsyncLLM.from_vllm_config(config)
    result: dict[str, Any] = {}
    stored = {"again": ("remote", BLOCKS), "theirs": ("lmdb", 2 * BLOCKS)}
    for name, order in (("own", (0, 1)), ("again", (0, 1)), ("theirs", (1, 0))):
        result[name] = [
            await answer(llm, prompts[at], replica, f"{name}{at}") for replica, at in enumerate(order)
        ]
        if first and name in stored:  # The other replica looks for it, or the next start.
            await until_stored(*stored[name])
    result["counts"] = read_counts()
    result["folders"] = sorted(str(lock.parent.relative_to(folder)) for lock in folder.rglob("engine.lock"))
    llm.shutdown()
    return result


async def answer(llm: Any, prompt: list[int], replica: int, name: str) -> list[int]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    outputs = llm.generate({"prompt_token_ids": prompt}, sampling, name, data_parallel_rank=replica)
    return [list(output.outputs[0].token_ids) async for output in outputs][-1]


async def until_stored(tier: str, blocks: int) -> None:
    while any(counts[f"stored_blocks {tier}"] < blocks for counts in read_counts()):
        await asyncio.sleep(0.2)


def read_counts() -> list[dict[str, float]]:
    """Read what each replica counts, on its own port: by the metric's name and the tier's."""
    found = []
    for replica in range(2):
        port = int(os.environ["DYN_KVBM_METRICS_PORT"]) + replica
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            text = response.read().decode()
        line = rf'^vllm:kvbm_(\w+?)(?:_total)?{{engine="{replica}",.*tier="(\w+)"}} (.+)$'
        found.append({f"{name} {tier}": float(value) for name, tier, value in re.findall(line, text, re.M)})
    return found


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
