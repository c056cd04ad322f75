"""What the leader knows of the engine's requests, steps and blocks, whether or not there are tiers."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Final

from kvbm_core import Plan
from kvbm_engine._keys import BlockKeys
from kvbm_engine._parked import Parked
from kvbm_engine._requests import RequestState
from kvbm_engine._steps import StepsUnderWay
from kvbm_engine._values import EngineRequest, Schedule, Step

__all__ = ["Admission", "Ledger", "Others", "Writes"]

_HOLD_S: Final = 0.01
"""How long the last blocks of a finished request wait to be stored. Who asks one by one is back by then."""


@dataclass(slots=True)
class Others:
    """Who would wait if a step waited for one request's load."""

    unseen: set[str] = field(default_factory=set)
    """Requests that the engine has not looked at yet."""
    running: set[str] = field(default_factory=set)
    """Requests scheduled in the last step."""
    admits: bool = False
    """True if a request was given its first blocks since the last step."""

    def __bool__(self) -> bool:
        return bool(self.unseen or self.running or self.admits)


@dataclass(slots=True)
class Admission:
    """Blocks that the engine has given to a request."""

    state: RequestState | None
    """None if the request's KV is not named by its tokens."""
    had_blocks: int
    """Leading blocks that hold what was computed before."""
    begins: bool
    """True if the engine has looked for a prefix before: these are not more blocks for what it has loaded."""


@dataclass(slots=True)
class Writes:
    """What one step writes."""

    requests: list[tuple[RequestState, int]]
    """Requests, each with all tokens computed once the step has ended."""
    new_blocks: list[int]
    """Device blocks that the step computes into, or computes into from now on."""
    written: dict[int, None]
    """These, and all others given since the last step: to be written into from this step on, by whomever."""


