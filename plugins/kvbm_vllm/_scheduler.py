"""The leader's half of the connector, in vLLM's scheduler: decides what is loaded and stored.

When is a block stored? Its tokens must be final and its KV written. Both are certain one step after
the step that computed it, so that is when it is planned:

    step k    schedules tokens up to n          (their KV will be written)
    step k+1  plans blocks below n // block     (worker gathers *before* anything of k+1 is computed)

Therefore vLLM may give the blocks away in step k+1, to a finished or preempted request's successor,
and nothing has to be held back or waited for. Where step k+1 computes nothing and gives nothing away, while
the result of step k is still awaited, it leaves the planning to the next. What a finished request has left
waits a little, until its blocks are given away at the latest: the next request often comes at once, and what
storing costs the interpreter would delay its first kernels; a moment later the accelerator has work to do.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from kvbm_core import Coordinator, KvbmError, Planner, StackConfig, TierCounts
from kvbm_metrics import MetricsServer, Readings, Tally
from kvbm_vllm._keys import RequestKeys, cacheable
from kvbm_vllm._membership import join_as_leader
from kvbm_vllm._settings import block_tokens
from kvbm_vllm._startup import Beginning, RollCall
from kvbm_vllm._stats import KvbmStats, open_server
from kvbm_vllm._values import Handshake, Outcomes, StepPlan
from kvbm_vllm._weights import AdapterDigests

__all__ = ["SchedulerHalf"]

logger = logging.getLogger("kvbm_vllm")

_MAX_STEPS: Final = 64
"""Under way at once; what is older was lost."""
_HOLD_S: Final = 0.01
"""How long the last blocks of a finished request wait to be stored. Who asks one by one is back by then."""


@dataclass(slots=True, eq=False)
class _Sequence:
    """What is known of one unfinished request."""

    request: Any
    keys: RequestKeys
    blocks: list[int] = field(default_factory=list)
    """Device blocks, in order of the tokens."""
    computed_tokens: int = 0
    """Tokens whose KV is written in `blocks` once the last scheduled step has run; 0 while it has none."""
    offered_blocks: int = 0
    """Blocks the planner was offered for storing."""
    match_start: int = 0
    asked_blocks: int = 0
    """Of the last match; 0 once it is counted."""
    found_tiers: list[int] = field(default_factory=list)
    """Of the last match, what is not worth loading included."""
    match_tiers: list[int] = field(default_factory=list)
    """The last match: first block, and for each block the tier it was found in."""
    in_step: bool = False
    """Whether the last match shall be loaded in the step that computes the rest."""
    judged: tuple[int, list[int]] | None = None
    """The match that was last weighed against computing, until blocks are given for what came of it."""
    may_load: bool = True
    """False after a load that failed: the request computes, so that it cannot fail in a circle."""
    may_store: bool = True
    """False after a reset: its KV may come from before."""
    ended_s: float = 0.0
    """When the request finished."""
    ended_step: int = 0
    """The last step that had been planned then."""


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
        self._sequences: dict[str, _Sequence] = {}
        self._new: set[str] = set()
        """Requests that vLLM has not looked at yet."""
        self._parked: dict[str, int] = {}
        """Device blocks of requests that load, or have loaded and were not scheduled since."""
        self._running: set[str] = set()
        """Requests scheduled in a step, whose blocks were not offered since."""
        self._ended: list[_Sequence] = []
        """Of requests that have finished, and whose last blocks were not offered."""
        self._given: list[int] = []
        """Device blocks that this step gives to requests to write into."""
        self._allotted: list[int] = []
        """Device blocks given since the last step to requests that load: to be written into now or later."""
        self._settled = True
        """Whether all that was offered since the last step was computed before the last that writes."""
        self._step = self._written_step = 0
        """The last step, and the last that writes over blocks."""
        self._heard = 0
        """The last step whose outcomes have come."""
        self._joins = False
        """Whether a step can wait for the load of its blocks, on every rank."""
        self._admits = False
        """Whether a request was given its first blocks since the last step."""
        self._computing: dict[int, tuple[int, float]] = {}
        """Of steps under way, by number: tokens, and when it was planned. No tokens where loads delay it."""

    def __repr__(self) -> str:
        return f"<SchedulerHalf {len(self._sequences)} requests; {self._planner!r}>"

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
        """
        self._new.discard(request.request_id)
        sequence, planner = self._sequence(request), self._planner
        if sequence is None or planner is None or not sequence.may_load:
            return 0, False
        sequence.asked_blocks = 0
        if num_computed_tokens % self._block_tokens or getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        start = num_computed_tokens // self._block_tokens
        # At least one token must be computed, so that there is something to sample from.
        stop = (request.num_tokens - 1) // self._block_tokens
        if stop <= start:
            return 0, False
        keys, now_s = sequence.keys.first(stop)[start:], time.monotonic()
        tiers = planner.match(keys, now_s)
        if len(tiers) < len(keys) and planner.lookup(keys[len(tiers) :], now_s):
            # A remote tier must be asked; the answer comes by its deadline.
            return None, False
        sequence.asked_blocks, sequence.found_tiers = len(keys), tiers
        # vLLM asks in each step until it has room, and a try of a slow tier is given once.
        if (start, tiers) != sequence.judged:
            sequence.judged = (start, tiers)
            sequence.match_start, sequence.match_tiers = start, tiers[: planner.guard.worth(tiers, now_s)]
        tiers = sequence.match_tiers
        if not tiers:
            return 0, False
        parked = max(planner.loading_blocks, sum(self._parked.values()))
        if parked and parked + len(tiers) > self._max_load_blocks:
            # What does not run cannot be preempted: with all blocks parked nobody could go on.
            return None, False
        sequence.in_step = self._fits_in_step(tiers)
        return len(tiers) * self._block_tokens, not sequence.in_step

    def allocated(self, request: Any, blocks: list[int], num_external_tokens: int) -> None:
        """Plan the load that was matched, into the blocks vLLM has given to the request."""
        self._admits = True
        sequence = self._sequence(request)
        if sequence is None or self._planner is None or self._tally is None:
            return
        if sequence.asked_blocks:
            self._tally.matched(sequence.asked_blocks, sequence.found_tiers)
            # Once for each request, however often it was asked for before there was room for it.
            self._planner.decline(sequence.found_tiers[len(sequence.match_tiers) :])
            sequence.asked_blocks = 0
        # vLLM may have preempted it since the last step: what that step computed is in the old blocks,
        # which are not overwritten before this step's plan is carried out.
        self._offer(sequence, time.monotonic())
        sequence.blocks, sequence.computed_tokens = list(blocks), 0
        sequence.judged = None
        if num_external_tokens:
            count = num_external_tokens // self._block_tokens
            start = sequence.match_start
            self._allotted += blocks[start:]
            if not sequence.in_step:
                self._parked[request.request_id] = len(blocks)
            self._planner.load(
                request.request_id,
                sequence.keys.first(start + count)[start:],
                blocks[start : start + count],
                sequence.match_tiers[:count],
                in_step=sequence.in_step,
            )

    def step(self, output: Any) -> StepPlan:
        """Plan one step, given what vLLM has scheduled for it."""
        now_s = time.monotonic()
        tokens = output.total_num_scheduled_tokens
        # vLLM takes the result of a step that computed only after one more step, and somebody waits for it:
        # if that step gives no blocks away, what there is to store can wait, too.
        if tokens or self._admits or output.preempted_req_ids or not self._computing:
            self._offer_running(now_s)
        self._admits = False
        for request_id in output.preempted_req_ids or ():
            if request_id in self._sequences:
                self._sequences[request_id].computed_tokens = 0
        self._given = []
        self._follow(output)
        self._offer_ended(now_s, {*self._given, *self._allotted})
        self._allotted = []
        if self._planner is None or self._tally is None:
            return StepPlan()
        plan = msgspec.structs.replace(
            self._planner.take(now_s), overwrites=self._given, settled=self._settled
        )
        self._tally.planned(plan)
        self._step += 1
        self._settled = True
        if plan.overwrites or plan.loads:
            self._written_step = self._step
        if tokens:
            delayed = any(load.in_step for load in plan.loads)
            self._computing[self._step] = (0 if delayed else tokens, now_s)
        self._computing.pop(self._step - _MAX_STEPS, None)
        idle = not self._computing
        return StepPlan(plan, self._step, computes=tokens > 0, idle=idle, heard=self._heard)

    def finished(self, request: Any) -> None:
        """Forget a request. What it has computed last is stored a little later."""
        sequence = self._sequences.pop(request.request_id, None)
        self._new.discard(request.request_id)
        self._parked.pop(request.request_id, None)
        self._running.discard(request.request_id)
        if self._tally:
            self._tally.finished(request.request_id)
        if sequence and self._complete(sequence) > sequence.offered_blocks:
            sequence.ended_s, sequence.ended_step = time.monotonic(), self._step
            self._ended.append(sequence)

    def asks(self) -> bool:
        """Say whether a step must ask the workers for their handshakes."""
        return self._roll.ask()

    def outcomes(self, outcomes: Any) -> None:
        """Take in what the workers report."""
        if not isinstance(outcomes, Outcomes):
            return
        if self._planner is not None and self._tally is not None:
            self._take_in(outcomes, self._planner, self._tally)
        if outcomes.handshakes:
            self.start(self._roll.gather(outcomes.handshakes))

    def lost(self, blocks: set[int]) -> None:
        """Take in which device blocks were not loaded, by whomever.

        vLLM goes back to the last good one. What was computed behind a block that another connector was to
        load in the step is worth nothing, and must not be stored.
        """
        for sequence in [*self._sequences.values(), *self._ended] if blocks else ():
            if sequence.computed_tokens and not blocks.isdisjoint(sequence.blocks):
                sequence.may_store = False

    def _take_in(self, outcomes: Outcomes, planner: Planner, tally: Tally) -> None:
        tally.reported(outcomes.reports, outcomes.copied)
        now_s = time.monotonic()
        self._heard = outcomes.step
        tokens, began_s = self._computing.pop(outcomes.step, (0, now_s))
        planner.guard.computed(tokens, now_s - began_s, now_s)
        for op, failures in planner.report(outcomes.reports, now_s):
            tally.loaded(op, failures)
            if failures and op.request in self._sequences:
                self._sequences[op.request].may_load = False

    def busy(self) -> bool:
        """Say whether steps are needed although no request runs."""
        if self._planner is None:
            return self._roll.waits
        return bool(self._ended or self._planner.busy(time.monotonic()))

    def reset(self) -> bool:
        """Forget every block in every tier; what runs now is not stored.

        Returns:
            False if a request is loading right now what was to be forgotten.
        """
        for sequence in self._sequences.values():
            sequence.may_store = False
        self._ended.clear()
        # The weights may have been changed in memory, and the namespace knows only their files: what
        # is stored from here on must not be found by an engine that starts from the files again.
        self._epoch = os.urandom(16)
        if self._planner is None:
            return True
        self._planner.reset()
        return self._planner.loading_blocks == 0

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
        for sequence in self._sequences.values():
            # What it has computed may have gone with the memory that it lay in.
            sequence.may_store = False
        self._ended.clear()
        self._computing.clear()

    def _fits_in_step(self, tiers: Sequence[int]) -> bool:
        """Say whether the step that computes the rest of a prompt can wait for a load, on the device.

        That saves the request two or three steps of the engine, and the engine prepares its computation
        while the bytes come. Whatever else is in the step waits, too: so only where there is nothing else.
        """
        if self._planner is None or not self._joins:
            return False
        others = (
            self._new, self._admits, self._computing, self._running, self._parked,
            self._planner.loading_blocks,
        )  # fmt: skip
        return not any(others) and all(tier == self._planner.lender for tier in tiers)

    def _sequence(self, request: Any) -> _Sequence | None:
        sequence = self._sequences.get(request.request_id)
        if sequence is None and cacheable(request):
            keys = RequestKeys(request, self._block_tokens, self._adapters, self._epoch)
            sequence = self._sequences[request.request_id] = _Sequence(request, keys)
        return sequence

    def _follow(self, output: Any) -> None:
        """Note which blocks and tokens this step gives to whom."""
        for new in output.scheduled_new_reqs:
            self._advance(output, new.req_id, new.num_computed_tokens, new.block_ids, replace=True)
        cached = output.scheduled_cached_reqs
        for at, request_id in enumerate(cached.req_ids):
            self._advance(
                output, request_id, cached.num_computed_tokens[at], cached.new_block_ids[at],
                replace=request_id in cached.resumed_req_ids,
            )  # fmt: skip

    def _advance(
        self, output: Any, request_id: str, computed_tokens: int, groups: Any, *, replace: bool
    ) -> None:
        blocks: list[int] = groups[0] if groups else []
        # Of a whole list the first hold what was computed before, or loaded.
        self._given += blocks[computed_tokens // self._block_tokens :] if replace else blocks
        self._running.add(request_id)
        self._parked.pop(request_id, None)
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if replace:
            sequence.blocks = []
        sequence.blocks += blocks
        sequence.computed_tokens = computed_tokens + output.num_scheduled_tokens[request_id]

    def _offer_running(self, now_s: float) -> None:
        for sequence in [self._sequences[name] for name in self._running if name in self._sequences]:
            self._offer(sequence, now_s)
        self._running.clear()

    def _offer_ended(self, now_s: float, written: set[int]) -> None:
        """Offer what has waited long enough, or may be written over in this step."""
        ended, self._ended = self._ended, []
        for sequence in ended:
            if now_s - sequence.ended_s < _HOLD_S and written.isdisjoint(sequence.blocks):
                self._ended.append(sequence)
            else:
                self._offer(sequence, now_s, settled=sequence.ended_step < self._written_step)

    def _offer(self, sequence: _Sequence, now_s: float, *, settled: bool = False) -> None:
        """Offer the blocks that are complete now and were not offered before."""
        complete, offered = self._complete(sequence), sequence.offered_blocks
        if complete <= offered or self._planner is None:
            return
        self._settled &= settled
        keys = sequence.keys.first(complete)
        self._planner.store(keys[offered:], sequence.blocks[offered:complete], keys[:offered], now_s)
        sequence.offered_blocks = complete

    def _complete(self, sequence: _Sequence) -> int:
        """Count the leading blocks that may be stored, offered or not."""
        if not sequence.may_store:
            return 0
        # The last token's KV is not computed yet, and tokens a drafting model proposed are not in
        # the request before they are accepted.
        tokens: int = min(sequence.computed_tokens, sequence.request.num_tokens - 1)
        return min(tokens // self._block_tokens, len(sequence.blocks))
