"""Whether restored prompts are answered as vLLM's own prefix cache answers them, on a GPU.

    python tests/benchmarks/gpu_identity.py [--prompts 50] [--graphs] [--v2] [--mla]

A Llama of about 1B parameters, or with --mla a DeepSeek, with random weights: with them the output depends
on the whole context. Each prompt is asked alone: computed; from vLLM's prefix cache; restored from host
memory after that cache was emptied; and once more while one load in three is made to fail. Tokens and
log-probabilities of the restored must equal those of the prefix cache, bit for bit, with as many cached
tokens; after a failed load those of computing. Blocks loaded are counted. Then all KV pages of some prompts
are compared, before and after.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import tempfile
import time

from gpu_serve import prepare


def model_in(folder: str, arguments: argparse.Namespace) -> None:
    import torch
    import transformers

    hidden, on_gpu = arguments.hidden, torch.cuda.is_available()
    shape = {
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": arguments.layers,
        "vocab_size": 32000, "num_attention_heads": hidden // 64, "max_position_embeddings": 8192,
        "initializer_range": 0.05,
    }  # fmt: skip
    if arguments.mla:  # No layer has experts: their kernels are not what is looked at.
        family = "DeepseekV2"
        shape |= {
            "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None,
            "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 2,
            "n_shared_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 64,
            "first_k_dense_replace": arguments.layers,
        }  # fmt: skip
    else:
        family = "Llama"
        shape |= {"num_key_value_heads": max(1, hidden // 256), "head_dim": 64}
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**shape)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    torch.set_default_dtype(torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}B parameters")
    model.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--longest", type=int, default=6000)
    parser.add_argument("--mla", action="store_true", help="a model with latent attention, as DeepSeek's")
    parser.add_argument("--graphs", action="store_true", help="full CUDA graphs for decoding")
    parser.add_argument("--v2", action="store_true", help="vLLM's second model runner")
    parser.add_argument("--capacity", default="8GiB")
    parser.add_argument("--copy", default="auto")
    arguments = parser.parse_args()
    prepare()
    os.environ.update(
        VLLM_ENABLE_MULTIPROCESSING="0", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING"
    )
    if arguments.v2:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model_in(folder, arguments)
        torch.cuda.empty_cache()
        return run(arguments, folder)


def run(arguments: argparse.Namespace, folder: str) -> int:
    import torch
    from vllm import LLM, SamplingParams

    transfer = {
        "kv_connector": "KvbmConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "tiers": [{"backend": "cpu", "capacity": arguments.capacity}],
            "device_copy": arguments.copy, "only_faster": False,
        },
    }  # fmt: skip
    options = {"enforce_eager": True}
    if arguments.graphs:
        options = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                                          "cudagraph_capture_sizes": [1, 2, 4, 8]}}  # fmt: skip
    llm = LLM(
        model=folder, skip_tokenizer_init=True, max_model_len=8192, gpu_memory_utilization=0.4, seed=0,
        max_num_batched_tokens=2048, kv_transfer_config=transfer, **options,
    )  # fmt: skip
    core = llm.llm_engine.engine_core.engine_core
    connector = core.scheduler.connector
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False, logprobs=2)
    chance = random.Random(1)
    prompts = [
        {
            "prompt_token_ids": [
                chance.randrange(10, 31_000) for _ in range(chance.randint(40, arguments.longest))
            ]
        }
        for _ in range(arguments.prompts)
    ]

    def settle() -> None:
        while connector.has_pending_push_work():
            core.step_fn()

    def ask(each: list[dict]) -> list[tuple]:
        found = []
        for p in each:
            output = llm.generate([p], params, use_tqdm=False)[0]
            tokens = tuple(output.outputs[0].token_ids)
            chosen = [entry[t].logprob for entry, t in zip(output.outputs[0].logprobs, tokens, strict=True)]
            found.append((tokens, tuple(chosen), output.num_cached_tokens))
        return found

    def loaded() -> int:
        return connector.counts["cpu"].loaded

    in_step: list[int] = []
    stream_wait = type(_connector()._mover.rank.worker._engine._device).stream_wait

    def noted(device, work):
        in_step.append(1)
        return stream_wait(device, work)

    type(_connector()._mover.rank.worker._engine._device).stream_wait = noted
    computed = ask(prompts)
    from_gpu = ask(prompts)
    settle()
    assert llm.reset_prefix_cache()
    before = loaded()
    restored = ask(prompts)
    blocks = loaded() - before
    size = llm.llm_engine.vllm_config.cache_config.block_size
    expected = sum((len(p["prompt_token_ids"]) - 1) // size for p in prompts)
    same = sum(a == b for a, b in zip(from_gpu, restored, strict=True))
    distinct = len({tokens for tokens, _, _ in computed})
    rounding = sum(a[0] != b[0] for a, b in zip(from_gpu, computed, strict=True))
    print(f"restored as from vLLM's prefix cache, log-probabilities too: {same} of {len(prompts)}")
    print(f"blocks loaded {blocks}, expected {expected}; {distinct} different answers; ", end="")
    print(f"copies that a step waited for on the GPU: {len(in_step)}")
    print(f"answers of the prefix cache that differ from computing: {rounding}")

    settle()
    assert llm.reset_prefix_cache()
    worker = llm.llm_engine.model_executor.driver_worker
    mover = _connector()._mover.rank.worker._engine
    real, fails, fences = mover._device.scatter, random.Random(3), {}

    def scatter(regions, blocks, fence=None, group=0):
        # All parts of a load have its fence, and fail or succeed together.
        if fences.setdefault(id(fence), (fence, fails.random() < 0.33))[1]:
            raise RuntimeError("made to fail")
        return real(regions, blocks, fence, group)

    # A load that fails in the step that computes with it ends the engine, so these come in a step before.
    connector._leader.session.matching.joins = False
    mover._device.scatter = scatter
    failing = ask(prompts)
    mover._device.scatter = real
    connector._leader.session.matching.joins = True
    triples = list(zip(failing, computed, restored, strict=True))
    right = sum(f[:2] in (c[:2], r[:2]) for f, c, r in triples)
    tokens = sum(f[0] in (c[0], r[0]) for f, c, r in triples)
    print(
        f"loads made to fail: {dict(connector.counts['cpu'].failed)}; as computed or restored, bit for bit: ",
        end="",
    )
    print(f"{right} of {len(prompts)}; tokens alone: {tokens} of {len(prompts)}")

    settle()
    pages = compare_pages(llm, core, connector, worker, prompts[:8], ask, settle)
    runner = type(worker.model_runner).__module__
    facts = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "runner": runner,
             "graphs": arguments.graphs, "device_repr": repr(mover._device)}  # fmt: skip
    good = same == len(prompts) and blocks == expected and pages and right == len(prompts)
    print("RESULT", json.dumps({"good": good, "same": same, "blocks": blocks, "expected": expected} | facts))
    return not good


def _connector():
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def compare_pages(llm, core, connector, worker, prompts, ask, settle) -> bool:
    """Compare every KV page of some prompts as computed with those that were restored."""
    import torch

    size = llm.llm_engine.vllm_config.cache_config.block_size

    def pages(p: dict) -> list[torch.Tensor]:
        """The pages of a prompt that vLLM has in its prefix cache now, through its own block table."""
        tokens = len(p["prompt_token_ids"])
        taken: list[int] = []
        # vLLM calls the second from 0.30 on, with the blocks of each KV group.
        originals = {
            each: getattr(connector, each) for each in ("request_finished", "request_finished_all_groups")
        }

        def note(name, request, block_ids):
            taken[:] = block_ids if name == "request_finished" else block_ids[0]
            return originals[name](request, block_ids)

        for name in originals:
            setattr(connector, name, functools.partial(note, name))
        ask([p])
        for name, original in originals.items():
            setattr(connector, name, original)
        ids = torch.tensor(taken[: (tokens - 1) // size], dtype=torch.int64)
        caches = worker.model_runner.kv_caches
        return [cache[ids.to(cache.device)].clone() for cache in caches]

    llm.reset_prefix_cache()
    connector.reset_cache()
    settle()
    first = [pages(p) for p in prompts]
    settle()
    assert llm.reset_prefix_cache()
    before = connector.counts["cpu"].loaded
    again = [pages(p) for p in prompts]
    count = connector.counts["cpu"].loaded - before
    equal = all(
        torch.equal(a, b)
        for one, other in zip(first, again, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    print(f"pages of {len(prompts)} prompts, {count} blocks loaded: {'equal' if equal else 'DIFFERENT'}")
    return equal and count > 0


if __name__ == "__main__":
    start_s = time.time()
    status = main()
    print(f"{time.time() - start_s:.0f} s")
    sys.exit(status)
