"""What `kvbm replay` answers: plain values, for people's tables and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from kvbm_replay._layout import Layout
from kvbm_replay._machine import Machine, Speed
from kvbm_replay._outcome import Outcome
from kvbm_replay.trace import Trace

__all__ = [
    "LoadAnswer",
    "MachineAnswer",
    "PolicyAnswer",
    "ReplayAnswer",
    "Row",
    "RowNames",
    "TierAnswer",
    "TraceAnswer",
    "compare",
    "gain",
    "make_row",
]

_NOTHING: Final = 0.001
"""A difference of hit ratios in which no policy can show anything."""


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
    def of(cls, machine: Machine, layouts: Sequence[Layout], *, paced: bool) -> MachineAnswer:
        """Describe a machine with the tiers of some stacks."""
        tiers = [tier for layout in layouts for tier in layout.tiers]
        return cls(
            prefill_tokens_per_s=machine.prefill_tokens_per_s, link_bytes_per_s=machine.link_bytes_per_s,
            token_bytes=machine.token_bytes, paced=paced,
            tiers={tier.name: machine.speed(tier.name, tier.backend) for tier in tiers},
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

    stack: str
    """What it was called, or where it was read."""
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


class LoadAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """All replays of one load."""

    trace: TraceAnswer
    machine: MachineAnswer
    uncached_first_token_s: float
    """The mean time to the first token if nothing is kept."""
    rows: tuple[Row, ...]


class PolicyAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One policy over all replays."""

    policy: str
    replays: int
    worst_over_lru: float
    """The smallest difference of its hit ratio to that of LRU; below 0 where it hits less."""
    mean_gain: float | None
    """Of what Belady has over LRU, the mean part that it has, where that is more than a thousandth."""


class ReplayAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    loads: tuple[LoadAnswer, ...]
    policies: tuple[PolicyAnswer, ...]
    """Empty if LRU and Belady were not computed."""


def gain(row: Row) -> float | None:
    """Give the part of what Belady has over LRU that a replay has; None where that is next to nothing."""
    if row.lru_hit_ratio is None or row.belady_hit_ratio is None:
        return None
    most = row.belady_hit_ratio - row.lru_hit_ratio
    return (row.hit_ratio - row.lru_hit_ratio) / most if most > _NOTHING else None


def compare(loads: Sequence[LoadAnswer]) -> ReplayAnswer:
    """Put loads together, and say of each policy how it stands to LRU and Belady over all of them."""
    rows = [row for load in loads for row in load.rows if row.lru_hit_ratio is not None]
    policies = []
    for policy in dict.fromkeys(row.policy for row in rows):
        own = [row for row in rows if row.policy == policy]
        gains = [part for part in map(gain, own) if part is not None]
        policies.append(
            PolicyAnswer(
                policy=policy, replays=len(own),
                worst_over_lru=min(row.hit_ratio - (row.lru_hit_ratio or 0.0) for row in own),
                mean_gain=sum(gains) / len(gains) if gains else None,
            )
        )  # fmt: skip
    return ReplayAnswer(loads=tuple(loads), policies=tuple(policies))


class RowNames(NamedTuple):
    """What a row is called."""

    stack: str
    policy: str


def make_row(
    names: RowNames, layout: Layout, engine_blocks: int, block_tokens: int, outcome: Outcome,
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
        stack=names.stack, policy=names.policy, capacity_blocks=blocks,
        capacity_tokens=None if blocks is None else blocks * block_tokens,
        hit_ratio=outcome.hit_ratio, engine_hit_ratio=outcome.engine_hits / accesses,
        loaded_ratio=outcome.loaded / accesses, tiers=tiers,
        mean_first_token_s=outcome.mean_first_token_s, p50_first_token_s=outcome.percentile_s(0.5),
        p95_first_token_s=outcome.percentile_s(0.95), busy_s=outcome.busy_s, replay_s=outcome.took_s,
        lru_hit_ratio=references[0], belady_hit_ratio=references[1],
    )  # fmt: skip
