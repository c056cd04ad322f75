"""What `kvbm status` and `kvbm top` say of servers, from what their metrics were at two moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from kvbm_cli.top._scrape import Labels, Scrape
from kvbm_metrics import METRICS, Kind

__all__ = ["EngineState", "ServerState", "Span", "Status", "TierState", "describe", "quantile", "status"]

Values = Mapping[str, Mapping[Labels, float]]

_FAULTS: Final = frozenset(
    {f"{operation} {reason}" for operation in ("store", "load", "lookup")
     for reason in ("corrupt", "deadline", "error")} | {"store full"}
)  # fmt: skip
"""The other reasons belong to a tier that works: it is busy, or another engine has evicted the block."""


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """What a tier did in a span of time."""

    hit_ratio: float | None
    """Of the blocks it was asked for; null where it was asked for none."""
    saved_tokens: int
    loaded_bytes: int
    stored_bytes: int
    load_p50_s: float | None
    """From plan to end of a load, estimated from the histogram's buckets; null where nothing was loaded."""
    load_p95_s: float | None
    evicted_blocks: int
    failed: dict[str, int]
    """Transfers of blocks, by operation and reason, like `load deadline`. Those of which there are none are
    left out."""
    dropped: dict[str, int]
    """Blocks not even tried to be stored, by reason."""


class TierState(msgspec.Struct, frozen=True, kw_only=True):
    """One tier of one engine."""

    tier: str
    state: str
    """`works`; `fails`, where transfers failed lately by the medium's fault; or `left alone`."""
    left_alone_for: str | None
    """The operation that failed last and its reason, like `load deadline`; null where it is not left alone.
    The medium's own words are in the engine's log."""
    used_bytes: int
    capacity_bytes: int | None
    """That it holds now; null where it has no limit of its own."""
    queued_loads: int
    """Blocks."""
    queued_stores: int
    since_start: Span
    lately: Span | None
    """In the last `seconds`; null where the server was asked once."""


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of a server."""

    model: str
    engine: str
    tiers: list[TierState]
    """In the order in which the server has them: the stack's."""


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """One server."""

    url: str
    problem: str | None
    """Why nothing is known of it."""
    seconds: float | None
    """That `lately` is long."""
    engines: list[EngineState]
    """Empty, too, where none has reported yet: each does with its first request."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm status --json` writes, and `kvbm top --json` in each line."""

    servers: list[ServerState]
    to_mend: list[str]


def describe(url: str, now: Scrape, before: Scrape | None, seconds: float | None) -> ServerState:
    """Say what a server's metrics mean.

    Args:
        url: The server's.
        now: Its metrics.
        before: What they were; None if that is not known.
        seconds: How long ago that was.
    """
    engines = []
    for engine, values in now.engines.items():
        earlier = None if before is None else before.engines.get(engine, {})
        grown = None if earlier is None else _growth(values, earlier)
        tiers = [_tier(tier, values, grown) for tier in _tiers(values)]
        engines.append(EngineState(model=engine[0], engine=engine[1], tiers=tiers))
    return ServerState(url=url, problem=None, seconds=seconds, engines=engines)


def status(servers: list[ServerState]) -> Status:
    """Put servers together, and list what somebody should mend."""
    to_mend = [server.problem for server in servers if server.problem]
    for server in servers:
        for engine in server.engines:
            where = f"{server.url} engine {engine.engine or 0}"
            to_mend += [
                f"{where}: tier {tier.tier} {said}" for tier in engine.tiers if (said := _to_mend(tier))
            ]
    return Status(servers=servers, to_mend=to_mend)


def _to_mend(tier: TierState) -> str:
    if tier.state == "works":
        return ""
    span = tier.since_start if tier.lately is None or not tier.lately.failed else tier.lately
    reasons = ", ".join(f"{count} {word}" for word, count in span.failed.items()) or "none counted"
    when = "since the start" if span is tier.since_start else "lately"
    if tier.state != "left alone":
        return f"fails; failed {when}: {reasons}"
    why = (
        ""
        if tier.left_alone_for is None
        else f" for {tier.left_alone_for}, see 'tier {tier.tier} fails' in its log"
    )
    return f"is left alone{why}; failed {when}: {reasons}"


