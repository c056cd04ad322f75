"""What the leader knows of the engine's requests, steps and blocks, whether or not there are tiers."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvbm_core import Plan
from kvbm_core.groups import KvGroup, Rule, alignment, is_plain
from kvbm_engine._fences import Fences
from kvbm_engine._keys import BlockKeys, hash_tokens
from kvbm_engine._parked import Parked
from kvbm_engine._requests import RequestState, Tables
from kvbm_engine._steps import StepsUnderWay
from kvbm_engine._values import EngineRequest, GroupBlocks, Schedule, State, Step

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
    tables: Tables
    """The blocks, by the KV groups that are stored."""
    had_tokens: int
    """Leading tokens that were computed before."""
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
        groups: The engine's KV groups that are stored.
        parked: Counts blocks of requests that do not run.
        drafts: Positions of the groups that a drafting model writes into: it may write the last block anew
            that the engine has accepted.
    """

    def __init__(
        self,
        make_keys: Callable[[EngineRequest], BlockKeys | None],
        groups: Sequence[KvGroup],
        parked: Parked,
        drafts: Container[int] = (),
    ) -> None:
        self.groups = tuple(groups)
        self.is_plain = is_plain(groups)
        self.alignment = alignment(groups)
        """Tokens of which each boundary is a multiple."""
        self.sparse = [at for at, each in enumerate(groups) if each.coverage.rule is not Rule.ALL]
        """Positions of the groups of which a prefix does not need all blocks."""
        self.drafts = drafts
        self.parked = parked
        self.steps = StepsUnderWay(hash_tokens(groups))
        self.others = Others()
        self._make_keys = make_keys
        self._sizes = [group.block_tokens for group in groups]
        self._smallest, self._count = min(self._sizes), len(self._sizes)
        self._states = {at for at in self.sparse if groups[at].coverage.rule is Rule.STATE}
        self._fences = Fences()
        self._unfenced: list[tuple[RequestState, int, int]] = []
        """Requests that have got blocks since the last step which may be taken from them: the group, and the
        place of the first one."""
        self._requests: dict[str, RequestState] = {}
        self._cached_tokens: dict[str, int] = {}
        """Leading tokens that the engine's own cache has of requests that it looks at."""
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

    @property
    def is_idle(self) -> bool:
        """True if no request has blocks that it may give back: none runs, and none has them and waits."""
        return not (self.others.running or self.others.admits or self.steps or self.parked)

    @property
    def owed(self) -> set[str]:
        """Names of the requests that have finished, and whose last blocks were not offered."""
        return {state.request.request_id for state in self._ended}

    def state(self, request: EngineRequest) -> RequestState | None:
        """Give what is known of a request, from now on."""
        state = self._requests.get(request.request_id)
        if state is None and (keys := self._make_keys(request)) is not None:
            count = len(self.groups)
            state = RequestState(request, keys, [[] for _ in range(count)], [0] * count, request.num_tokens)
            self._requests[request.request_id] = state
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
        name = request.request_id
        self.others.unseen.discard(name)
        self._cached_tokens[name] = computed_tokens
        # At most: of a window not all are held at once.
        most_blocks = -(-request.num_tokens // self._smallest) * self._count
        return self.parked.stop_the_queue(name, most_blocks)

    def admit(self, request: EngineRequest, blocks: GroupBlocks) -> Admission:
        """Note which blocks the engine has given to a request.

        All that it did not have before count as written into from now on, also where nothing is loaded:
        another connector may load into them.
        """
        self.others.admits = True
        state = self.state(request)
        cached = self._cached_tokens.pop(request.request_id, None)
        had: list[int] = []
        # The engine calls twice for a request that loads, and looks for no prefix before the second time.
        if cached is not None:
            had = self._whole_blocks(cached)
        elif state:
            # Tables of states are not kept: what is new there comes with the step that computes.
            kept = zip(state.blocks, blocks, strict=False)
            had = [len(given if at in self._states else table) for at, (table, given) in enumerate(kept)]
        self._new_blocks += _behind(had, blocks)
        return Admission(state, self._tables(blocks), cached or 0, begins=cached is not None)

    def take_over(self, state: RequestState, tables: Tables) -> None:
        """Have a request hold other blocks, of which nothing is computed yet."""
        # A state is read where the engine hands it over, nowhere else.
        for at in self._states:
            tables[at] = []
        state.begin_anew(tables)
        self._unfenced += [(state, at, 0) for at in self.sparse]

    def finish(self, name: str, now_s: float) -> None:
        """Forget a request. What it has computed last is due a little later."""
        state = self._requests.pop(name, None)
        self.others.unseen.discard(name)
        self.others.running.discard(name)
        self._cached_tokens.pop(name, None)
        self.parked.forget(name)
        if state is None:
            return
        state.owes_end = bool(self.sparse)
        if state.is_to_offer(self.groups):
            state.ended_s, state.ended_step = now_s, self.steps.number
            self._ended.append(state)

    def lose(self, blocks: set[int]) -> None:
        """Take in which device blocks were not loaded, by whomever.

        The engine goes back to the last good one. What was computed behind a block that another connector was
        to load in the step is worth nothing, and must not be stored.
        """
        for state in [*self._requests.values(), *self._ended] if blocks else ():
            computes = state.computed_tokens or state.steps_under_way
            if computes and not all(map(blocks.isdisjoint, state.blocks)):
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
        self.steps.advance()
        writes, new_blocks = self._follow_requests(schedule)
        for name, states in schedule.states.items():
            if state := self._requests.get(name):
                self._hand_over(state, states)
        written = dict.fromkeys([*new_blocks, *self._new_blocks, *schedule.written])
        if self.sparse:
            written.pop(0, None)
            new_blocks = [block for block in new_blocks if block]
        self._new_blocks = []
        return Writes(writes, new_blocks, written)

    def begin(self, plan: Plan, writes: Writes, tokens: int, now_s: float) -> Step:
        """Note that a step begins, and say what every rank is told of it."""
        if tokens:
            delayed = any(load.in_step for load in plan.loads)
            self.steps.begin(writes.requests, 0 if delayed else tokens, now_s)
        # The plan reads what it stores before the step writes.
        self._fences.given(writes.written)
        unfenced, self._unfenced = self._unfenced, []
        for state, group, first in unfenced:
            self._fences.add(state, group, first)
        return Step(
            plan, self.steps.number, computes=tokens > 0, idle=not self.steps, acked_step=self._acked_step
        )

    def end(self, step: int, now_s: float) -> tuple[int, float]:
        """Take in a step's outcome; give the tokens it computed, and the seconds since it was planned."""
        self._acked_step = max(self._acked_step, step)
        computed = self.steps.end(step, now_s)
        self._ended = [state for state in self._ended if state.is_to_offer(self.groups)]
        return computed

    def _follow_requests(self, schedule: Schedule) -> tuple[list[tuple[RequestState, int]], list[int]]:
        """Note what each request of a step gets: the requests with their tokens, and the blocks given."""
        running, parked = self.others.running, self.parked
        running.clear()
        writes: list[tuple[RequestState, int]] = []
        new_blocks: list[int] = []
        for name, computed, tokens, blocks, replaces in schedule.requests:
            running.add(name)
            if parked:
                parked.remove(name)
            if blocks:
                # Of whole tables the first hold what was computed before, or loaded.
                new_blocks += _behind(self._whole_blocks(computed) if replaces else (), blocks)
            if state := self._requests.get(name):
                if replaces:
                    self.take_over(state, self._tables(blocks))
                elif blocks:
                    self._extend(state, blocks)
                writes.append((state, computed + tokens))
        return writes, new_blocks

    def _whole_blocks(self, tokens: int) -> list[int]:
        """Count the blocks that so many leading tokens fill, by group."""
        return [tokens // size for size in self._sizes]

    def _tables(self, blocks: GroupBlocks) -> Tables:
        """Copy the tables of the groups that are stored."""
        return [list(given) for given in blocks[: self._count]]

    def _extend(self, state: RequestState, blocks: GroupBlocks) -> None:
        """Append to a running request's tables."""
        for at, (table, more) in enumerate(zip(state.blocks, blocks, strict=False)):
            if not more or at in self._states:
                continue
            if at in self.sparse:
                self._unfenced.append((state, at, len(table)))
            table += more

    def _hand_over(self, state: RequestState, states: Sequence[State]) -> None:
        """Note the states that a step writes, each at the place of the block that ends with it."""
        for at, block, tokens in states:
            size, table = self._sizes[at], state.blocks[at]
            if tokens % size or not tokens:
                continue
            place = tokens // size - 1
            table += [0] * (place + 1 - len(table))
            table[place] = block
            self._unfenced.append((state, at, place))

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
            if waits and not any(block in written for block in self._unoffered(state)):
                if state.is_to_offer(self.groups):
                    self._ended.append(state)
            else:
                yield state

    def _unoffered(self, state: RequestState) -> Iterator[int]:
        """List the blocks of a finished request that may be stored yet."""
        for at, group in enumerate(self.groups):
            first = state.offered[at]
            if at in self.sparse:
                first = min(first, group.first_block(state.complete_tokens()))
            yield from state.blocks[at][first:]


def _behind(had: Sequence[int], blocks: GroupBlocks) -> list[int]:
    """List the blocks behind the first `had` of each group; where it says nothing of a group, all."""
    behind: list[int] = []
    for at, given in enumerate(blocks):
        behind += given[had[at] :] if at < len(had) else given
    return behind
