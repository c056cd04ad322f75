"""What `kvbm replay` answers: plain values, for people's tables and for programs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvbm_replay._layout import Layout
from kvbm_replay._machine import Machine, Speed
from kvbm_replay._outcome import Outcome
from kvbm_replay.trace import Trace

__all__ = ["MachineAnswer", "ReplayAnswer", "Row", "TierAnswer", "TraceAnswer", "make_row"]


class TraceAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The load."""

    name: str
    requests: int
    blocks: int
    """That were asked for."""
    unique_blocks: int
    block_tokens: int
    duration_s: float
    lost_requests: int
    """That the recording has not."""
    reuse_ratio: float
    """Blocks that were there before, as a part of those asked for: what a cache without an end hits."""

    @classmethod
    def of(cls, trace: Trace, reuse: int) -> TraceAnswer:
        """Describe a trace of which so many blocks were there before."""
        return cls(
            name=trace.name, requests=len(trace.requests), blocks=trace.accesses, unique_blocks=trace.unique,
            block_tokens=trace.block_tokens, duration_s=trace.duration_s, lost_requests=trace.lost,
            reuse_ratio=reuse / trace.accesses if trace.accesses else 0.0,
        )  # fmt: skip


class MachineAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What was assumed."""

    prefill_tokens_per_s: float
    link_bytes_per_s: float
    token_bytes: int
    tiers: dict[str, Speed]
    """By name: bytes a second loaded and stored, seconds of latency."""
    paced: bool
    """True if writes took time."""

    @classmethod
    def of(cls, machine: Machine, layout: Layout, *, paced: bool) -> MachineAnswer:
        """Describe a machine with a stack."""
        return cls(
            prefill_tokens_per_s=machine.prefill_tokens_per_s, link_bytes_per_s=machine.link_bytes_per_s,
            token_bytes=machine.token_bytes, paced=paced,
            tiers={tier.name: machine.speed(tier.name, tier.backend) for tier in layout.tiers},
        )  # fmt: skip


class TierAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One tier in one replay."""

    name: str
    capacity_blocks: int | None
    """None: no bound."""
    hit_ratio: float
    """Blocks found here and in no tier above, as a part of those asked for."""
    stored_blocks: int
    stored_bytes: int
    evicted_blocks: int
    declined_blocks: int
    """Found, and computed all the same, because that is faster."""
    dropped_blocks: int
    """Not stored, because too many were waiting to be written."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One replay, and what LRU and Belady hit in one cache of the same total size."""

    policy: str
    capacity_blocks: int | None
    """Of all tiers and the engine's cache together. None: no bound."""
    capacity_tokens: int | None
    hit_ratio: float
    """Blocks found in the engine's cache and in tiers, as a part of those asked for."""
    engine_hit_ratio: float
    loaded_ratio: float
    tiers: tuple[TierAnswer, ...]
    mean_first_token_s: float
    p50_first_token_s: float
    p95_first_token_s: float
    busy_s: float
    """The time that one engine needs to load and compute all prompts."""
    replay_s: float
    lru_hit_ratio: float | None = None
    belady_hit_ratio: float | None = None


class ReplayAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    trace: TraceAnswer
    machine: MachineAnswer
    uncached_first_token_s: float
    """The mean time to the first token if nothing is kept."""
    rows: tuple[Row, ...]


def make_row(
    policy: str, layout: Layout, engine_blocks: int, block_tokens: int, outcome: Outcome,
    references: Sequence[float | None] = (None, None),
) -> Row:  # fmt: skip
    """Put a replay's numbers in order; `references` are the hit ratios of LRU and Belady."""
    accesses = max(1, outcome.accesses)
    blocks = None if layout.blocks is None else layout.blocks + engine_blocks
    tiers = tuple(
        TierAnswer(
            name=tier.name, capacity_blocks=tier.blocks, hit_ratio=tier.hits / accesses,
            stored_blocks=tier.stored, stored_bytes=tier.stored_bytes, evicted_blocks=tier.evicted,
            declined_blocks=tier.declined, dropped_blocks=tier.dropped,
        )
        for tier in outcome.tiers
    )  # fmt: skip
    return Row(
        policy=policy, capacity_blocks=blocks,
        capacity_tokens=None if blocks is None else blocks * block_tokens,
        hit_ratio=outcome.hit_ratio, engine_hit_ratio=outcome.engine_hits / accesses,
        loaded_ratio=outcome.loaded / accesses, tiers=tiers,
        mean_first_token_s=outcome.mean_first_token_s, p50_first_token_s=outcome.percentile_s(0.5),
        p95_first_token_s=outcome.percentile_s(0.95), busy_s=outcome.busy_s, replay_s=outcome.took_s,
        lru_hit_ratio=references[0], belady_hit_ratio=references[1],
    )  # fmt: skip