def _tiers(values: Values) -> list[str]:
    """Name the tiers, in the order in which gauges have them."""
    names = ("tier_usable", "hit_blocks", "tier_used_bytes")
    return list(dict.fromkeys(labels[-1] for name in names for labels in values.get(name, ())))


def _growth(values: Values, before: Values) -> Values:
    """Give what counters and buckets grew by. One that is smaller than before began anew at 0."""
    grown: dict[str, dict[Labels, float]] = {}
    for name, series in values.items():
        if METRICS[name].kind is Kind.GAUGE:
            continue
        old = before.get(name, {})
        grown[name] = {
            labels: value - old.get(labels, 0.0) if value >= old.get(labels, 0.0) else value
            for labels, value in series.items()
        }
    return grown


def _tier(tier: str, values: Values, grown: Values | None) -> TierState:
    lately = None if grown is None else _span(tier, grown)
    state = "works"
    if lately is not None and lately.failed.keys() & _FAULTS:
        state = "fails"
    if values.get("tier_usable", {}).get((tier,), 1.0) == 0.0:
        state = "left alone"
    faults = values.get("tier_left_alone", {}).items()
    left_alone_for = [
        f"{operation} {reason}" for (operation, reason, name), on in faults if on and name == tier
    ]
    capacity = values.get("tier_capacity_now_bytes", values.get("tier_capacity_bytes", {})).get((tier,))
    queued = values.get("queued_blocks", {})
    return TierState(
        tier=tier,
        state=state,
        left_alone_for=left_alone_for[0] if left_alone_for else None,
        used_bytes=_count(values, "tier_used_bytes", tier),
        capacity_bytes=None if capacity is None else int(capacity),
        queued_loads=int(queued.get(("load", tier), 0.0)),
        queued_stores=int(queued.get(("store", tier), 0.0)),
        since_start=_span(tier, values),
        lately=lately,
    )


def _span(tier: str, values: Values) -> Span:
    hits, misses = _count(values, "hit_blocks", tier), _count(values, "missed_blocks", tier)
    buckets = {
        float(bound): count
        for (operation, name, bound), count in values.get("operation_seconds", {}).items()
        if (operation, name) == ("load", tier)
    }
    return Span(
        hit_ratio=hits / (hits + misses) if hits + misses else None,
        saved_tokens=_count(values, "saved_tokens", tier),
        loaded_bytes=_count(values, "loaded_bytes", tier),
        stored_bytes=_count(values, "stored_bytes", tier),
        load_p50_s=quantile(0.5, buckets),
        load_p95_s=quantile(0.95, buckets),
        evicted_blocks=_count(values, "evicted_blocks", tier),
        failed=_by_reason(values.get("failed_transfers", {}).items(), tier),
        dropped=_by_reason(values.get("dropped_blocks", {}).items(), tier),
    )


def _count(values: Values, name: str, tier: str) -> int:
    return int(values.get(name, {}).get((tier,), 0.0))


def _by_reason(series: Iterable[tuple[Labels, float]], tier: str) -> dict[str, int]:
    """Give what is not 0; the tier is the last label, and those before it are the words."""
    return {" ".join(words): int(count) for (*words, name), count in series if name == tier and count}


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """Estimate a quantile as Prometheus does: even within a bucket, and in the last its lower bound.

    Args:
        share: Between 0 and 1.
        buckets: By its upper bound, how many observations are at most that.
    """
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return None
    wanted = share * buckets[bounds[-1]]
    lower, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= wanted and not math.isinf(bound):
            return lower + (bound - lower) * (wanted - below) / (buckets[bound] - below)
        if not math.isinf(bound):
            lower, below = bound, buckets[bound]
    return lower
