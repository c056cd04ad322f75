"""Drives the real planner with a trace: it decides as in an engine, and nothing is moved."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from kvbm_core import Origin, Planner
from kvbm_core.block import BlockKey
from kvbm_core.registry import Registry
from kvbm_replay._engine_cache import EngineCache
from kvbm_replay._layout import Layout
from kvbm_replay._machine import Machine
from kvbm_replay._outcome import Outcome, TierOutcome
from kvbm_replay._ranks import Ranks
from kvbm_replay.trace import Keys, Request, Trace

__all__ = ["replay"]

_NOTHING: Final[Mapping[int, float]] = MappingProxyType({})


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
        trace: The requests.
        layout: The stack.
        machine: Its speeds: for times, and for what the planner would find faster to compute.
        registry: Where policies are found.
        keys: Of the trace's blocks, where several replays share them.
        engine_blocks: Blocks of the engine's own prefix cache. None: as recorded, or none.
        paced: True if writes take the machine's time; then a slow tier loses stores.
    """
    keys = Keys() if keys is None else keys
    run = _Replay(layout, machine, registry or Registry(), keys, engine_blocks, paced=paced)
    began_s = time.perf_counter()
    for request in trace.requests:
        run.take(request)
    run.finish()
    return run.outcome(trace, time.perf_counter() - began_s)


class _Replay:
    """One replay: an engine that computes one prompt after the other."""

    def __init__(
        self, layout: Layout, machine: Machine, registry: Registry, keys: Keys, engine_blocks: int | None,
        *, paced: bool,
    ) -> None:  # fmt: skip
        self._layout, self._machine, self._keys = layout, machine, keys
        self._engine = None if engine_blocks is None else EngineCache(engine_blocks)
        self._block_tokens = layout.block_bytes // machine.token_bytes
        config = layout.config
        self._planner = Planner(
            [layout.statuses()],
            max_store_blocks=config.max_store_blocks,
            policies=registry.policies(config),
            block_tokens=self._block_tokens if config.only_faster else 0,
            movements=[entry.movement for entry in config.tiers],
        )
        self._asks = any(tier.shared for tier in layout.tiers)
        self._ranks = Ranks(layout, machine, paced=paced)
        self._now_s = 0.0
        self._hits: Counter[int] = Counter()
        self._loaded = 0
        self._engine_hits = 0
        self._first_token_s: list[float] = []
        self._busy_s = 0.0

    def take(self, request: Request) -> None:
        """Look a request up, load what is worth it, compute the rest, and store its blocks."""
        planner = self._planner
        self._pass(request.at_s)
        known = self._in_engine(request)
        keys = self._keys.of(request.blocks)
        tiers = self._find(keys[known : request.asked])
        self._hits.update(tiers)
        self._engine_hits += known
        worth = planner.cost_model.blocks_to_load(tiers, self._now_s)
        loading: dict[int, float] = {}
        if worth < len(tiers):
            planner.decline(tiers[worth:])
            del tiers[worth:]
        if tiers:
            planner.cost_model.tried(tiers, self._now_s)
            loading = self._ranks.load_seconds(tiers)
            planner.load("", keys[known : known + worth], range(worth), tiers, head=keys[0])
            self._go(loading)
            self._pass(self._now_s + max(loading.values()))
        self._loaded += worth
        tokens = max(1, request.input_tokens - (known + worth) * self._block_tokens)
        compute_s = tokens / self._machine.prefill_tokens_per_s
        self._pass(self._now_s + compute_s)
        planner.cost_model.computed(tokens, compute_s, self._now_s)
        self._first_token_s.append(max(loading.values(), default=0.0) + compute_s)
        self._busy_s += self._first_token_s[-1]
        self._store(keys, request)

    def finish(self) -> None:
        """Write what is still to be written."""
        self._pass(math.inf)

    def outcome(self, trace: Trace, took_s: float) -> Outcome:
        """Give what was counted."""
        planner, layout = self._planner, self._layout
        tiers = [
            TierOutcome(
                tier.name, tier.blocks, self._hits[at], counts.stored, counts.stored * layout.block_bytes,
                counts.evicted, counts.declined, sum(counts.dropped.values()),
            )
            for at, (tier, counts) in enumerate(zip(layout.tiers, planner.counts.values(), strict=True))
        ]  # fmt: skip
        return Outcome(
            trace.accesses, len(trace.requests), self._engine_hits, self._loaded, tuple(tiers),
            sorted(self._first_token_s), self._busy_s, trace.duration_s, took_s,
        )  # fmt: skip

    def _in_engine(self, request: Request) -> int:
        """Count the leading blocks that the engine's own cache has, of those that tiers may be asked for."""
        if self._engine is None:
            return min(request.engine_blocks or 0, request.asked)
        known = min(self._engine.match(request.blocks), request.asked)
        self._engine.use(request.blocks + request.answer)
        return known

    def _find(self, keys: Sequence[BlockKey]) -> list[int]:
        """Find the longest prefix; tiers that cannot list their blocks are asked, and answer at once."""
        planner, now_s = self._planner, self._now_s
        tiers = planner.match(keys, now_s)
        while self._asks and (rest := keys[len(tiers) :]) and planner.lookup(rest, now_s, head=keys[0]):
            self._go()
            tiers = planner.match(keys, now_s)
        return tiers

    def _store(self, keys: list[BlockKey], request: Request) -> None:
        """Offer what was computed: the prompt's blocks together, those of the answer as they come."""
        planner, answer = self._planner, self._keys.of(request.answer)
        prefix = {*keys, *answer}
        planner.store(keys, range(len(keys)), prefix, self._now_s, 0, Origin(0, len(keys)))
        self._go()
        for at, key in enumerate(answer, len(keys)):
            planner.store([key], [0], prefix, self._now_s, 0, Origin(at, len(keys)))
            self._go()

    def _pass(self, until_s: float) -> None:
        """Let time pass, and have the planner learn of each write when it has ended."""
        for end_s, reports in self._ranks.ended(until_s):
            self._now_s = max(self._now_s, end_s)
            self._planner.report(reports, self._now_s)
            self._go()
        if until_s < math.inf:
            self._now_s = max(self._now_s, until_s)

    def _go(self, loading: Mapping[int, float] = _NOTHING) -> None:
        """Carry out what is planned, and what follows from that."""
        while plan := self._planner.take(self._now_s):
            self._ranks.submit(self._planner, plan, self._now_s, loading)
