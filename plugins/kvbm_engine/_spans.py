"""Spans of loads and stores, where the engine's tracing is on.

    its turn ──► planned ──► from one tier ──► from the last tier
    └──────────────────────── kvbm.load ───────────────────────┘   one a request, in the trace it came with

    planned ──► written on every rank
    └────────── kvbm.store ─────────┘                              one a batch and tier, likewise

A span is made when all of it is known, with the times that it had: the sampler sees every attribute, and what
is not sampled costs next to nothing. The engine's own exporter has a queue of its own, and drops what is too
much for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from kvbm_core.leader.endings import Took
from kvbm_core.leader.ground.tiers import Tiers
from kvbm_core.plan import Fill, Load, Plan
from kvbm_core.tier import Op, Reason
from kvbm_engine._recorder import Recorder
from kvbm_engine._values import EngineRequest

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Tracer

__all__ = ["Spans", "Watchers"]

MOST_PER_S: Final = 100
"""Spans in one second; the next one says how many were left out."""
_MOST_STORES: Final = 4096
"""Stores under way of which the requests are known."""
_MOST_REQUESTS: Final = 8
"""Named by the span of a store: small stores of several requests are one."""

Headers: TypeAlias = Mapping[str, str]
"""W3C's trace context, as a client sent it."""
_Event: TypeAlias = tuple[str, dict[str, Any], float]
"""Within a span: its name, its attributes, and when it was."""


class Watchers(NamedTuple):
    """Who is told what becomes of requests. Whoever is absent costs nothing."""

    recorder: Recorder | None = None
    """Writes down what is asked for."""
    spans: Spans | None = None
    """Traces loads and stores."""


@dataclass(slots=True)
class _Loading:
    """A request that loads."""

    headers: Headers | None
    turn_s: float
    """When the engine first turned to it."""
    planned_s: float
    tokens: int
    """That were promised to the engine."""
    blocks_left: int = 0
    ended: list[tuple[float, Load, Mapping[int, Reason]]] = field(default_factory=list)
    """Its loads that have ended: when, and which blocks failed."""


