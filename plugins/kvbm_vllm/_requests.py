"""What is known of the engine's requests, and which of their blocks are certain to be written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import vllm

from kvbm_core import Match
from kvbm_vllm._keys import RequestKeys

__all__ = ["Parked", "RequestState", "StepsUnderWay"]


@dataclass(slots=True, eq=False)
class RequestState:
    """What is known of one request, until its last blocks are stored."""

    request: Any
    keys: RequestKeys
    blocks: list[int] = field(default_factory=list)
    """Device blocks, in order of the tokens."""
    computed_tokens: int = 0
    """Tokens whose KV is in `blocks`, as far as steps have reported. Those of steps under way come on top."""
    noted_blocks: int = 0
    """Complete once the steps under way have ended."""
    steps_under_way: int = 0
    """Those that complete blocks of it."""
    life: int = 0
    """Counts the times that it began anew, so that a step of before says nothing of its new blocks."""
    offered_blocks: int = 0
    """Blocks the planner was offered for storing."""
    match: Match | None = None
    """The last finding, remembered until blocks are given for it."""
    judged: Match | None = None
    """The finding that was last weighed against computing: a try of a slow tier is given once."""
    worth_blocks: int = 0
    """Leading blocks of it that shall be loaded."""
    from_host_pool: bool = False
    """Whether all of these are in the memory that a tier lends."""
    matched_step: int = 0
    """The step in whose planning it was matched last."""
    is_held: bool = False
    """Whether it waits because too many blocks are parked."""
    is_counted: bool = True
    """Whether metrics have the finding. They count it once, however often vLLM asks."""
    in_step: bool = False
    """Whether the finding shall be loaded in the step that computes the rest."""
    may_load: bool = True
    """False after a load that failed: the request computes, so that it cannot fail in a circle."""
    may_store: bool = True
    """False while its blocks may hold KV from before a reset, or of a step that failed."""
    ended_s: float | None = None
    """When the request finished. None: it has not."""
    ended_step: int = 0
    """The last step that had been planned then."""

    def complete_blocks(self, block_tokens: int) -> int:
        """Count the leading blocks that may be stored, offered or not."""
        if not self.may_store:
            return 0
        # The last token's KV is not computed yet, and tokens a drafting model proposed are not in
        # the request before they are accepted.
        tokens: int = min(self.computed_tokens, self.request.num_tokens - 1)
        return min(tokens // block_tokens, len(self.blocks))

    def begin_anew(self, blocks: list[int]) -> None:
        """Take other blocks, of which nothing is computed yet."""
        self.blocks, self.life = blocks, self.life + 1
        self.computed_tokens = self.noted_blocks = 0

    def forget(self, keys: RequestKeys) -> None:
        """Go on under other keys: nothing known of before is true of them."""
        self.keys, self.offered_blocks = keys, 0
        self.match = self.judged = None
        self.is_held = False
        if self.blocks:
            self.may_store = False
            self.begin_anew(self.blocks)


@dataclass(slots=True, eq=False)
class _Step:
    tokens: int
    """Computed by it; 0 where loads delay it, so that its time says nothing."""
    began_s: float
    writes: list[tuple[RequestState, int, int]]
    """Requests whose blocks it completes: the tokens computed with it, and the request's life."""


