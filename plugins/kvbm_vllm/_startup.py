"""How the leader comes to know its workers: by their handshakes, which come once, again, late or in parts.

vLLM brings those of all ranks before the first step, and 0.33 brings the same once more with each `wake_up`.
Beside other connectors, in its MultiConnector, it brings those of one connector only, to all. So a step's
plan asks for what the leader has not, and each worker answers with its outcomes; a worker that has opened its
tiers anew says so unasked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvbm_core import ConfigError, Planner, StackConfig
from kvbm_metrics import Tally
from kvbm_vllm._ranks import check_ranks
from kvbm_vllm._values import Handshake

__all__ = ["Beginning", "RollCall"]

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
        """Whether every rank was there at least once."""
        return bool(self._present)

    @property
    def waits(self) -> bool:
        """Whether steps are needed, because an answer is to be expected."""
        return not self._present and self._asked < _MAX_ASKS

    def ask(self) -> bool:
        """Say whether a step must ask the workers."""
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
            Whether they have opened their tiers since they said so last. If not, this says nothing new.

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


@dataclass(slots=True)
class Beginning:
    """What the leader begins with."""

    planner: Planner
    tally: Tally
    joins: bool
    """Whether a step can wait for the load of its blocks, on every rank."""

    @classmethod
    def of(
        cls, handshakes: Sequence[Handshake], config: StackConfig, block_tokens: int, ops: Iterator[int]
    ) -> Beginning:
        """Begin with what all ranks say of their tiers."""
        ranks = sorted(handshakes, key=lambda handshake: handshake.rank)
        status = [handshake.status for handshake in ranks]
        planner = Planner(
            status,
            max_store_blocks=config.max_store_blocks,
            block_tokens=block_tokens if config.only_faster else 0,
            ops=ops,
        )
        constants: dict[str, int] = {}
        for handshake in ranks:  # Of several ranks the slowest counts.
            for key, value in handshake.constants.items():
                constants[key] = min(value, constants.get(key, value))
        block_bytes = sum(handshake.block_bytes for handshake in ranks)
        tally = Tally(planner, status, block_tokens, block_bytes, constants)
        return cls(planner, tally, all(handshake.joins for handshake in ranks))
