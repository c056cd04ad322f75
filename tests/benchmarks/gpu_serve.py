"""Time to first token of restored prompts under vLLM on a GPU, with and without a connector.

    python tests/benchmarks/gpu_serve.py none ours native16 native256 [--shape llama8b] [--json FILE]

Each engine runs in a process of its own, one after the other. Model weights are random: time does not depend
on them. For each prompt length, different prompts, medians in ms:

  cold       first sight of the prompt
  gpu_hit    again, while vLLM's own prefix cache has it
  restored   again after that cache was emptied: only the connector can have it
  cached     tokens of a restored prompt that were not computed

then a batch of 32 prompts of 4,096 tokens, cold and restored five times, in tokens/s. `stored` is the time
from the start of one cold prompt of the greatest length until no store of it is left to be done.

`kernel` is our connector with copies by a kernel alone, `async` without loads in the step that computes.
`lower` is our connector with a host memory of 2 GiB above a tier of LMDB: prompts are restored from there.
Engines import at the same time and take turns afterwards, so that none runs beside another. A name may come
more than once, so that engines alternate.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    # Llama 3.1 8B: 32 layers of 8 KV heads of 128: pages of 64 KiB, 2 MiB a block of 16 tokens.
    "llama8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8},
    # One rank of Llama 3 70B at TP 8: 80 layers of one KV head of 128: pages of 8 KiB. Small otherwise.
    "llama70b-tp8": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 80,
                     "num_attention_heads": 8, "num_key_value_heads": 1},
    # To try the script on a CPU.
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip
COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
HOST_GIB = int(os.environ.get("HOST_GIB", "32"))


def connector(name: str, folder: str) -> dict | None:
    ours = {"kv_connector": "KvbmConnector", "kv_role": "kv_both"}
    native = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    cpu = {"backend": "cpu", "capacity": f"{HOST_GIB}GiB"}
    small = {"backend": "cpu", "capacity": "2GiB"}
    lower = {"backend": "lmdb", "capacity": "30GiB", "path": f"{folder}/lmdb"}
    return {
        "none": None,
        "ours": ours | {"kv_connector_extra_config": {"tiers": [cpu]}},
        "kernel": ours | {"kv_connector_extra_config": {"tiers": [cpu], "device_copy": "kernel"}},
        "async": ours | {"kv_connector_extra_config": {"tiers": [cpu]}},
        "lower": ours | {"kv_connector_extra_config": {"tiers": [small, lower], "max_store_blocks": 4096}},
        "native16": native | {"kv_connector_extra_config": {"cpu_bytes_to_use": HOST_GIB << 30}},
        "native256": native
        | {"kv_connector_extra_config": {"cpu_bytes_to_use": HOST_GIB << 30, "block_size": 256}},
    }[name]


def prompt(tokens: int, seed: int) -> dict:
    chance = random.Random(seed)
    return {"prompt_token_ids": [chance.randrange(10, 120_000) for _ in range(tokens)]}


def prepare() -> None:
    """Set the environment of an engine that needs no network. Before vLLM is imported."""
    os.environ.update(
        HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_USE_FLASHINFER_SAMPLER="0", PYTHONHASHSEED="0"
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


class Engine:
    """One vLLM and what is asked of it."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: str, **more: object) -> None:
        from vllm import LLM, SamplingParams

        model = Path(folder, "model")
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(COMMON | SHAPES[arguments.shape]))
        transfer = connector(name, folder)
        options = {"kv_transfer_config": transfer, **more} if transfer else more
        if name == "async":
            from kvbm_engine._matching import Matching

            Matching.does_nothing_else = lambda matching: False
        self.llm = LLM(
            model=str(model), skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16",
            max_model_len=max(4096, *arguments.lengths) + 64, enforce_eager=not arguments.graphs,
            gpu_memory_utilization=0.6, max_num_batched_tokens=8192, seed=0,
            disable_log_stats=False, **options,
        )  # fmt: skip
        self.params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)

    def ask(self, prompts: list[dict]) -> tuple[float, list]:
        start_s = time.perf_counter()
        outputs = self.llm.generate(prompts, self.params, use_tqdm=False)
        return time.perf_counter() - start_s, outputs

    def counts(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            if "kvbm" in metric.name and hasattr(metric, "value"):
                labels = [v for k, v in metric.labels.items() if k not in ("model_name", "engine")]
                found["|".join([metric.name, *labels])] = metric.value
        return found


def ms(runs: list[tuple[float, list]]) -> float:
    return round(statistics.median(seconds for seconds, _ in runs) * 1e3, 1)


def measure(name: str, arguments: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        engine = Engine(name, arguments, folder)
        for seed in (98, 99):
            engine.ask([prompt(2048, seed)])
        found: dict = {"name": name, "lengths": {}}
        transfer = connector(name, folder)
        for tokens in arguments.lengths:
            prompts = [prompt(tokens, tokens * 100 + at) for at in range(arguments.times)]
            cold = [engine.ask([p]) for p in prompts]
            time.sleep(arguments.settle)
            hit = [engine.ask([p]) for p in prompts]
            time.sleep(0.5)
            reset = engine.llm.reset_prefix_cache()
            restored = [engine.ask([p]) for p in prompts]
            engine.llm.reset_prefix_cache()
            same = [o[0].outputs[0].token_ids for _, o in cold] == [
                o[0].outputs[0].token_ids for _, o in restored
            ]
            found["lengths"][tokens] = {
                "cold": ms(cold), "gpu_hit": ms(hit), "restored": ms(restored), "reset": reset, "same": same,
                "cached": [o[0].num_cached_tokens for _, o in restored],
                "each": [round(seconds * 1e3, 1) for seconds, _ in restored],
            }  # fmt: skip
            print(name, tokens, found["lengths"][tokens], flush=True)
        if arguments.batch:
            prompts = [prompt(4096, 777 + at) for at in range(32)]
            cold_s, _ = engine.ask(prompts)
            found["cold_tokens_per_s"] = round(32 * 4096 / cold_s)
            time.sleep(arguments.settle)
            restored = []
            for _ in range(5 if transfer else 0):  # The first loads kernels that were not needed before.
                engine.llm.reset_prefix_cache()
                restored.append(engine.ask(prompts))
            if restored:
                found["first_restored_tokens_per_s"] = round(32 * 4096 / restored[0][0])
                found["restored_tokens_per_s"] = [round(32 * 4096 / seconds) for seconds, _ in restored[1:]]
                found["batch_first_token_ms"] = [
                    round(statistics.median(o.metrics.first_token_latency for o in outputs) * 1e3)
                    for _, outputs in restored[1:]
                ]
                found["batch_cached"] = [sum(o.num_cached_tokens for o in outputs) for _, outputs in restored]
        if arguments.stores and transfer:
            found["first_token_and_stored_ms"] = stored(engine, arguments)
        found["counts"] = engine.counts()
        print("RESULT", json.dumps(found), flush=True)
        return found


def stored(engine: Engine, arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """How long a cold prompt takes to its first token, and until no store of it is left; of three, in ms.

    Only with the engine in this process. A connector that copies in the background without being asked is
    waited for on the GPU.
    """
    import torch

    core = engine.llm.llm_engine.engine_core.engine_core
    connected, found = core.scheduler.connector, []
    for at in range(3):
        start_s = time.perf_counter()
        first_s, _ = engine.ask([prompt(max(arguments.lengths), 5000 + at)])
        core.step_fn()  # In which vLLM says that the request has finished.
        while connected.has_pending_push_work():
            core.step_fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append((round(first_s * 1e3), round((time.perf_counter() - start_s) * 1e3)))
    return found


def profile(name: str, arguments: argparse.Namespace) -> None:
    """Where the host's time goes, in a prompt from the GPU's cache and in a restored one."""
    import cProfile
    import pstats

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        engine = Engine(name, arguments, folder)
        p = prompt(max(arguments.lengths), 1)
        engine.ask([p])
        time.sleep(arguments.settle)
        for what in ("gpu_hit", "gpu_hit", "restored"):
            if what == "restored":
                engine.llm.reset_prefix_cache()
            profiler = cProfile.Profile()
            profiler.enable()
            seconds, _ = engine.ask([p])
            profiler.disable()
            print(f"== {name} {what}: {seconds * 1e3:.1f} ms")
            stats = pstats.Stats(profiler)
            stats.sort_stats("tottime").print_stats(14)
            stats.sort_stats("cumtime").print_stats("kvbm", 24)
        print("RESULT {}")


def turn(lock: Path) -> object:
    """Wait until no other engine runs."""
    import vllm  # noqa: F401 - the long part of starting, done beside the others

    file = lock.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+")
    parser.add_argument("--shape", choices=SHAPES, default="llama8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--times", type=int, default=6)
    parser.add_argument("--folder", default="/tmp")
    parser.add_argument("--settle", type=float, default=1.0)
    parser.add_argument("--no-batch", dest="batch", action="store_false")
    parser.add_argument(
        "--graphs", action="store_true", help="CUDA graphs and compilation, as vLLM's default"
    )
    parser.add_argument(
        "--stores", action="store_true", help="measure the time until all is stored, too; engine in-process"
    )
    parser.add_argument("--cprofile", action="store_true", help="where the host's time goes, nothing else")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prepare()
    if arguments.stores or arguments.cprofile:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if arguments.lock:
        mine = turn(arguments.lock)
        (profile if arguments.cprofile else measure)(arguments.names[0], arguments)
        del mine
        return 0
    results = []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{at}") for at in range(len(arguments.names))]
        children = []
        for log, name in zip(logs, arguments.names, strict=True):
            command = [sys.executable, __file__, name, "--lock", str(Path(folder, "turn"))]
            command += [a for a in sys.argv[1:] if a not in (*arguments.names, "--json", str(arguments.json))]
            with log.open("w") as file:
                children.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
            time.sleep(1)  # So that they take turns in this order.
        for child, log in zip(children, logs, strict=True):
            status = child.wait()
            lines = log.read_text().splitlines()
            found = [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")]
            results += found
            print(
                "\n".join(
                    lines[-160:]
                    if status or not found
                    else [line for line in lines if "RESULT" in line or arguments.cprofile]
                )
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results))
    return len(results) != len(arguments.names)


if __name__ == "__main__":
    sys.exit(main())
