"""The leader's session with an engine whose ranks have opened their tiers: decides what is loaded and stored.

match ──► allocated ─┐
                     ├─► step: one plan ──► outcomes (of every rank)
finished ────────────┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvbm_core import Planner, Report, TierCounts
from kvbm_core.plan import WriteOrder
from kvbm_engine._hints import Answers, HintDesk
from kvbm_engine._ledger import Ledger, Writes
from kvbm_engine._matching import Matching
from kvbm_engine._prefetch import Prefetch
from kvbm_engine._requests import RequestState
from kvbm_engine._spans import Watchers
from kvbm_engine._sparse import SparseStores
from kvbm_engine._storing import Storing
from kvbm_engine._values import EngineRequest, GroupBlocks, Limits, Schedule, Step
from kvbm_metrics import Readings, Tally

__all__ = ["Session"]


class Session:
    """Plans for one engine. No clock: every call that needs the time is given it, in seconds.

    Args:
        ledger: What is known of the engine. It may be older than the session.
        planner: Knows where blocks are.
        tally: Counts for metrics.
        max_load_blocks: Device blocks of requests that load, at once.
        joins: True if a step can wait for the load of its blocks, on every rank.
        storing: Chooses what is stored. By default of windows those ahead of a prompt's end.
        watchers: Are told what becomes of requests. By default there are none.
        limits: What requests may have of the tiers by hints and ahead of their turn. By default nothing.
    """

    def __init__(
        self,
        ledger: Ledger,
        planner: Planner,
        tally: Tally,
        max_load_blocks: int,
        *,
        joins: bool,
        storing: Storing | None = None,
        watchers: Watchers | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.planner = planner
        self.ledger = ledger
        self.matching = Matching(ledger, planner, tally, max_load_blocks, joins=joins)
        self._storing = storing or Storing(ledger, planner, SparseStores(None))
        self._tally = tally
        self._recorder, self._spans = watchers or Watchers()
        if self._recorder:
            self._storing.on_offer = self._recorder.offered
        limits = limits or Limits()
        self._desk = HintDesk(ledger.groups, planner, tally, limits)
        self._prefetch = Prefetch(ledger, planner, limits)

    def __repr__(self) -> str:
        return f"<Session {len(self.ledger)} requests; {self.planner!r}>"

    @property
    def counts(self) -> dict[str, TierCounts]:
        """What has happened so far, by the tier's name."""
        return self.planner.counts

    def arrived(
        self,
        request: EngineRequest,
        now_s: float,
        *,
        reads_cache: bool = True,
        hints: object = None,
        max_tokens: int = 1,
    ) -> None:
        """Note that a request waits to be scheduled.

        Args:
            request: That has come.
            now_s: The time.
            reads_cache: False if the request must be computed whatever is found.
            hints: What its client asks for, as that came. None: nothing.
            max_tokens: That it may compute after its prompt.
        """
        name = request.request_id
        self.ledger.arrived(name)
        if self._recorder:
            self._recorder.arrived(name, now_s)
        if hints is not None:
            self._desk.begin(name, self.ledger.state(request), hints, max_tokens, now_s)
        if reads_cache and self._prefetch.is_used:
            self._prefetch.arrived(self.ledger.state(request), name, now_s)

    def match(
        self, request: EngineRequest, computed_tokens: int, now_s: float, *, reads_cache: bool
    ) -> tuple[int | None, bool]:
        """Say how many tokens after `computed_tokens` can be loaded; None: ask again.

        And True if the engine shall compute the rest in a later step, when it is told that they are there.
        Asked again in each step, it takes the same time for a prompt of any length.

        Args:
            request: That the engine looks at.
            computed_tokens: Leading tokens that the engine's own cache has.
            now_s: The time.
            reads_cache: False if the request must be computed whatever is found.
        """
        if self._spans:
            self._spans.asked(request.request_id, now_s)
        if self._recorder:
            self._recorder.turned(request.request_id, computed_tokens, now_s)
        if self._prefetch.delayed and self._prefetch.delays(request.request_id, now_s):
            self.ledger.look_at(request, computed_tokens)
            return None, False
        return self.matching.match(request, computed_tokens, now_s, reads_cache=reads_cache)

    def allocated(self, request: EngineRequest, blocks: GroupBlocks, load_tokens: int, now_s: float) -> None:
        """Plan the load that was matched, into the blocks the engine has given to the request."""
        self._prefetch.gone(request.request_id)
        if self._spans:
            self._spans.admitted(request, load_tokens, now_s)
        admission = self.ledger.admit(request, blocks)
        if (state := admission.state) is None:
            return
        self.matching.count(state)
        if self._recorder and admission.begins:
            self._recorder.looked(request.request_id, admission.had_tokens, request.num_tokens, now_s)
        # The engine may have preempted it since the last step: what was computed for it is in the old blocks,
        # which are not overwritten before this step's plan is carried out.
        self._storing.offer(state, now_s)
        if load_tokens:
            self.matching.load(state, admission, load_tokens, now_s)
            self._tally.promised(request.request_id, load_tokens)
        self.ledger.take_over(state, admission.tables)
        state.may_store |= admission.begins
        state.finding.clear()

    def step(self, schedule: Schedule, now_s: float) -> Step:
        """Plan one step, given what the engine has scheduled for it."""
        self._prefetch.step(now_s)
        self._storing.offer_confirmed(now_s)
        writes = self.ledger.follow(schedule)
        self._storing.offer_due(now_s, writes.written)
        plan = self.planner.take(now_s, self._order(writes))
        self._tally.planned(plan)
        if self._spans:
            self._spans.planned(plan)
        self._storing.planned(plan)
        if self._recorder:
            self._recorder.settle(self.ledger.owed)
        return self.ledger.begin(plan, writes, schedule.tokens, now_s)

    def finished(self, name: str, now_s: float) -> Answers | None:
        """Forget a request. What it has computed last is stored a little later.

        Returns:
            What became of its hints. None: it had none, or came before the session began.
        """
        answers = self._desk.end(name, now_s)
        self._prefetch.gone(name)
        self._tally.finished(name)
        if self._spans:
            self._spans.gone(name, now_s)
        state = self.ledger.find(name)
        self.ledger.finish(name, now_s)
        if self._recorder:
            self._record(name, state, now_s)
        return answers

    def outcomes(self, reports: Sequence[Report], step: int, copied: Mapping[str, int], now_s: float) -> None:
        """Take in what the ranks report of a step.

        Args:
            reports: Of all ranks.
            step: Its number.
            copied: Readings of the devices since the last time.
            now_s: The time.
        """
        self.planner.cost_model.computed(*self.ledger.end(step, now_s), now_s)
        finished = self.planner.report(reports, now_s)
        self._tally.ended(self.planner.took, copied)
        if self._spans:
            self._spans.ended(self.planner.took, now_s)
        for load, failures in finished:
            self._tally.loaded(load, failures)
            self._desk.loaded(load, len(failures))
            if self._spans:
                self._spans.loaded(load, failures, now_s)
            if not load.in_step:
                self.ledger.parked.loaded(load.request, len(load.keys))
            if failures and (state := self.ledger.find(load.request)):
                state.may_load = False

    def busy(self, now_s: float) -> bool:
        """Return True if steps are needed although no request runs."""
        return self.ledger.has_ended or self.planner.busy(now_s)

    def reset(self) -> bool:
        """Forget every block in every tier; what runs now is not stored.

        Returns:
            False if a request loads right now, or has loaded and does not run yet, what was to be forgotten.
        """
        self.ledger.reset()
        self.planner.reset()
        self._prefetch.reset()
        return not self.ledger.parked

    def take_readings(self, now_s: float) -> Readings:
        """Give what was counted since the last call."""
        return self._tally.take(now_s)

    def _record(self, name: str, state: RequestState | None, now_s: float) -> None:
        """Write down a request that has ended."""
        assert self._recorder is not None
        if state is None:
            self._recorder.forget(name)
            return
        tokens = state.request.num_tokens
        # The KV of the last token is never computed.
        digests = state.keys.prefixes(tokens - 1)
        self._recorder.ended(name, state.prompt_tokens, tokens, digests, now_s)
        self._recorder.settle(self.ledger.owed)

    def _order(self, writes: Writes) -> WriteOrder:
        """Say what the engine writes from this step on, and in which order."""
        # The loads name their own; but what is given to a step that computes is written after its load.
        loaded = self.matching.take_load_blocks().difference(writes.new_blocks)
        overwrites = [block for block in writes.written if block not in loaded]
        # What neither this step computes into nor we load into is another connector's.
        computed = {*writes.new_blocks}
        unordered = [block for block in overwrites if block not in computed]
        return WriteOrder(overwrites, unordered, self._storing.blocks_final)