class StepsUnderWay:
    """Steps whose outcomes have not come. Only what a step has reported as computed is certain.

    Outcomes come in the order of the steps. A step that is passed over has failed: what it was to write is
    not in the blocks.
    """

    max_steps: Final = 64
    """Under way at once; what is older was lost."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._steps: dict[int, _Step] = {}
        self.number = 0
        """Of the last step."""
        self.confirmed: list[RequestState] = []
        """Requests with blocks that became certain, until somebody takes them from here."""

    def __repr__(self) -> str:
        return f"<StepsUnderWay {len(self._steps)} after {self.number}>"

    def __bool__(self) -> bool:
        return bool(self._steps)

    def advance(self) -> None:
        """Go on to the next step, which may compute or not."""
        self.number += 1
        if (lost := self._steps.pop(self.number - self.max_steps, None)) is not None:
            self._lose(lost)

    def begin(self, writes: list[tuple[RequestState, int]], tokens: int, now_s: float) -> None:
        """Note that the step computes.

        Args:
            writes: Requests that it computes, each with all tokens computed then.
            tokens: Computed by it; 0 where loads delay it.
            now_s: The time, in seconds.
        """
        step = self._steps[self.number] = _Step(tokens, now_s, [])
        for state, total in writes:
            complete = total // self._block_tokens
            if complete > state.noted_blocks:
                state.noted_blocks = complete
                state.steps_under_way += 1
                step.writes.append((state, total, state.life))

    def end(self, number: int, now_s: float) -> tuple[int, float]:
        """Take in a step's outcome; give the tokens it computed, and the seconds since it was planned."""
        for earlier in [each for each in self._steps if each < number]:
            self._lose(self._steps.pop(earlier))
        step = self._steps.pop(number, None)
        if step is None:
            return 0, 0.0
        for state, total, life in step.writes:
            state.steps_under_way -= 1
            if life == state.life:
                self._confirm(state, total)
        return step.tokens, now_s - step.began_s

    def lose_all(self) -> None:
        """Take all steps under way to have failed."""
        self.confirmed.clear()
        while self._steps:
            self._lose(self._steps.popitem()[1])

    def _confirm(self, state: RequestState, total: int) -> None:
        # vLLM goes back where proposed tokens were rejected, and where another connector's load had failed.
        there: int = min(total, state.request.num_computed_tokens)
        state.life += there < total
        state.computed_tokens = there
        certain = min(there, state.request.num_tokens - 1)
        if certain // self._block_tokens < total // self._block_tokens:
            state.noted_blocks = certain // self._block_tokens  # A later step completes the others.
        self.confirmed.append(state)

    def _lose(self, step: _Step) -> None:
        for state, _, life in step.writes:
            state.steps_under_way -= 1
            if life == state.life:
                state.may_store = False


_ONE_QUEUE: Final = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit()) < (0, 31)
"""Whether vLLM keeps requests that hold blocks in one queue with those that wait for some."""


class Parked:
    """Device blocks of requests that load, or have loaded and were not scheduled since.

    Args:
        room_blocks: All that the engine has for requests.
    """

    def __init__(self, room_blocks: int) -> None:
        self._room_blocks = room_blocks
        self._blocks: dict[str, int] = {}
        self.blocks = 0
        """Of all."""
        self.in_need: set[str] = set()
        """Requests that wait until enough of these are free again, see `stop_the_queue`."""

    def __repr__(self) -> str:
        return f"<Parked {self.blocks} blocks of {len(self._blocks)} requests>"

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, request: str, blocks: int) -> None:
        """Note that a request holds so many blocks."""
        self.remove(request)
        self._blocks[request] = blocks
        self.blocks += blocks

    def remove(self, request: str) -> None:
        """Note that a request runs."""
        self.blocks -= self._blocks.pop(request, 0)

    def forget(self, request: str) -> None:
        """Note that a request is gone."""
        self.remove(request)
        self.in_need.discard(request)

    def stop_the_queue(self, request: str, whole_blocks: int) -> bool:
        """Return True for a request whose whole prompt finds room only when parked requests give theirs back.

        Up to 0.30 vLLM looks at no request behind one that finds no room, and one that has loaded may stand
        there, for ever. So such a request waits elsewhere, and nobody else begins to load before it runs.
        """
        others = self.blocks - self._blocks.get(request, 0)
        stops = _ONE_QUEUE and others > 0 and others + whole_blocks > self._room_blocks
        (self.in_need.add if stops else self.in_need.discard)(request)
        return stops
