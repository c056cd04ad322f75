"""The leader's half of the connector, in vLLM's scheduler: translates for a `kvbm_engine.Session`.

Before the workers' handshakes have come, and where an engine must serve without its tiers, `NoTiers` answers
in the session's place.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any, Final

import vllm

from kvbm_core import Coordinator, KvbmError, StackConfig, TierCounts
from kvbm_engine import Answers, Ledger, Parked, Recorder, Session, Step, refuse_all
from kvbm_metrics import MetricsServer
from kvbm_vllm._groups import engine_groups, tell_groups
from kvbm_vllm._keys import KeyMaker
from kvbm_vllm._membership import join_as_leader
from kvbm_vllm._models import release
from kvbm_vllm._overview import overview
from kvbm_vllm._replicas import replica_number
from kvbm_vllm._schedule import ScheduleReader
from kvbm_vllm._startup import NoTiers, RollCall, begin_session, open_recorder
from kvbm_vllm._stats import KvbmStats, open_server
from kvbm_vllm._tracing import open_tracer
from kvbm_vllm._values import Handshake, Outcomes
from kvbm_vllm._weights import AdapterDigests

__all__ = ["SchedulerHalf", "has_one_queue"]

logger = logging.getLogger("kvbm_vllm")

_TWO_QUEUES_SINCE: Final = (0, 31)


KEY: Final = "kvbm"
"""Of a request's `kv_transfer_params`, whose value are the hints, and of the answer's."""
_CAME_TOO_EARLY: Final = "the tiers were not open when the request came"
_ANSWERS_TOGETHER_SINCE: Final = (0, 32)


def hints_of(request: Any) -> object:
    """Give the hints of a request, whatever they are. None: it has none."""
    params = request.kv_transfer_params
    return params.get(KEY) if isinstance(params, dict) else None


def may_answer(request: Any, version: str) -> bool:
    """Return False where an answer of ours beside another connector's would end the engine.

    Up to 0.31 vLLM's MultiConnector may raise an error where two connectors answer a request.
    """
    return release(version) >= _ANSWERS_TOGETHER_SINCE or len(request.kv_transfer_params) == 1


def has_one_queue(version: str) -> bool:
    """Return True if vLLM keeps requests that hold blocks in one queue with those that wait for some."""
    return release(version) < _TWO_QUEUES_SINCE


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
        self._max_load_blocks = max(1, int(kv_cache_config.num_blocks * config.max_load_fraction))
        self._groups = engine_groups(vllm_config, kv_cache_config)
        tell_groups(kv_cache_config, self._groups)
        self._reader = ScheduleReader(self._groups)
        self._keys = KeyMaker(self._groups.groups, AdapterDigests())
        # vLLM keeps one block for itself.
        parked = Parked(kv_cache_config.num_blocks - 1, one_queue=has_one_queue(vllm.__version__))
        self._stage: Session | NoTiers = NoTiers(
            Ledger(self._keys, self._groups.groups, parked, self._groups.drafts)
        )
        self._ops = itertools.count(1)
        self._roll = RollCall(vllm_config.parallel_config)
        self._coordinator: Coordinator | None = None
        self._server: MetricsServer | None = None
        self._recorder: Recorder | None = None

    def __repr__(self) -> str:
        return f"<SchedulerHalf {self._stage!r}>"

    @property
    def session(self) -> Session:
        """The session with the workers that are there."""
        assert isinstance(self._stage, Session), "there is no session before the workers' handshakes"
        return self._stage

    @property
    def ledger(self) -> Ledger:
        """What is known of the engine."""
        return self._stage.ledger

    @property
    def counts(self) -> dict[str, TierCounts]:
        """What has happened so far, by the tier's name."""
        return self._stage.counts

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
                logger.warning("the workers have opened their tiers anew: what was under way is forgotten")
                self.ledger.lose_all()
            # First, so that nobody is listed with an address that cannot be had.
            self._server = self._server or open_server(self._vllm_config)
            url = self._server.url if self._server else ""
            self._coordinator = self._coordinator or join_as_leader(self._config, self._vllm_config, url)
            self._recorder = self._recorder or open_recorder(
                handshakes, self._config, self.ledger, replica_number(self._vllm_config.parallel_config)
            )
            self._stage = begin_session(
                handshakes, self._config, self.ledger, self._max_load_blocks, self._ops, self._recorder,
                open_tracer(self._vllm_config),
            )  # fmt: skip
        except KvbmError:
            if not again:
                self.close()
                raise
            # The engine has begun; it would stay paused for ever. It can serve without.
            logger.exception("nothing is loaded or stored until this engine is started again")
            self.ledger.parked.lose_loads()
            self._stage = NoTiers(self.ledger)
            return
        served = url or "with the engine's own"
        for line in overview(handshakes, self._config, self._groups.groups, served):
            logger.info("%s", line)

    def arrived(self, request: Any) -> None:
        """Note that a request waits to be scheduled."""
        self._stage.arrived(
            request,
            time.monotonic(),
            reads_cache=not request.skip_reading_prefix_cache,
            hints=hints_of(request),
            max_tokens=request.max_tokens,
        )

    def match(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Say how many tokens after `num_computed_tokens` can be loaded; None: ask again.

        And True if vLLM shall compute the rest in a later step, when it is told that they are there.
        """
        return self._stage.match(
            request,
            num_computed_tokens,
            time.monotonic(),
            reads_cache=not request.skip_reading_prefix_cache,
        )

    def allocated(self, request: Any, blocks: Sequence[list[int]], num_external_tokens: int) -> None:
        """Plan the load that was matched, into the blocks vLLM has given to the request in each KV group."""
        self._stage.allocated(request, self._reader.tables(blocks), num_external_tokens, time.monotonic())

    def step(self, output: Any) -> Step:
        """Plan one step, given what vLLM has scheduled for it."""
        return self._stage.step(self._reader.schedule(output), time.monotonic())

    def finished(self, request: Any) -> dict[str, Answers] | None:
        """Forget a request, and answer its hints. What it has computed last is stored a little later."""
        answers = self._stage.finished(request.request_id, time.monotonic())
        hints = hints_of(request)
        if hints is None or not may_answer(request, vllm.__version__):
            return None
        return {KEY: refuse_all(hints, _CAME_TOO_EARLY) if answers is None else answers}

    def asks(self) -> bool:
        """Return True if a step must ask the workers for their handshakes."""
        return self._roll.ask()

    def outcomes(self, outcomes: Any) -> None:
        """Take in what the workers report."""
        if not isinstance(outcomes, Outcomes):
            return
        self._stage.outcomes(outcomes.reports, outcomes.step, outcomes.copied, time.monotonic())
        if outcomes.handshakes:
            self.start(self._roll.gather(outcomes.handshakes))

    def lost(self, blocks: set[int]) -> None:
        """Take in which device blocks were not loaded, by whomever; vLLM goes back to the last good one."""
        self.ledger.lose(blocks)

    def busy(self) -> bool:
        """Return True if steps are needed although no request runs."""
        return self._roll.waits or self._stage.busy(time.monotonic())

    def reset(self) -> bool:
        """Forget every block in every tier; what runs now is not stored.

        Nothing of before is loaded from here on, from tiers shared with other engines neither: the requests
        that are known go on under the keys that new ones get.

        Returns:
            False if a request loads right now, or has loaded and does not run yet, what was to be forgotten.
        """
        self._keys.begin_epoch()
        return self._stage.reset()

    def take_stats(self) -> KvbmStats | None:
        """Give what was counted since the last call."""
        news = self._stage.take_readings(time.monotonic())
        if self._server:
            self._server.observe(news)
        return KvbmStats(data=dict(news)) if news else None

    def close(self) -> None:
        """Be listed no more, and stop serving metrics and recording. May be called twice."""
        coordinator, self._coordinator = self._coordinator, None
        if coordinator:
            coordinator.close()
        server, self._server = self._server, None
        if server:
            server.close()
        recorder, self._recorder = self._recorder, None
        if recorder:
            recorder.close()
