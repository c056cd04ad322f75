"""How the leader comes to know its workers: by their handshakes, which come once, again, late or in parts.

vLLM brings those of all ranks before the first step, and 0.33 brings the same once more with each `wake_up`.
Beside other connectors, in its MultiConnector, it brings those of one connector only, to all. So a step's
plan asks for what the leader has not, and each worker answers with its outcomes; a worker that has opened its
tiers anew says so unasked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvbm_core import ConfigError, Plan, Planner, Registry, Report, StackConfig, TierCounts, TierStatus
from kvbm_core.sharing import sharing_of
from kvbm_engine import (
    EngineRequest,
    GroupBlocks,
    Ledger,
    Limits,
    Recorder,
    Schedule,
    Session,
    Spans,
    Step,
    Storing,
    Watchers,
    sparse_stores,
)
from kvbm_metrics import Readings, Tally
from kvbm_vllm._ranks import check_ranks
from kvbm_vllm._values import Handshake

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

__all__ = ["NoTiers", "RollCall", "begin_session", "open_recorder"]

logger = logging.getLogger("kvbm_vllm")

_MAX_ASKS: Final = 64
"""Steps that an idle engine makes for an answer. It comes with the first or second."""


class RollCall:
    """Takes in handshakes, and tells workers that are new from those that only say it again.

    Args:
        parallel: vLLM's configuration of ranks.
    """

    def __init__(self, parallel: Any) -> None:
        self._parallel = parallel
        self._present: dict[int, str] = {}
        """Of the workers that the leader plans for: rank and incarnation."""
        self._arrived: dict[int, Handshake] = {}
        self._asked = 0

    def __repr__(self) -> str:
        return (
            f"<RollCall {len(self._present)} of {self._parallel.world_size} ranks, asked {self._asked} times>"
        )

    @property
    def complete(self) -> bool:
        """True if every rank was there at least once."""
        return bool(self._present)

    @property
    def waits(self) -> bool:
        """True if steps are needed, because an answer is to be expected."""
        return not self._present and self._asked < _MAX_ASKS

    def ask(self) -> bool:
        """Return True if a step must ask the workers."""
        self._asked += not self._present
        return not self._present

    def gather(self, handshakes: Sequence[Handshake]) -> list[Handshake]:
        """Take in what some of the ranks say.

        Returns:
            Those of all ranks, as soon as all are there that are not known. Until then nothing.
        """
        self._arrived |= {each.rank: each for each in handshakes if not self._knows(each)}
        if missing := sorted(set(range(self._parallel.world_size)) - self._arrived.keys()):
            if self._arrived:
                logger.info("handshakes of ranks %s have yet to come", missing)
            return []
        arrived, self._arrived = self._arrived, {}
        return [*arrived.values()]

    def admit(self, handshakes: Sequence[Handshake]) -> bool:
        """Take in what all ranks say.

        Returns:
            True if they have opened their tiers since they said so last. If not, this says nothing new.

        Raises:
            ConfigError: If a rank is missing or differs, or only some have opened their tiers anew.
        """
        check_ranks(handshakes, self._parallel.world_size)
        known = sorted(each.rank for each in handshakes if self._knows(each))
        anew = sorted({each.rank for each in handshakes}.difference(known))
        if not anew:
            return False
        self._present = {each.rank: each.incarnation for each in handshakes}
        if known:
            raise ConfigError(
                f"ranks {anew} have opened their tiers anew, and ranks {known} have not: what they have does "
                "not fit together. Start the engine again"
            )
        return True

    def _knows(self, handshake: Handshake) -> bool:
        return self._present.get(handshake.rank) == handshake.incarnation


class NoTiers:
    """Stands where a session will be, or was: finds nothing and plans nothing, and follows the engine.

    Args:
        ledger: What is known of the engine: a session may begin in the middle.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __repr__(self) -> str:
        return f"<NoTiers {len(self.ledger)} requests>"

    @property
    def counts(self) -> dict[str, TierCounts]:
        """Nothing."""
        return {}

    def arrived(self, request: EngineRequest, now_s: float, **asked: object) -> None:
        """Note that a request waits. Nothing is obeyed of what it asks for."""
        self.ledger.arrived(request.request_id)

    def match(
        self, request: EngineRequest, computed_tokens: int, now_s: float, *, reads_cache: bool
    ) -> tuple[int | None, bool]:
        """Find nothing, see `Session.match`."""
        return (None if self.ledger.look_at(request, computed_tokens) else 0), False

    def allocated(self, request: EngineRequest, blocks: GroupBlocks, load_tokens: int, now_s: float) -> None:
        """Note which blocks a request has got."""
        self.ledger.admit(request, blocks)

    def step(self, schedule: Schedule, now_s: float) -> Step:
        """Plan nothing. What is due to be stored is dropped."""
        self.ledger.take_confirmed()
        writes = self.ledger.follow(schedule)
        for _ in self.ledger.take_due(now_s, writes.written):
            pass
        return self.ledger.begin(Plan(), writes, schedule.tokens, now_s)

    def finished(self, name: str, now_s: float) -> None:
        """Forget a request. Its hints, if it has any, have no answer."""
        self.ledger.finish(name, now_s)

    def outcomes(self, reports: Sequence[Report], step: int, copied: Mapping[str, int], now_s: float) -> None:
        """Note that a step has ended."""
        self.ledger.end(step, now_s)

    def busy(self, now_s: float) -> bool:
        """Return False: nothing is under way."""
        return False

    def reset(self) -> bool:
        """Return True: there is nothing to be forgotten in any tier."""
        self.ledger.reset()
        return True

    def take_readings(self, now_s: float) -> Readings:
        """Give nothing."""
        return {}


