"""Real engines for tests: a small random Llama whose output depends on its context, and vLLM around it."""

from __future__ import annotations

import functools
import gc
import os
import random
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 32
VOCABULARY = 2000
ANSWER_TOKENS = 8
"""Tokens of an answer that is compared. Where one block of a prompt had another prompt's KV, each of 30
answers of the random Llama was another one within four tokens."""


def make_random_llama(folder: Path, seed: int = 0) -> Path:
    """Write a randomly initialised Llama. Its weights are large enough that each token of the context
    changes what comes out (checked by `test_output_depends_on_the_context`)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=8192,
        initializer_range=0.15, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def make_engine(model: Path, tiers: list[dict[str, Any]] | None, **options: Any) -> Any:
    """Start vLLM in this process, with the connector unless `tiers` is None."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Bound threads leave no core for the engine on a machine with two.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    import torch

    if hasattr(torch.cpu, "_init_amx"):
        # vLLM's attention uses AMX without asking the kernel: where torch has not yet, the process dies.
        torch.cpu._init_amx()
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    freeze_imports()
    look_at_models_here()
    # An engine that was refused at its start leaves its worker's connector behind, and the next would get it.
    ensure_kv_transfer_shutdown()
    extra = options.pop("extra", {})
    transfer = options.pop("transfer", {})
    if tiers is not None:
        options["kv_transfer_config"] = KVTransferConfig(
            kv_connector="KvbmConnector",
            kv_role="kv_both",
            # A small model computes faster than many a tier loads; these tests are about the loads.
            kv_connector_extra_config={"tiers": tiers, "only_faster": False, **extra},
            **transfer,
        )
    defaults = {
        "enforce_eager": True, "dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 8192,
        "block_size": BLOCK_TOKENS, "num_gpu_blocks_override": 600, "max_num_seqs": 16, "seed": 0,
        "disable_log_stats": True,
    }  # fmt: skip
    return LLM(model=str(model), **{**defaults, **options})


@functools.cache
def freeze_imports() -> None:
    """Keep what was imported out of vLLM's garbage collections, several at each start and end of an engine.

    They took 2.6 of the 3.1 seconds of processor time that a small model's engine costs. vLLM itself freezes
    an engine's objects together with these, and gives all of them back at the end; here the engine's are
    never frozen.
    """
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


@functools.cache
def look_at_models_here() -> None:
    """Have vLLM look at a model's class in this process, which has vLLM imported, and not in a new one.

    It starts one for each architecture that its cache has not, so that CUDA is not initialised in this one.
    That process imports all of vLLM, which takes as long as several engines.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


def connector(llm: Any) -> Any:
    """Give the scheduler's half of an in-process engine's connector, also where it is one of several."""
    return ours(llm.llm_engine.engine_core.engine_core.scheduler.get_kv_connector())


def ours(found: Any) -> Any:
    """Give our connector among those that a MultiConnector has, or itself."""
    from kvbm_vllm import KvbmConnector

    children = [ours(child) for child in getattr(found, "_connectors", ())]
    return next((child for child in children if isinstance(child, KvbmConnector)), found)


def generate(llm: Any, prompts: list[list[int]], max_tokens: int = ANSWER_TOKENS) -> list[tuple[int, ...]]:
    """Greedy tokens for prompts of token ids, all in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def drain(llm: Any) -> None:
    """Step the idle engine until everything that was planned has ended."""
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests():
        llm.llm_engine.step()


def forget(llm: Any) -> None:
    """Empty vLLM's own prefix cache, and only that."""
    drain(llm)
    assert llm.reset_prefix_cache(), "vLLM's prefix cache was not emptied"


def loaded(llm: Any) -> dict[str, int]:
    """Blocks loaded so far, by tier."""
    return {tier: counts.loaded for tier, counts in connector(llm).counts.items()}


def keys_of(prompt: list[int], blocks: int) -> list[bytes]:
    """Keys of a prompt's first blocks."""
    from kvbm_core.groups import KvGroup
    from kvbm_vllm._keys import request_keys
    from kvbm_vllm._weights import AdapterDigests

    class Request:
        all_token_ids, lora_request, cache_salt, mm_features = prompt, None, None, None

    return request_keys(Request, (KvGroup(BLOCK_TOKENS),), AdapterDigests()).slice(0, blocks)


def make_prompts(count: int, seed: int, longest: int = 4000) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens: some share prefixes, some end at a block's edge, some just beyond."""
    rng = random.Random(seed)
    edges = [1, 2, 31, 32, 33, 63, 64, 65, 96, 97]
    shared = [rng.randrange(2, VOCABULARY) for _ in range(longest)]
    prompts = []
    for number in range(count):
        if number < len(edges):
            length = edges[number]
        elif number % 4 == 0:
            length = BLOCK_TOKENS * rng.randint(1, longest // BLOCK_TOKENS)
        else:
            length = min(longest, int(rng.expovariate(1 / (longest / 6))) + 1)
        prompt = [rng.randrange(2, VOCABULARY) for _ in range(length)]
        if number % 3 == 0 and length > 40:
            common = rng.randint(33, length - 1)
            prompt[:common] = shared[:common]
        prompts.append(prompt)
    prompts[-1] = [rng.randrange(2, VOCABULARY) for _ in range(longest)]
    return prompts


def story_tokens() -> tuple[Path, list[int]]:
    """SmolLM2 and the tokens of a story: a real model and real text."""
    from importlib.resources import files

    from tokenizers import Tokenizer

    from kvbm_cli._model import prepare_model

    model = prepare_model()
    story = files("kvbm_cli").joinpath("story.txt").read_text()
    return model, Tokenizer.from_file(str(model / "tokenizer.json")).encode(story).ids


def own_answers(llm: Any, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """What the engine answers when its own prefix cache serves the prefix."""
    answers = []
    for prompt in prompts:
        generate(llm, [prompt], max_tokens=1)
        answers.append(generate(llm, [prompt])[0])
    return answers


def restore(llm: Any, prompts: list[list[int]]) -> list[tuple[tuple[int, ...], int]]:
    """Each prompt with an empty prefix cache: its answer and the blocks that were loaded for it."""
    results = []
    for prompt in prompts:
        forget(llm)
        before = sum(loaded(llm).values())
        answer = generate(llm, [prompt])[0]
        results.append((answer, sum(loaded(llm).values()) - before))
    return results


def assert_restored(prompts: list[list[int]], own: list[Any], restored: list[Any]) -> None:
    """Same answers, and exactly the blocks that a prompt should have restored."""
    expected = [(answer, (len(p) - 1) // BLOCK_TOKENS) for p, answer in zip(prompts, own, strict=True)]
    wrong = [len(p) for p, e, r in zip(prompts, expected, restored, strict=True) if e != r]
    assert not wrong, f"prompts of these lengths differ: {wrong}"