class Ledger:
    """Follows what an engine says of its requests.

    Args:
        make_keys: Makes a request's keys. None: the request's KV is not named by its tokens.
        block_tokens: Tokens a block.
        parked: Counts blocks of requests that do not run.
    """

    def __init__(
        self, make_keys: Callable[[EngineRequest], BlockKeys | None], block_tokens: int, parked: Parked
    ) -> None:
        self.block_tokens = block_tokens
        self.parked = parked
        self.steps = StepsUnderWay(block_tokens)
        self.others = Others()
        self._make_keys = make_keys
        self._requests: dict[str, RequestState] = {}
        self._cached_blocks: dict[str, int] = {}
        """Leading blocks that the engine's own cache has of requests that it looks at."""
        self._new_blocks: list[int] = []
        """Device blocks given since the last step."""
        self._ended: list[RequestState] = []
        """Of requests that have finished, and whose last blocks were not offered."""
        self._acked_step = 0
        """The last step whose outcomes have come."""

    def __repr__(self) -> str:
        return f"<Ledger {len(self._requests)} requests; {self.steps!r}; {self.parked!r}>"

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def has_ended(self) -> bool:
        """True if a finished request's last blocks were not offered."""
        return bool(self._ended)

    def state(self, request: EngineRequest) -> RequestState | None:
        """Give what is known of a request, from now on."""
        state = self._requests.get(request.request_id)
        if state is None and (keys := self._make_keys(request)) is not None:
            state = self._requests[request.request_id] = RequestState(request, keys)
        return state

    def find(self, name: str) -> RequestState | None:
        """Give what is known of a request by its name."""
        return self._requests.get(name)

    # Requests.

    def arrived(self, name: str) -> None:
        """Note that a request waits to be scheduled."""
        self.others.unseen.add(name)

    def look_at(self, request: EngineRequest, computed_tokens: int) -> bool:
        """Note what the engine's own cache has of a request that it looks at.

        Returns:
            True if the request must wait elsewhere than in the engine's queue, see `Parked`.
        """
        name, size = request.request_id, self.block_tokens
        self.others.unseen.discard(name)
        self._cached_blocks[name] = computed_tokens // size
        return self.parked.stop_the_queue(name, -(-request.num_tokens // size))

    def admit(self, request: EngineRequest, blocks: list[int]) -> Admission:
        """Note which blocks the engine has given to a request.

        All that it did not have before count as written into from now on, also where nothing is loaded:
        another connector may load into them.
        """
        self.others.admits = True
        state = self.state(request)
        start = self._cached_blocks.pop(request.request_id, None)
        # The engine calls twice for a request that loads, and looks for no prefix before the second time.
        had_blocks = start if start is not None else len(state.blocks) if state else 0
        self._new_blocks += blocks[had_blocks:]
        return Admission(state, had_blocks, begins=start is not None)

    def finish(self, name: str, now_s: float) -> None:
        """Forget a request. What it has computed last is due a little later."""
        state = self._requests.pop(name, None)
        self.others.unseen.discard(name)
        self.others.running.discard(name)
        self._cached_blocks.pop(name, None)
        self.parked.forget(name)
        if state and state.is_to_offer(self.block_tokens):
            state.ended_s, state.ended_step = now_s, self.steps.number
            self._ended.append(state)

    def lose(self, blocks: set[int]) -> None:
        """Take in which device blocks were not loaded, by whomever.

        The engine goes back to the last good one. What was computed behind a block that another connector was
        to load in the step is worth nothing, and must not be stored.
        """
        for state in [*self._requests.values(), *self._ended] if blocks else ():
            computes = state.computed_tokens or state.steps_under_way
            if computes and not blocks.isdisjoint(state.blocks):
                state.may_store = False

    def reset(self) -> None:
        """Have known requests go on under the keys that new ones get. What runs is not stored."""
        for state in self._requests.values():
            keys = self._make_keys(state.request)
            assert keys is not None, "a request that had keys has them always"
            state.forget(keys)
        self._ended.clear()
        self.steps.confirmed.clear()

    def lose_all(self) -> None:
        """Forget what is under way: the ranks know nothing of it."""
        for state in self._requests.values():
            # What it has computed may have gone with the memory that it lay in.
            state.forget(state.keys)
        self._ended.clear()
        self.steps.lose_all()
        self.parked.lose_loads()

    # Steps.

    def follow(self, schedule: Schedule) -> Writes:
        """Go on to the next step: note which blocks and tokens it gives to whom."""
        self.others.admits = False
        for name in schedule.preempted:
            if state := self._requests.get(name):
                state.begin_anew(state.blocks)
        running, parked, size = self.others.running, self.parked, self.block_tokens
        running.clear()
        self.steps.advance()
        writes: list[tuple[RequestState, int]] = []
        new_blocks: list[int] = []
        for name, computed, tokens, blocks, replaces in schedule.requests:
            # Of a whole list the first hold what was computed before, or loaded.
            new_blocks += blocks[computed // size :] if replaces else blocks
            running.add(name)
            if parked:
                parked.remove(name)
            if state := self._requests.get(name):
                if replaces:
                    state.begin_anew([])
                state.blocks += blocks
                writes.append((state, computed + tokens))
        written = dict.fromkeys([*new_blocks, *self._new_blocks])
        self._new_blocks = []
        return Writes(writes, new_blocks, written)

    def begin(self, plan: Plan, writes: Writes, tokens: int, now_s: float) -> Step:
        """Note that a step begins, and say what every rank is told of it."""
        if tokens:
            delayed = any(load.in_step for load in plan.loads)
            self.steps.begin(writes.requests, 0 if delayed else tokens, now_s)
        return Step(
            plan, self.steps.number, computes=tokens > 0, idle=not self.steps, acked_step=self._acked_step
        )

    def end(self, step: int, now_s: float) -> tuple[int, float]:
        """Take in a step's outcome; give the tokens it computed, and the seconds since it was planned."""
        self._acked_step = max(self._acked_step, step)
        computed = self.steps.end(step, now_s)
        self._ended = [state for state in self._ended if state.is_to_offer(self.block_tokens)]
        return computed

    # What is due to be stored.

    def take_confirmed(self) -> list[RequestState]:
        """Give the requests with blocks that became certain; of finished ones see `take_due`."""
        confirmed, self.steps.confirmed = self.steps.confirmed, []
        return [state for state in confirmed if state.ended_s is None]

    def take_due(self, now_s: float, written: Container[int]) -> Iterator[RequestState]:
        """Give the finished requests whose blocks have waited long enough, or may be overwritten now."""
        ended, self._ended = self._ended, []
        for state in ended:
            assert state.ended_s is not None
            waits = now_s - state.ended_s < _HOLD_S or state.steps_under_way
            if waits and not any(block in written for block in state.blocks[state.offered_blocks :]):
                if state.is_to_offer(self.block_tokens):
                    self._ended.append(state)
            else:
                yield state
