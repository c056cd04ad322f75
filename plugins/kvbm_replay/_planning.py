"""What `kvbm plan` answers: sizes and what they save, the cheapest that are enough, and a replay of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from kvbm_core.errors import ConfigError
from kvbm_core.registry import Registry
from kvbm_replay._answer import Row, RowNames, TraceAnswer, make_row
from kvbm_replay._curve import Curve, Points, curve_of, sampled
from kvbm_replay._driver import replay
from kvbm_replay._layout import capacity_bytes, read_layout
from kvbm_replay._machine import Machine
from kvbm_replay._reference import lru_hits, reuse_hits
from kvbm_replay._sizing import Advice, Loads, SizeAnswer, advise, grid, ladder
from kvbm_replay.trace import Keys, Trace

__all__ = ["MEMORY", "PlanAnswer", "Question", "answer_question"]

MEMORY: Final = "cpu"
"""The backend of host memory."""
_LOOKED_AT: Final = 300_000
"""Blocks of a trace that are looked at, about, if nobody says how many."""
_PROMPTS: Final = 4
"""Of the longest that the memory has room for: a quarter of it is on its way to a disk, at most."""
_NOWHERE: Final = "/nvme/kvbm"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a load."""

    machine: Machine
    disk: str = "lmdb"
    """The backend below the memory; one with a `path`."""
    goal: float = 0.8
    """Part of what memory without an end would save."""
    price: float = 30.0
    """What a GiB of memory costs, in GiB of disk."""
    policy: str = "lru"
    sizes: Sequence[int] = ()
    """Blocks. Empty: powers of two up to what the load can use."""
    engine_blocks: int = 0
    part: float | None = None
    """Of the blocks that are looked at. None: all of a short trace, some of a long one."""


class PlanAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    trace: TraceAnswer
    policy: str
    part: float
    """Of the blocks that were looked at."""
    goal: float
    price: float
    uncached_first_token_s: float
    """The mean time to the first token with the engine's own cache alone."""
    memory: tuple[SizeAnswer, ...]
    """Memory alone, by size."""
    disk: tuple[SizeAnswer, ...]
    """Below the memory that is advised, by size."""
    advice: Advice
    replayed: Row
    """The planner itself at the sizes that are advised, with as many blocks as were looked at."""
    stored_bytes_per_day: int
    """Written to the disk that is advised, at the pace of this load; to the memory without one."""
    config: dict[str, list[dict[str, Any]]]
    """For the connector."""


def answer_question(trace: Trace, question: Question) -> PlanAnswer:
    """Answer how much memory and disk a load needs."""
    machine = question.machine
    part = question.part or min(1.0, _LOOKED_AT / max(1, trace.accesses))
    few, registry = sampled(trace, part), Registry()
    block_bytes = trace.block_tokens * machine.token_bytes
    exact = curve_of(trace, part, question.engine_blocks)
    curve: Curve = exact
    if question.policy != "lru":
        curve = _measured(few, part, question, exact, registry)
    if not curve.most:
        raise ConfigError(
            f"{trace.name}: nothing of it was seen before, so memory of no size would save anything; write a "
            "longer trace, or another"
        )
    tokens = sum(request.input_tokens for request in trace.requests)
    tokens -= _engine_hits(trace, question.engine_blocks) * trace.block_tokens
    loads = Loads(curve, machine, trace.block_tokens, tokens, len(trace.requests), trace.duration_s)
    memory, disk = machine.speed(MEMORY, MEMORY), machine.speed(question.disk, question.disk)
    sizes = question.sizes or grid(loads)
    longest = max(len(request.blocks) for request in trace.requests)
    advice = advise(loads, memory, disk, goal=question.goal, price=question.price, least=_PROMPTS * longest)
    config = _config(advice, question, block_bytes, registry)
    layout = read_layout(config, block_bytes, registry)
    outcome = replay(
        few,
        layout.scaled(part),
        machine,
        registry=registry,
        engine_blocks=round(question.engine_blocks * part),
    )
    row = make_row(
        RowNames("advised", question.policy), layout, question.engine_blocks, trace.block_tokens, outcome
    )
    # A part of the blocks takes a part of the time.
    times = ("mean_first_token_s", "p50_first_token_s", "p95_first_token_s", "busy_s")
    row = msgspec.structs.replace(row, **{name: getattr(row, name) / part for name in times})
    stored = outcome.tiers[-1].stored_bytes / part
    below = [size for size in sizes if size > advice.memory.blocks] or [sizes[-1]]
    return PlanAnswer(
        trace=TraceAnswer.of(trace, reuse_hits(trace.requests)), policy=question.policy, part=part,
        goal=question.goal, price=question.price,
        uncached_first_token_s=tokens / machine.prefill_tokens_per_s / len(trace.requests),
        memory=tuple(ladder(loads, sizes, memory)),
        disk=tuple(ladder(loads, below, disk, above=advice.memory.blocks, above_speed=memory)),
        advice=advice, replayed=row, config=config,
        stored_bytes_per_day=round(stored / (trace.duration_s or 1.0) * 86_400),
    )  # fmt: skip


def _measured(few: Trace, part: float, question: Question, exact: Curve, registry: Registry) -> Points:
    """Replay several sizes of memory, where the policy has no curve of its own."""
    keys, best = Keys(), 0.0
    points: list[tuple[int, float]] = []
    block_bytes = few.block_tokens * question.machine.token_bytes
    entry = {"backend": MEMORY, "capacity": "1024TiB", "policy": question.policy}
    layout = read_layout({"tiers": [entry], "only_faster": False}, block_bytes, registry)
    largest = max(1, exact.blocks_for(exact.most))
    for step in range(9, -1, -1):
        blocks = max(1, largest >> step)
        outcome = replay(
            few, layout.with_blocks(0, max(1, round(blocks * part))), question.machine, registry=registry,
            keys=keys, engine_blocks=round(question.engine_blocks * part) or None,
        )  # fmt: skip
        best = max(best, sum(tier.hits for tier in outcome.tiers) / part)
        if not points or blocks > points[-1][0]:
            points.append((blocks, best))
    return Points(points, exact.accesses)


def _engine_hits(trace: Trace, engine_blocks: int) -> int:
    """Count the blocks that the engine's own cache has."""
    if not engine_blocks:
        return sum(request.engine_blocks or 0 for request in trace.requests)
    return lru_hits(trace.requests, engine_blocks)


def _config(
    advice: Advice, question: Question, block_bytes: int, registry: Registry
) -> dict[str, list[dict[str, Any]]]:
    """Write the tiers that are advised."""

    def capacity(backend: str, blocks: int) -> int:
        return capacity_bytes(registry.backend(backend), blocks, block_bytes)

    tiers: list[dict[str, Any]] = []
    if advice.memory.blocks:
        tiers.append({"backend": MEMORY, "capacity": capacity(MEMORY, advice.memory.blocks)})
    if advice.disk:
        below = capacity(question.disk, advice.disk.blocks)
        tiers.append({"backend": question.disk, "capacity": below, "path": _NOWHERE})
    if question.policy != "lru":
        tiers = [{**tier, "policy": question.policy} for tier in tiers]
    return {"tiers": tiers}
