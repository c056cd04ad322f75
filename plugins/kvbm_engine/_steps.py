"""Which blocks are certain to be written: what a step has reported as computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvbm_engine._requests import RequestState

__all__ = ["StepsUnderWay"]


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

    Args:
        unit_tokens: Tokens of which the blocks of every KV group are a multiple.
    """

    max_steps: Final = 64
    """Under way at once; what is older was lost."""

    def __init__(self, unit_tokens: int) -> None:
        self._unit_tokens = unit_tokens
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
            complete = total // self._unit_tokens
            if complete > state.noted_units:
                state.noted_units = complete
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
        # Engines go back where proposed tokens were rejected, and where another connector's load had failed.
        there: int = min(total, state.request.num_computed_tokens)
        state.life += there < total
        state.computed_tokens = there
        certain = min(there, state.request.num_tokens - 1)
        if certain // self._unit_tokens < total // self._unit_tokens:
            state.noted_units = certain // self._unit_tokens  # A later step completes the others.
        self.confirmed.append(state)

    def _lose(self, step: _Step) -> None:
        for state, _, life in step.writes:
            state.steps_under_way -= 1
            if life == state.life:
                state.may_store = False
