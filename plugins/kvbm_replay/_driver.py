"""Drives an engine's leader with a trace: it decides as in an engine, and nothing is moved."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final

from kvbm_core.groups import KvGroup
from kvbm_core.registry import Registry
from kvbm_replay._course import Event, Kind, read_events
from kvbm_replay._engine import Prompt, ReplayEngine
from kvbm_replay._engine_cache import EngineCache
from kvbm_replay._layout import Layout
from kvbm_replay._machine import Machine
from kvbm_replay._outcome import Outcome, TierOutcome
from kvbm_replay._ranks import Ranks
from kvbm_replay.trace import Keys, Request, Trace

__all__ = ["replay"]


def replay(
    trace: Trace,
    layout: Layout,
    machine: Machine,
    *,
    registry: Registry | None = None,
    keys: Keys | None = None,
    engine_blocks: int | None = None,
    paced: bool = False,
) -> Outcome:
    """Replay a trace through a stack.

    Args:
        trace: The requests. Where it was recorded when each met the tiers, they meet them in that order;
            else each is computed when it comes, one after the other.
        layout: The stack.
        machine: Its speeds: for times, and for what the planner would find faster to compute.
        registry: Where policies are found.
        keys: Of the trace's blocks, where several replays share them.
        engine_blocks: Blocks of the engine's own prefix cache. None: as recorded, or none.
        paced: True if writes take the machine's time; then a slow tier loses stores.
    """
    ranks = Ranks(layout, machine, paced=paced)
    groups = trace.groups or (KvGroup(trace.block_tokens),)
    engine = ReplayEngine(layout, ranks, registry or Registry(), groups, trace.block_tokens)
    cache = None if engine_blocks is None else EngineCache(engine_blocks)
    run = _Replay(engine, machine, trace.block_tokens, Keys() if keys is None else keys, cache)
    began_s = time.perf_counter()
    if all(request.course for request in trace.requests):
        run.follow(trace.requests)
    else:
        for request in trace.requests:
            run.take(request)
    engine.wait(math.inf)
    return run.outcome(trace, layout, ranks.loaded, time.perf_counter() - began_s)


class _Replay:
    """One replay."""

    def __init__(
        self, engine: ReplayEngine, machine: Machine, block_tokens: int, keys: Keys, cache: EngineCache | None
    ) -> None:
        self._engine, self._keys, self._cache = engine, keys, cache
        self._token_s: Final = 1 / machine.prefill_tokens_per_s
        self._block_tokens = block_tokens
        self._engine_hits = 0
        self._first_token_s: list[float] = []

    def take(self, request: Request) -> None:
        """Look a request up, load what is worth it, compute the rest, and store its blocks."""
        engine, size = self._engine, self._block_tokens
        engine.wait(request.at_s)
        blocks = len(request.blocks)
        # An engine computes the last token of a prompt itself.
        prompt = self._prompt(request, blocks * size + (request.asked == blocks))
        self._look(prompt, request, min(request.engine_blocks or 0, request.asked), request.input_tokens)
        left = prompt.left
        self._load(prompt)
        engine.compute([(prompt, blocks * size)], left, left * self._token_s)
        for more in range(len(request.answer)):
            engine.compute([(prompt, (blocks + more + 1) * size)], 1, 0.0)
        engine.end(prompt)

    def follow(self, requests: Sequence[Request]) -> None:
        """Take requests through what happened to them, in the order of the moments."""
        prompts: dict[int, Prompt] = {}
        together: list[Event] = []
        for event in read_events(requests):
            request = requests[event.request]
            self._engine.wait(event.at_us / 1e6)
            if event.kind is Kind.ARRIVE:
                prompt = prompts[event.request] = self._prompt(request, request.input_tokens)
                self._engine.arrive(prompt)
            elif event.kind is Kind.TURN:
                self._engine.turn(prompts[event.request], event.engine_tokens)
            elif event.kind is Kind.LOOK:
                prompts[event.request].num_tokens = event.tokens
                blocks = event.engine_tokens // self._block_tokens
                self._look(prompts[event.request], request, blocks, event.tokens)
            else:
                together.append(event)
                if event.goes_on:
                    continue
                self._compute([(prompts[each.request], each.tokens) for each in together])
            for each in together or [event]:
                if each.is_last:
                    prompt = prompts.pop(each.request)
                    self._load(prompt)
                    self._engine.end(prompt, with_last=each.has_ended)
            together.clear()

    def outcome(self, trace: Trace, layout: Layout, loaded: int, took_s: float) -> Outcome:
        """Give what was counted."""
        engine = self._engine
        tiers = [
            TierOutcome(
                tier.name, tier.blocks, engine.found.get(at, 0), counts.stored, counts.stored_bytes,
                counts.evicted, counts.declined, sum(counts.dropped.values()),
            )
            for at, (tier, counts) in enumerate(zip(layout.tiers, engine.counts.values(), strict=True))
        ]  # fmt: skip
        return Outcome(
            self._engine_hits + engine.asked_blocks, len(trace.requests), self._engine_hits, loaded,
            tuple(tiers), sorted(self._first_token_s), sum(self._first_token_s), trace.duration_s, took_s,
        )  # fmt: skip

    def _prompt(self, request: Request, tokens: int) -> Prompt:
        return self._engine.prompt(request.blocks + request.answer, tokens, self._keys)

    def _look(self, prompt: Prompt, request: Request, recorded_blocks: int, tokens: int) -> None:
        """Look a request of so many tokens up, given what the engine's own cache has as recorded."""
        had = self._in_engine(request, recorded_blocks) * self._block_tokens
        self._engine_hits += sum(len(group.needed(0, had)) for group in self._engine.groups)
        loads = self._engine.look(prompt, had)
        if not prompt.looks:  # One that was preempted has had its first token.
            prompt.left = max(1, tokens - had - loads)
        prompt.looks += 1

    def _load(self, prompt: Prompt) -> None:
        """Wait for what is loaded of a request; note when its first token would have come."""
        load_s = self._engine.load(prompt)
        if prompt.left:
            self._first_token_s.append(load_s + prompt.left * self._token_s)
            prompt.left = 0

    def _compute(self, prompts: Sequence[tuple[Prompt, int]]) -> None:
        """Compute requests up to so many tokens in one step, once what is loaded of them has come."""
        for prompt, _ in prompts:
            self._load(prompt)
        # Another stack may have more of a prompt than that of the recording.
        parts = [(prompt, max(tokens, prompt.num_computed_tokens)) for prompt, tokens in prompts]
        new = max(1, sum(tokens - prompt.num_computed_tokens for prompt, tokens in parts))
        self._engine.compute(parts, new, new * self._token_s)

    def _in_engine(self, request: Request, recorded_blocks: int) -> int:
        """Count the leading blocks that the engine's own cache has, of those that tiers may be asked for."""
        if self._cache is None:
            return min(recorded_blocks, len(request.blocks) + len(request.answer))
        known = min(self._cache.match(request.blocks), request.asked)
        self._cache.use(request.blocks + request.answer)
        return known
