"""What happened to recorded requests, in order: who was looked up, and whose blocks were offered together.

moments, µs     10      25      31      900 901 902      1500
request a      comes   looked                stored      stored, its last
request b              comes   looked   stored │
request c                                      stored    one step offers them together
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from kvbm_replay.trace import Request

__all__ = ["Event", "Kind", "read_events"]


class Kind(IntEnum):
    """What happens to a request."""

    ARRIVE = 0
    TURN = 1
    """The engine turns to it and has no room."""
    LOOK = 2
    """It is looked up and given blocks."""
    STORE = 3
    """What it has computed is offered to the tiers."""


class Event(NamedTuple):
    """One moment of one request."""

    at_us: int
    kind: Kind
    request: int
    """Its position in the trace."""
    engine_tokens: int = 0
    """Of a turn or a look: leading tokens that the engine's own cache had."""
    tokens: int = 0
    """Of a look all that the request had, of a store those whose blocks are offered."""
    is_last: bool = False
    """True if nothing more happens to the request."""
    has_ended: bool = False
    """True for a store after the end of the request: with it comes what only the end of an answer makes
    worth storing."""
    goes_on: bool = False
    """True for a store if the next event is of the same step of the engine."""


def read_events(requests: Sequence[Request]) -> Iterator[Event]:
    """Give the events of requests in order; every request has a course."""
    events = sorted(event for at, request in enumerate(requests) for event in _of(at, request))
    left = Counter(event.request for event in events)
    for event, after in zip(events, [*events[1:], None], strict=True):
        left[event.request] -= 1
        # The blocks of one step are offered at one time, so their moments follow each other by one.
        goes_on = (
            after is not None and event.kind is after.kind is Kind.STORE and after.at_us == event.at_us + 1
        )
        yield event._replace(is_last=not left[event.request], goes_on=goes_on)


def _of(at: int, request: Request) -> Iterator[Event]:
    course = request.course
    assert course is not None, "a request without a course among others that have one"
    yield Event(round(request.at_s * 1e6), Kind.ARRIVE, at)
    if course.turned:
        yield Event(course.turned[0], Kind.TURN, at, course.turned[1])
    for moment, engine_tokens, tokens in course.looks:
        yield Event(moment, Kind.LOOK, at, engine_tokens, tokens)
    for moment, tokens in course.stores:
        has_ended = course.ended is not None and moment > course.ended
        yield Event(moment, Kind.STORE, at, tokens=tokens, has_ended=has_ended)