class Spans:
    """Tells OpenTelemetry of one engine's loads and stores. No clock, but to put times into the world's.

    Args:
        tracer: OpenTelemetry's.
        tiers: The leader's tiers.
    """

    def __init__(self, tracer: Tracer, tiers: Tiers) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracer
        self._tiers = tiers
        self._nothing = Context()
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace
        self._turns: dict[str, float] = {}
        self._loads: dict[str, _Loading] = {}
        self._stores: dict[int, list[Headers]] = {}
        """By operation the contexts of the requests whose blocks it writes."""
        self._second_s = float("-inf")
        self._made = 0
        """Spans since then."""
        self._left_out = 0

    def __repr__(self) -> str:
        return f"<Spans {len(self._loads)} requests loading, {len(self._stores)} stores>"

    def asked(self, name: str, now_s: float) -> None:
        """Note that the engine turns to a request; the first time counts."""
        self._turns.setdefault(name, now_s)

    def admitted(self, request: EngineRequest, load_tokens: int, now_s: float) -> None:
        """Note that a request has blocks, and loads so many tokens into them."""
        turn_s = self._turns.pop(request.request_id, now_s)
        if load_tokens:
            self._loads[request.request_id] = _Loading(request.trace_headers, turn_s, now_s, load_tokens)

    def planned(self, plan: Plan) -> None:
        """Note a plan's loads, of which the ends will come."""
        for load in plan.loads:
            if (loading := self._loads.get(load.request)) is not None:
                loading.blocks_left += len(load.keys)

    def offered(self, ops: Iterable[int], request: EngineRequest) -> None:
        """Note whose blocks are written by stores."""
        if (headers := request.trace_headers) is None:
            return
        for op in ops:
            if op in self._stores or len(self._stores) < _MOST_STORES:
                known = self._stores.setdefault(op, [])
                if headers not in known and len(known) < _MOST_REQUESTS:
                    known.append(headers)

    def loaded(self, load: Load, failures: Mapping[int, Reason], now_s: float) -> None:
        """Take in a load that has ended on every rank: with a request's last one its span is over."""
        loading = self._loads.get(load.request)
        if loading is None:
            return
        loading.ended.append((now_s, load, failures))
        loading.blocks_left -= len(load.keys)
        if not loading.blocks_left:
            self._tell_load(load.request, now_s)

    def gone(self, name: str, now_s: float) -> None:
        """Take in that a request is gone; what loads for it is of no use any more."""
        self._turns.pop(name, None)
        if name in self._loads:
            self._tell_load(name, now_s, "aborted")

    def ended(self, took: Iterable[Took], now_s: float) -> None:
        """Take in operations that have ended on every rank in one tier: each store has a span there."""
        for each in took:
            if each.kind is Op.STORE:
                of = self._stores.pop(each.op.op, []) if each.is_last else self._stores.get(each.op.op, [])
                if self._may_make(now_s):
                    self._tell_store(each, of, now_s)

    def _tell_store(self, took: Took, of: Sequence[Headers], now_s: float) -> None:
        op, tier = took.op, took.tier
        about = _outcome("stored", len(op.keys), [*took.failures.values()])
        about |= {"kvbm.tier": tier.name, "kvbm.bytes": about["kvbm.blocks"] * tier.block_bytes[op.group]}
        if isinstance(op, Fill):
            about |= {"kvbm.source": self._tiers[op.source].name, "kvbm.cause": op.reason.value}
        self._tell("kvbm.store", of, about, [], (now_s - took.seconds, now_s))

    def _tell_load(self, name: str, now_s: float, outcome: str = "loaded") -> None:
        loading = self._loads.pop(name)
        if not self._may_make(now_s):
            return
        loads = [load for _, load, _ in loading.ended]
        reasons = [why for *_, failures in loading.ended for why in failures.values()]
        about = _outcome(outcome, sum(len(load.keys) for load in loads), reasons)
        about |= {
            "gen_ai.request.id": name,
            "kvbm.tokens": loading.tokens,
            "kvbm.tiers": [
                tier.name for at, tier in enumerate(self._tiers) if any(load.tier == at for load in loads)
            ],
            "kvbm.bytes": sum(
                (len(load.keys) - len(failures)) * self._tiers[load.tier].block_bytes[load.group]
                for _, load, failures in loading.ended
            ),
        }
        events: list[_Event] = [("planned", {}, loading.planned_s)]
        for at_s, load, failures in loading.ended:
            piece = _outcome("loaded", len(load.keys), [*failures.values()])
            events.append(("ended", piece | {"kvbm.tier": self._tiers[load.tier].name}, at_s))
        of = [] if loading.headers is None else [loading.headers]
        self._tell("kvbm.load", of, about, events, (loading.turn_s, now_s))

    def _tell(
        self, name: str, of: Sequence[Headers], about: dict[str, Any], events: Sequence[_Event],
        times_s: tuple[float, float],
    ) -> None:  # fmt: skip
        """Make a span that began and ended at these times, in the trace of the first of some requests."""
        began_s, now_s = times_s
        wall_ns = time.time_ns()

        def moment(at_s: float) -> int:
            return wall_ns - int((now_s - at_s) * 1e9)

        if self._left_out:
            about["kvbm.left_out_spans"], self._left_out = self._left_out, 0
        contexts = [self._context(headers) for headers in of] or [self._nothing]
        span = self._tracer.start_span(
            name, contexts[0], attributes=about, links=[self._link(other) for other in contexts[1:]],
            start_time=moment(began_s),
        )  # fmt: skip
        if span.is_recording():
            for event, more, at_s in events:
                span.add_event(event, more, moment(at_s))
        span.end(wall_ns)

    def _context(self, headers: Headers) -> Context:
        return self._propagator.extract(headers, self._nothing)

    def _link(self, context: Context) -> Link:
        return self._trace.Link(self._trace.get_current_span(context).get_span_context())

    def _may_make(self, now_s: float) -> bool:
        """Count one more span. False: there were too many in this second."""
        if now_s - self._second_s >= 1.0:
            self._second_s, self._made = now_s, 0
        self._made += 1
        self._left_out += self._made > MOST_PER_S
        return self._made <= MOST_PER_S


def _outcome(word: str, blocks: int, reasons: Sequence[Reason]) -> dict[str, Any]:
    """Say how many blocks went well, and why the others did not, as a rule."""
    about: dict[str, Any] = {"kvbm.outcome": word, "kvbm.blocks": blocks - len(reasons)}
    if reasons:
        if word != "aborted":
            about["kvbm.outcome"] = "in part" if blocks > len(reasons) else "failed"
        about |= {
            "kvbm.failed_blocks": len(reasons),
            "kvbm.reason": Counter(reasons).most_common(1)[0][0].value,
        }
    return about
