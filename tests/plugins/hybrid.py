"""What is loaded of each KV group of a real engine, and what the rules say of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import lcm
from typing import Any, NamedTuple

from engines import connector, forget
from models import FAMILIES, VOCABULARY, mend_mamba2

TOKENS = 24
"""Of an answer."""


def options_of(kind: str, **more: Any) -> dict[str, Any]:
    """What an engine of a family is started with; float32, so that a sum rounds alike in any batch."""
    plain = {"dtype": "float32", "max_model_len": 4608, "num_gpu_blocks_override": 1000}
    return {**plain, **dict(FAMILIES[kind].options), **more}


@contextmanager
def mended(kind: str) -> Iterator[None]:
    """Let vLLM run a family that it can run only with a mend of ours."""
    undo = mend_mamba2() if FAMILIES[kind].mended else None
    try:
        yield
    finally:
        if undo:
            undo()


def make_prompt(tokens: int, seed: int = 0) -> list[int]:
    """Random tokens. Prompts of one seed share their beginning."""
    rng = random.Random(seed)
    return [rng.randrange(2, VOCABULARY) for _ in range(tokens)]


def specs_of(llm: Any) -> list[Any]:
    """How vLLM keeps the KV of each group."""
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    return [group.kv_cache_spec for group in config.kv_cache_groups]


def alignment_of(llm: Any) -> int:
    """Tokens of which the end of a hit is a multiple."""
    return lcm(*(spec.block_size for spec in specs_of(llm)))


def boundary_of(llm: Any, prompt: list[int]) -> int:
    """Where the longest hit of a prompt ends: a token is left to be computed."""
    size = alignment_of(llm)
    return (len(prompt) - 1) // size * size


def needed(spec: Any, start: int, tokens: int) -> int:
    """How many blocks of a group a hit of so many tokens needs, beside those of the first `start`."""
    match type(spec).__name__:
        case "SlidingWindowSpec":
            first = max(0, tokens - spec.sliding_window + 1)
        case "ChunkedLocalAttentionSpec":
            first = tokens // spec.attention_chunk_size * spec.attention_chunk_size
        case "MambaSpec":
            first = tokens - 1
        case "FullAttentionSpec":
            first = 0
        case other:
            raise AssertionError(f"no rule for {other}")
    return tokens // spec.block_size - max(first, start) // spec.block_size


def needed_of(llm: Any, tokens: int, start: int = 0) -> dict[int, int]:
    """The blocks that a hit needs, by group; groups that need none are left out."""
    counts = {number: needed(spec, start, tokens) for number, spec in enumerate(specs_of(llm))}
    return {number: count for number, count in counts.items() if count}


@dataclass
class Watch:
    """What was planned to be loaded and stored, and a way to spoil it."""

    loads: list[tuple[str, int, bytes]] = field(default_factory=list)
    """Request, group and key of each object, since `clear`."""
    stores: list[tuple[int, bytes]] = field(default_factory=list)
    """Group and key of each object that was offered, ever."""
    spoils: Callable[[int, int], bool] | None = None
    """Given a group and how many of its objects came before, whether zeros are loaded in place of it."""
    deaf: bool = False
    """Whether what the engine computes is not stored."""
    at_once: int = 0
    """Objects that were stored in the step that gave their blocks to somebody else."""
    scattered: Counter[int] = field(default_factory=Counter)
    """Objects that were copied into the engine's memory, by group, since `clear`."""

    def clear(self) -> None:
        """Forget what was loaded."""
        self.loads.clear()
        self.scattered.clear()

    def counts(self) -> dict[int, int]:
        """Objects planned to be loaded since `clear`, by group."""
        return dict(Counter(group for _, group, _ in self.loads))

    def tags(self) -> dict[int, bytes]:
        """The end of the keys of each group."""
        return {group: key[28:] for group, key in self.stores}


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch the engines that start inside."""
    import pytest

    from kvbm_core import Planner
    from kvbm_device._host import HostDevice

    watch, load, store, take = Watch(), Planner.load, Planner.store, Planner.take
    scatter = HostDevice.scatter

    def watch_load(planner, request, keys, *args, group=0, **more):
        watch.loads += [(request, group, key) for key in keys]
        load(planner, request, keys, *args, group=group, **more)

    def watch_store(planner, keys, blocks, prefix, now_s, group=0, *more):
        if not watch.deaf:
            watch.stores += [(group, key) for key in keys]
            store(planner, keys, blocks, prefix, now_s, group, *more)

    def watch_take(planner, now_s, order=None):
        plan = take(planner, now_s, order)
        watch.at_once += len({*plan.overwrites} & {block for each in plan.stores for block in each.blocks})
        return plan

    def watch_scatter(device, regions, blocks, fence=None, group=0):
        work = scatter(device, regions, blocks, fence, group)
        for block in blocks:
            if watch.spoils and watch.spoils(group, watch.scattered[group]):
                clear_block(device, block, group)
            watch.scattered[group] += 1
        return work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "load", watch_load)
        patch.setattr(Planner, "store", watch_store)
        patch.setattr(Planner, "take", watch_take)
        patch.setattr(HostDevice, "scatter", watch_scatter)
        yield watch


def clear_block(device: Any, block: int, group: int) -> None:
    """Fill a block of the engine's memory with zeros."""
    for fold in device._folds[group]:
        fold.pages[block][...] = 0


class Answer(NamedTuple):
    """What came after a prompt."""

    tokens: tuple[int, ...]
    """The likeliest ones."""
    logprobs: tuple[float, ...]
    """Of each, to the last bit: it depends on everything that was read, where the tokens do not show it."""


def ask(
    llm: Any, prompt: list[int], tokens: int = TOKENS, lora: Any = None, **extra: Any
) -> tuple[Answer, int]:
    """What comes after one prompt, and how many of its own tokens were not computed."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0)
    given = [{"prompt_token_ids": prompt, **extra}]
    [output] = llm.generate(given, params, use_tqdm=False, lora_request=lora)
    [said] = output.outputs
    logprobs = (each[token].logprob for each, token in zip(said.logprobs, said.token_ids, strict=True))
    return Answer(tuple(said.token_ids), tuple(logprobs)), output.num_cached_tokens


def own_answer(llm: Any, prompt: list[int]) -> Answer:
    """What the engine answers after a hit in its own prefix cache."""
    ask(llm, prompt, 1)
    said, cached = ask(llm, prompt)
    assert cached == boundary_of(llm, prompt), "vLLM's own prefix cache has not all of the prompt"
    return said


def restored(
    llm: Any, watch: Watch, prompt: list[int], tokens: int = TOKENS, **extra: Any
) -> tuple[Answer, int, dict[int, int]]:
    """Ask with vLLM's own prefix cache emptied: the answer, where the hit ended, what was loaded by group."""
    forget(llm)
    watch.clear()
    said, cached = ask(llm, prompt, tokens, **extra)
    return said, cached, watch.counts()


def failed_loads(llm: Any) -> int:
    """Objects that could not be loaded, from any tier, so far."""
    counts = connector(llm).counts.values()
    return sum(n for each in counts for (operation, _), n in each.failed.items() if operation == "load")
