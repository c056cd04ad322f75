"""What an engine tells of a step, what the leader answers, and what a rank reports: neutral values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from kvbm_core import Plan, Report

__all__ = ["EngineRequest", "GroupBlocks", "Limits", "Outcome", "Schedule", "Scheduled", "State", "Step"]


class EngineRequest(Protocol):
    """What is read of an engine's request, at any time of its life."""

    @property
    def request_id(self) -> str:
        """Its name, unique among those that live."""

    @property
    def all_token_ids(self) -> Sequence[int]:
        """Its tokens, of the prompt and of the answer so far."""

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""

    @property
    def num_computed_tokens(self) -> int:
        """Of how many the KV is computed, or will be once the steps under way have ended."""

    @property
    def trace_headers(self) -> Mapping[str, str] | None:
        """W3C's trace context that it came with. Read only where spans are made."""


GroupBlocks: TypeAlias = Sequence[Sequence[int]]
"""Device blocks by KV group: those of the groups that are stored, in their order, behind them those of
the engine's other groups, which are only written. 0 stands for no block where not all of them are kept."""

Scheduled: TypeAlias = tuple[str, int, int, GroupBlocks, bool]
"""One request of a step: its name, the tokens computed before and with the step, the blocks given to it, and
True if these are all its blocks, False if they come after those it has. Empty blocks: none in any group. A
plain tuple: there are many."""

State: TypeAlias = tuple[int, int, int]
"""A recurrent state that an engine hands over: the KV group, the device block that it is in when the step has
ended, and the tokens that it is of."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests may have of the tiers by hints, and ahead of their turn."""

    keep_fraction: float = 0.0
    """The part of a tier, and of a tenant's quota there, that may be kept. 0: nothing is."""
    max_keep_s: float = 0.0
    """So long may blocks be kept."""
    prefetch_fraction: float = 0.0
    """The part of the host pool that may hold blocks brought for requests which still wait. 0: none are."""
    patience_s: float = 0.0
    """A request waits no longer for what is on its way, from when that was planned."""


@dataclass(slots=True)
class Schedule:
    """What an engine has scheduled for one step."""

    requests: list[Scheduled]
    tokens: int
    """Computed by the step, of all requests. 0: it computes nothing."""
    preempted: Iterable[str] = ()
    """Requests that have lost their blocks."""
    states: Mapping[str, Sequence[State]] = field(default_factory=dict)
    """States that the step writes, by request: the only ones that may be read."""
    written: Sequence[int] = ()
    """Other device blocks that the step writes."""


@dataclass(slots=True)
class Step:
    """What the leader tells every rank of one step."""

    plan: Plan = field(default_factory=Plan)
    number: int = 0
    """Of this step."""
    computes: bool = False
    """True if the engine computes something in this step."""
    idle: bool = False
    """True if nothing is computed, and no result is due of an earlier step: it only polls. An engine may
    start steps that compute nothing before it takes the result of one that does; a request waits for that."""
    acked_step: int = 0
    """The last step with outcomes that the leader has taken in. An engine may have two steps under way."""


@dataclass(slots=True)
class Outcome:
    """What a rank tells the leader of one step."""

    reports: list[Report]
    step: int
    """Number of the step that they come with."""
