"""The leader's half of the connector, in vLLM's scheduler: decides what is loaded and stored.

When is a block stored? Its tokens must be final and its KV written. Both are certain when the outcome of the
step that computed it has come, so that is when it is planned:

    step k     schedules tokens up to n          (their KV will be written)
    outcome k  says that it has been computed    (a step that failed has none)
    step k+1   plans blocks below n // block     (worker gathers *before* anything of k+1 is computed)

Therefore vLLM may give the blocks away in step k+1, to a finished or preempted request's successor,
and nothing has to be held back or waited for. What a finished request has left waits a little, until its
blocks are given away at the latest: the next request often comes at once, and what storing costs the
interpreter would delay its first kernels; a moment later the accelerator has work to do.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Container
from typing import Any, Final

import msgspec

from kvbm_core import Coordinator, KvbmError, Match, Plan, Planner, StackConfig, TierCounts
from kvbm_metrics import MetricsServer, Readings, Tally
from kvbm_vllm._keys import RequestKeys, cacheable
from kvbm_vllm._membership import join_as_leader
from kvbm_vllm._requests import Parked, RequestState, StepsUnderWay
from kvbm_vllm._settings import block_tokens
from kvbm_vllm._startup import Beginning, RollCall
from kvbm_vllm._stats import KvbmStats, open_server
from kvbm_vllm._values import Handshake, Outcomes, StepPlan
from kvbm_vllm._weights import AdapterDigests

__all__ = ["SchedulerHalf"]

logger = logging.getLogger("kvbm_vllm")

_HOLD_S: Final = 0.01
"""How long the last blocks of a finished request wait to be stored. Who asks one by one is back by then."""


class SchedulerHalf:
    """Plans for one engine.

    Args:
        config: The stack.
        vllm_config: vLLM's configuration.
        kv_cache_config: How vLLM keeps the KV of this model.

    Raises:
        ConfigError: If the model's blocks cannot be stored.
    """

    def __init__(self, config: StackConfig, vllm_config: Any, kv_cache_config: Any) -> None:
        self._config = config
        self._vllm_config = vllm_config
        self._coordinator: Coordinator | None = None
        self._block_tokens = block_tokens(vllm_config, kv_cache_config)
        self._max_load_blocks = max(1, int(kv_cache_config.num_blocks * config.max_load_fraction))
        self._adapters = AdapterDigests()
        self._epoch: bytes | None = None
        self._planner: Planner | None = None
        self._tally: Tally | None = None
        self._ops = itertools.count(1)
        self._roll = RollCall(vllm_config.parallel_config)
        self._server: MetricsServer | None = None
        self._requests: dict[str, RequestState] = {}
        self._new: set[str] = set()
        """Requests that vLLM has not looked at yet."""
        self._cached: dict[str, int] = {}
        """Leading blocks that vLLM's own cache has of requests that it looks at."""
        self._parked = Parked(kv_cache_config.num_blocks - 1)  # vLLM keeps one for itself.
        self._running: set[str] = set()
        """Requests scheduled in the last step."""
        self._ended: list[RequestState] = []
        """Of requests that have finished, and whose last blocks were not offered."""
        self._new_blocks: list[int] = []
        """Device blocks given since the last step: to be written into from this step on, by whomever."""
        self._settled = True
        """Whether all that was offered since the last step was computed before the last that writes."""
        self._written_step = 0
        """The last step that writes over blocks."""
        self._heard = 0
        """The last step whose outcomes have come."""
        self._joins = False
        """Whether a step can wait for the load of its blocks, on every rank."""
        self._admits = False
        """Whether a request was given its first blocks since the last step."""
        self._steps = StepsUnderWay(self._block_tokens)

    def __repr__(self) -> str:
        return f"<SchedulerHalf {len(self._requests)} requests; {self._planner!r}>"

    @property
    def counts(self) -> dict[str, TierCounts]:
        """What has happened so far, by the tier's name."""
        return self._planner.counts if self._planner else {}

    def start(self, handshakes: list[Handshake]) -> None:
        """Take in what the workers say of their tiers, see `kvbm_vllm._startup`. None: it is yet to come.

        Raises:
            ConfigError: If one is missing or differs from the others; names rank and difference. Or
                if the port for metrics cannot be had.
            CoordinatorError: If a coordinator is configured, and they do not all come together there.
        """
        again = self._roll.complete
        try:
            if not handshakes or not self._roll.admit(handshakes):
                return
            if again:
                self._forget()
            self._coordinator = self._coordinator or join_as_leader(self._config, self._vllm_config)
            begun = Beginning.of(handshakes, self._config, self._block_tokens, self._ops)
            self._planner, self._tally, self._joins = begun.planner, begun.tally, begun.joins
            self._server = self._server or open_server(self._vllm_config)
        except KvbmError:
            if not again:
                self.close()
                raise
            # The engine has begun; it would stay paused for ever. It can serve without.
            logger.exception("nothing is loaded or stored until this engine is started again")
            self._planner = self._tally = None
            return
        logger.info("KvbmConnector is ready: %r", self._planner)

    def arrived(self, request: Any) -> None:
        """Note that a request waits to be scheduled."""
        self._new.add(request.request_id)

    def match(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Say how many tokens after `num_computed_tokens` can be loaded; None: ask again.

        And whether vLLM shall compute the rest in a later step, when it is told that they are there.
        Asked again in each step, it takes the same time for a prompt of any length.
        """
        self._new.discard(request.request_id)
        start, inside = divmod(num_computed_tokens, self._block_tokens)
        self._cached[request.request_id] = start
        whole_blocks = -(-request.num_tokens // self._block_tokens)
        if self._parked.stop_the_queue(request.request_id, whole_blocks):
            return None, False
        state = self._state(request)
        if state is None or self._planner is None:
            return 0, False
        state.is_counted, state.matched_step = True, self._steps.number
        # At least one token must be computed, so that there is something to sample from.
        stop = (request.num_tokens - 1) // self._block_tokens
        if not state.may_load or inside or stop <= start or request.skip_reading_prefix_cache:
            return 0, False
        now_s = time.monotonic()
        if state.is_held and self._waits_for_room(state, start, stop):
            return None, False
        state.is_held = False
        match = self._planner.find(state.keys, start, stop, now_s, state.match)
        state.match = match
        if match.lookups:  # A remote tier must be asked; the answer comes by its deadline.
            return None, False
        if match is not state.judged:
            self._judge(state, match, now_s)
        state.is_counted = False
        if not state.worth_blocks:
            return 0, False
        state.is_held = self._exceeds_room(state.worth_blocks)
        if state.is_held:
            return None, False
        state.in_step = state.from_host_pool and self._does_nothing_else()
        return state.worth_blocks * self._block_tokens, not state.in_step

    def allocated(self, request: Any, blocks: list[int], num_external_tokens: int) -> None:
        """Plan the load that was matched, into the blocks vLLM has given to the request.

        All blocks that it did not have before are taken to be written into from now on, also where nothing is
        loaded: another connector may load into them.
        """
        self._admits = True
        state = self._state(request)
        start = self._cached.pop(request.request_id, None)
        # vLLM calls twice for a request that loads, and looks for no prefix before the second time.
        had_blocks = start if start is not None else len(state.blocks) if state else 0
        self._new_blocks += blocks[had_blocks:]
        if state is None or self._planner is None:
            return
        self._count(state)
        # vLLM may have preempted it since the last step: what was computed for it is in the old blocks,
        # which are not overwritten before this step's plan is carried out.
        self._offer(state, time.monotonic())
        state.begin_anew(list(blocks))
        state.may_store |= start is not None
        if num_external_tokens:
            self._load(state, had_blocks, num_external_tokens // self._block_tokens)
        state.match = state.judged = None

    def step(self, output: Any) -> StepPlan:
        """Plan one step, given what vLLM has scheduled for it."""
        now_s, tokens = time.monotonic(), output.total_num_scheduled_tokens
        self._offer_confirmed(now_s)
        self._admits = False
        for name in output.preempted_req_ids or ():
            if state := self._requests.get(name):
                state.begin_anew(state.blocks)
        self._running.clear()
        self._steps.advance()
        writes, given = self._follow(output)
        written = dict.fromkeys([*given, *self._new_blocks])
        self._new_blocks = []
        self._offer_ended(now_s, written)
        plan = self._take_plan(written, given, now_s)
        if tokens:
            delayed = any(load.in_step for load in plan.loads)
            self._steps.begin(writes, 0 if delayed else tokens, now_s)
        return StepPlan(
            plan, self._steps.number, computes=tokens > 0, idle=not self._steps, heard=self._heard
        )

    def finished(self, request: Any) -> None:
        """Forget a request. What it has computed last is stored a little later."""
        name = request.request_id
        state = self._requests.pop(name, None)
        self._new.discard(name)
        self._cached.pop(name, None)
        self._parked.forget(name)
        self._running.discard(name)
        if self._tally:
            self._tally.finished(name)
        if state and self._is_to_offer(state):
            state.ended_s, state.ended_step = time.monotonic(), self._steps.number
            self._ended.append(state)

    def asks(self) -> bool:
        """Say whether a step must ask the workers for their handshakes."""
        return self._roll.ask()

    def outcomes(self, outcomes: Any) -> None:
        """Take in what the workers report."""
        if not isinstance(outcomes, Outcomes):
            return
        now_s = time.monotonic()
        self._heard = max(self._heard, outcomes.step)
        ended = self._steps.end(outcomes.step, now_s)
        self._ended = [state for state in self._ended if self._is_to_offer(state)]
        if self._planner is not None and self._tally is not None:
            self._planner.cost_model.computed(*ended, now_s)
            self._tally.reported(outcomes.reports, outcomes.copied)
            for op, failures in self._planner.report(outcomes.reports, now_s):
                self._tally.loaded(op, failures)
                if failures and op.request in self._requests:
                    self._requests[op.request].may_load = False
        if outcomes.handshakes:
            self.start(self._roll.gather(outcomes.handshakes))

    def lost(self, blocks: set[int]) -> None:
        """Take in which device blocks were not loaded, by whomever.

        vLLM goes back to the last good one. What was computed behind a block that another connector was to
        load in the step is worth nothing, and must not be stored.
        """
        for state in [*self._requests.values(), *self._ended] if blocks else ():
            computes = state.computed_tokens or state.steps_under_way
            if computes and not blocks.isdisjoint(state.blocks):
                state.may_store = False

    def busy(self) -> bool:
        """Say whether steps are needed although no request runs."""
        if self._planner is None:
            return self._roll.waits
        return bool(self._ended or self._planner.busy(time.monotonic()))

    def reset(self) -> bool:
        """Forget every block in every tier; what runs now is not stored.

        Nothing of before is loaded from here on, from tiers shared with other engines neither: the requests
        that are known go on under the keys that new ones get.

        Returns:
            False if a request loads right now, or has loaded and does not run yet, what was to be forgotten.
        """
        # The weights may have been changed in memory, and the namespace knows only their files: what
        # is stored from here on must not be found by an engine that starts from the files again.
        self._epoch = os.urandom(16)
        for state in self._requests.values():
            state.forget(self._keys(state.request))
        self._ended.clear()
        self._steps.confirmed.clear()
        if self._planner is None:
            return True
        self._planner.reset()
        return not self._planner.loading_blocks and not self._parked

    def take_stats(self) -> KvbmStats | None:
        """Give what was counted since the last call."""
        news: Readings = self._tally.take(time.monotonic()) if self._tally else {}
        if self._server:
            self._server.observe(news)
        return KvbmStats(data=dict(news)) if news else None

    def close(self) -> None:
        """Be listed no more, and stop serving metrics. May be called twice."""
        coordinator, self._coordinator = self._coordinator, None
        if coordinator:
            coordinator.close()
        server, self._server = self._server, None
        if server:
            server.close()

    def _forget(self) -> None:
        """Forget what is under way: the workers have opened their tiers anew, and know nothing of it."""
        logger.warning("the workers have opened their tiers anew: what was under way is forgotten")
        for state in self._requests.values():
            # What it has computed may have gone with the memory that it lay in.
            state.forget(state.keys)
        self._ended.clear()
        self._steps.lose_all()

    def _keys(self, request: Any) -> RequestKeys:
        return RequestKeys(request, self._block_tokens, self._adapters, self._epoch)

    def _state(self, request: Any) -> RequestState | None:
        state = self._requests.get(request.request_id)
        if state is None and cacheable(request):
            state = self._requests[request.request_id] = RequestState(request, self._keys(request))
        return state

    # Matching.

    def _exceeds_room(self, blocks: int) -> bool:
        """Say whether too many blocks would be parked with those of one more load.

        What does not run cannot be preempted: with all blocks parked nobody could go on.
        """
        assert self._planner is not None
        parked = max(self._planner.loading_blocks, self._parked.blocks)
        return bool(parked) and bool(self._parked.in_need or parked + blocks > self._max_load_blocks)

    def _waits_for_room(self, state: RequestState, start: int, stop: int) -> bool:
        """Return True for a request that still waits because too many blocks are parked.

        All that wait are asked for in each step. Whether the tiers still have all that was found is looked up
        when there is room; here only whether they have anything of it. If not, it need not wait.
        """
        match = state.match
        if match is None or match.stop != stop:
            return False
        ahead = start - match.start
        if not 0 <= ahead < state.worth_blocks or not self._exceeds_room(state.worth_blocks - ahead):
            return False
        assert self._planner is not None
        return self._planner.is_ready(state.keys[start], match.tiers[ahead])

    def _judge(self, state: RequestState, match: Match, now_s: float) -> None:
        """Choose how much of a finding is worth loading, once: vLLM asks until it has room for it."""
        assert self._planner is not None
        last, state.judged = state.judged, match
        if last is None or (last.start, last.tiers) != (match.start, match.tiers):
            state.worth_blocks = self._planner.cost_model.blocks_to_load(match.tiers, now_s)
        host_pool = self._planner.host_pool
        state.from_host_pool = all(tier == host_pool for tier in match.tiers[: state.worth_blocks])

    def _does_nothing_else(self) -> bool:
        """Say whether the step that computes the rest of a prompt can wait for a load, on the device.

        That saves the request two or three steps of the engine, and the engine prepares its computation
        while the bytes come. Whatever else is in the step waits, too: so only where there is nothing else.
        """
        assert self._planner is not None
        others = (
            self._new, self._admits, self._steps, self._running, self._parked, self._planner.loading_blocks
        )  # fmt: skip
        return self._joins and not any(others)

    def _count(self, state: RequestState) -> None:
        """Have metrics count a request's finding, once, however often it was asked for before."""
        match = state.match
        if match is None or state.is_counted:
            return
        assert self._planner is not None
        assert self._tally is not None
        self._tally.matched(match.stop - match.start, match.tiers)
        self._planner.decline(match.tiers[state.worth_blocks :])
        state.is_counted = True

    def _load(self, state: RequestState, start: int, count: int) -> None:
        """Plan to load blocks `start` to `start + count` of a request, exclusive; vLLM was promised them."""
        assert self._planner is not None
        keys = state.keys.slice(start, start + count)
        tiers = state.match.tiers[:count] if state.match else []
        if len(tiers) < count or state.matched_step != self._steps.number:
            # Since then blocks may have gone, or all may have been reset. Those that are not there fail.
            tiers = self._planner.match(keys, time.monotonic())
            tiers += [0] * (count - len(tiers))
            state.in_step = False
        name = state.request.request_id
        if not state.in_step:
            self._parked.add(name, len(state.blocks))
        blocks = state.blocks[start : start + count]
        self._planner.cost_model.tried(tiers, time.monotonic())
        self._planner.load(name, keys, blocks, tiers, in_step=state.in_step)

    # Steps.

    def _follow(self, output: Any) -> tuple[list[tuple[RequestState, int]], list[int]]:
        """Note which blocks and tokens this step gives to whom.

        Returns:
            Requests with all tokens computed once the step has ended, and blocks that they write into.
        """
        writes: list[tuple[RequestState, int]] = []
        given: list[int] = []
        told = [
            (new.req_id, new.num_computed_tokens, new.block_ids, True) for new in output.scheduled_new_reqs
        ]
        cached = output.scheduled_cached_reqs
        resumed = cached.resumed_req_ids
        told += [
            (name, computed, groups, name in resumed)
            for name, computed, groups in zip(
                cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
            )
        ]
        for name, computed, groups, replaces in told:
            blocks: list[int] = groups[0] if groups else []
            # Of a whole list the first hold what was computed before, or loaded.
            given += blocks[computed // self._block_tokens :] if replaces else blocks
            self._running.add(name)
            self._parked.remove(name)
            if state := self._requests.get(name):
                if replaces:
                    state.begin_anew([])
                state.blocks += blocks
                writes.append((state, computed + output.num_scheduled_tokens[name]))
        return writes, given

    def _take_plan(self, written: dict[int, None], given: list[int], now_s: float) -> Plan:
        if self._planner is None or self._tally is None:
            return Plan()
        plan = self._planner.take(now_s)
        # The loads name their own; but what is given to a step that computes is written after its load.
        loaded = {block for load in plan.loads for block in load.blocks}.difference(given)
        overwrites = [block for block in written if block not in loaded]
        # What neither this step computes into nor we load into is another connector's.
        computed = {*given}
        unordered = [block for block in overwrites if block not in computed]
        plan = msgspec.structs.replace(
            plan, overwrites=overwrites, unordered=unordered, settled=self._settled
        )
        self._tally.planned(plan)
        self._settled = True
        if overwrites or plan.loads:
            self._written_step = self._steps.number
        return plan

    # Storing.

    def _offer_confirmed(self, now_s: float) -> None:
        """Offer what became certain; of finished requests it waits, see `_offer_ended`."""
        confirmed, self._steps.confirmed = self._steps.confirmed, []
        for state in confirmed:
            if state.ended_s is None:
                self._offer(state, now_s)

    def _offer_ended(self, now_s: float, written: Container[int]) -> None:
        """Offer what has waited long enough, or may be written over in this step."""
        ended, self._ended = self._ended, []
        for state in ended:
            assert state.ended_s is not None
            waits = now_s - state.ended_s < _HOLD_S or state.steps_under_way
            if waits and not any(block in written for block in state.blocks[state.offered_blocks :]):
                if self._is_to_offer(state):
                    self._ended.append(state)
            else:
                self._offer(state, now_s, settled=state.ended_step < self._written_step)

    def _is_to_offer(self, state: RequestState) -> bool:
        """Return True if blocks of a request are to be offered, now or when steps have ended."""
        return state.may_store and bool(state.steps_under_way or self._left(state))

    def _left(self, state: RequestState) -> bool:
        return state.complete_blocks(self._block_tokens) > state.offered_blocks

    def _offer(self, state: RequestState, now_s: float, *, settled: bool = False) -> None:
        """Offer the blocks that are complete now and were not offered before."""
        if not self._left(state) or self._planner is None:
            return
        complete, offered = state.complete_blocks(self._block_tokens), state.offered_blocks
        self._settled &= settled
        keys = state.keys.slice(offered, complete)
        self._planner.store(keys, state.blocks[offered:complete], state.keys, now_s)
        state.offered_blocks = complete