def begin_session(
    handshakes: Sequence[Handshake],
    config: StackConfig,
    ledger: Ledger,
    max_load_blocks: int,
    ops: Iterator[int],
    recorder: Recorder | None = None,
    tracer: Tracer | None = None,
) -> Session:
    """Begin with what all ranks say of their tiers.

    Args:
        handshakes: One of each rank.
        config: The stack.
        ledger: What is known of the engine.
        max_load_blocks: Device blocks of requests that load, at once.
        ops: Numbers for operations, which go on where another session ended.
        recorder: Writes down what is asked for.
        tracer: Makes spans.
    """
    ranks = sorted(handshakes, key=lambda handshake: handshake.rank)
    status = [handshake.status for handshake in ranks]
    block_tokens = _block_tokens(ledger, status)
    planner = Planner(
        status,
        max_store_blocks=config.max_store_blocks,
        groups=ledger.groups,
        policies=Registry().policies(config),
        block_tokens=block_tokens if config.only_faster else 0,
        ops=ops,
        movements=[entry.movement for entry in config.tiers],
        sharing=sharing_of(config),
    )
    constants: dict[str, int] = {}
    for handshake in ranks:  # Of several ranks the slowest counts.
        for key, value in handshake.constants.items():
            constants[key] = min(value, constants.get(key, value))
    tally = Tally(planner, block_tokens if ledger.is_plain else 0, constants)
    joins = all(handshake.joins for handshake in ranks)
    spans = None if tracer is None else Spans(tracer, planner.tiers)
    storing = Storing(ledger, planner, sparse_stores(config, ledger.groups), _junction, spans)
    limits = Limits(config.keep_fraction, config.max_keep_s, config.prefetch_fraction, config.load_deadline_s)
    return Session(
        ledger,
        planner,
        tally,
        max_load_blocks,
        joins=joins,
        storing=storing,
        watchers=Watchers(recorder, spans),
        limits=limits,
    )


def open_recorder(
    handshakes: Sequence[Handshake], config: StackConfig, ledger: Ledger, replica: int | None
) -> Recorder | None:
    """Begin the log of hashes that the configuration asks for.

    Args:
        handshakes: One of each rank.
        config: The stack.
        ledger: What is known of the engine.
        replica: The engine's number, where several read the same configuration.

    Raises:
        ConfigError: If the file cannot be written.
    """
    if config.record is None:
        return None
    path = Path(config.record).expanduser()
    of_ranks = [handshake.status[0].block_bytes for handshake in handshakes]
    block_bytes = [sum(each) for each in zip(*of_ranks, strict=True)]
    if replica is not None:
        path = path.with_name(f"{path.name}.dp{replica}")
    return Recorder(path, ledger.groups, block_bytes, config.record_capacity)


def _block_tokens(ledger: Ledger, status: Sequence[Sequence[TierStatus]]) -> int:
    """Give the tokens of a block of the KV group whose blocks are the largest: the measure of loads."""
    sizes = [sum(rank[0].block_bytes[at] for rank in status) for at in range(len(ledger.groups))]
    return ledger.groups[sizes.index(max(sizes))].block_tokens


def _junction(request: Any) -> int:
    """Give the tokens after which others have left a request's prompt, as far as vLLM knows; 0 for none."""
    return getattr(request, "shared_prefix_boundary", None) or 0
