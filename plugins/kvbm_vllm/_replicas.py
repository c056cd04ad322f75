"""Replicas of one configuration, that vLLM starts for data parallelism: what each has of a tier.

    vllm serve --data-parallel-size 2        <path>/rank0        of replica 0
    (two ranks each)                         <path>/rank1
                                             <path>/rank2        of replica 1
                                             <path>/rank3

The replicas that one command starts on its host divide the capacity of each tier that is not shared, as ranks
do. Where several commands start them, each has its own capacity, and those after the first a folder of their
own, `<path>/dp<number>`: they may be on one host.

vLLM tells an engine its number. How many there are it tells the process that the user started, and not the
engine of a model without experts, which is to believe that it is alone. So it is noted where it is told, in
the configuration that goes to the engines.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from kvbm_core import ConfigError, Peers, Registry, StackConfig
from kvbm_core.config import TierEntry

__all__ = ["Replicas", "note_replicas", "replica_number", "replicas_of"]

logger = logging.getLogger("kvbm_vllm")

_NOTE: Final = "kvbm_replicas"
"""An attribute of vLLM's ParallelConfig."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """Those that one command starts on one host."""

    first: int = 0
    """Number of the first, among those of all commands."""
    count: int = 1
    total: int = 1
    """Of all commands."""

    def apart(self, config: StackConfig) -> StackConfig:
        """Give the stack with paths of its own, if another command has the first replica."""
        if not self.first:
            return config
        return msgspec.structs.replace(config, tiers=tuple(map(self._apart, config.tiers)))

    def tell(self, config: StackConfig, ranks: int) -> None:
        """Log which folders are whose, and which are nobody's, where there are several replicas or were.

        Args:
            config: The stack of this command.
            ranks: Of each replica.
        """
        if self.count > 1:
            logger.info(
                "replicas %d to %d divide the capacity of each tier that is not shared: in its directory "
                "rank0 to rank%d are of the first, and as many of each that follows",
                self.first, self.first + self.count - 1, ranks - 1,
            )  # fmt: skip
        for path in filter(None, map(_own_path, config.tiers)):
            if self.first:
                logger.info("replica 0 is started by another command: %s is of those started here", path)
                continue
            for folder in Path(path).expanduser().glob("dp*"):
                if (number := folder.name[2:]).isdecimal() and not self.count <= int(number) < self.total:
                    logger.warning(
                        "%s: a replica that another command started left it, and none is started so now; "
                        "what is in it is not used. Delete it, or start the replicas as before",
                        folder,
                    )

    def peers(self, parallel: Any, same_bytes: int) -> Peers:
        """Say who is beside a rank of this process's engine.

        Args:
            parallel: vLLM's ParallelConfig in the engine.
            same_bytes: Neighbouring ranks that hold the same KV.

        Raises:
            ConfigError: If the engine is none of these.
        """
        place = _number(parallel) - self.first
        if not 0 <= place < self.count:
            # Ray puts engines where it finds room; and elastic ones come later.
            raise ConfigError(
                f"data_parallel_size: replica {_number(parallel)} was not started by the command that starts "
                f"replicas {self.first} to {self.first + self.count - 1} on its host, so it has no share of "
                'the capacity. Write data_parallel_backend "mp", and on each host --data-parallel-size-local'
            )
        return Peers(same_bytes, place, self.count)

    def _apart(self, tier: TierEntry) -> TierEntry:
        if (path := _own_path(tier)) is None:
            return tier
        settings = {**tier.settings, "path": os.path.join(path, f"dp{self.first}")}
        return msgspec.structs.replace(tier, settings=settings)


def note_replicas(parallel: Any) -> None:
    """Keep what vLLM's ParallelConfig says of replicas, before an engine changes it. Once for each."""
    if parallel.data_parallel_size > 1 and _NOTE not in vars(parallel):
        local = parallel.data_parallel_size_local
        noted = Replicas(parallel.data_parallel_rank, max(1, local), parallel.data_parallel_size)
        vars(parallel)[_NOTE] = noted


def replicas_of(parallel: Any) -> Replicas:
    """Give the replicas that vLLM's ParallelConfig is for, in the engine or in the process that starts it.

    Raises:
        ConfigError: If nobody noted how many they are.
    """
    noted: Replicas | None = vars(parallel).get(_NOTE)
    if noted is None and (_number(parallel) or getattr(parallel, "data_parallel_size", 1) > 1):
        raise ConfigError(
            f"data_parallel_size: this is replica {_number(parallel)}, and it is not known how many divide "
            "the capacity, because the plug-in kvbm was not loaded where they were started: add kvbm to "
            "VLLM_PLUGINS"
        )
    return noted or Replicas()


def replica_number(parallel: Any) -> int | None:
    """Give an engine's number among several replicas of one configuration; None if it is alone."""
    return _number(parallel) if replicas_of(parallel).total > 1 else None


def _own_path(tier: TierEntry) -> str | None:
    """Give the directory of a tier that is not shared."""
    path = tier.settings.get("path")
    if not isinstance(path, str) or not path or Registry().backend(tier.backend).shared:
        return None
    return path


def _number(parallel: Any) -> int:
    """Give an engine's number among the replicas of all commands."""
    return int(getattr(parallel, "data_parallel_index", 0))
