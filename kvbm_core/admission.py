"""What an admission policy is: which blocks are written to a tier at all.

    - {backend: lmdb, capacity: 2TiB, path: /nvme/kvbm, admission: {name: write-budget, drive: 2TB}}

A drive wears with each byte that is written; an eviction policy only chooses what goes, and is asked only
where there is no room. An admission policy is asked for each block that its tier has not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvbm_core.block import BlockKey
from kvbm_core.policy import Origin, PolicyConfig, PolicyContext
from kvbm_core.tier import CONTRACT_VERSION

__all__ = ["Admission", "AdmissionPolicy"]


class AdmissionPolicy(ABC):
    """Chooses the blocks that are written to one tier. One thread calls it, and no call does I/O.

    What it remembers of keys has a bound.
    """

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:  # noqa: B027 - may be left out.
        """Note that a request has these blocks, whether the tier has them or not; each of its blocks once.

        Args:
            keys: Of consecutive blocks.
            origin: Where they come from.
        """

    @abstractmethod
    def admitted(self, keys: Sequence[BlockKey], nbytes: int, origin: Origin, now_s: float) -> int:
        """Count the leading blocks that shall be written: a prefix with a hole is worth its head alone.

        Args:
            keys: In the order of their prefix; the tier has none of them. Where blocks come from another tier
                they may be of several prompts.
            nbytes: The bytes of the capacity that each takes, at most.
            origin: Where they come from. What comes from another tier is as by default.
            now_s: The time, in seconds, on a clock that does not go back.
        """


@dataclass(frozen=True, slots=True)
class Admission:
    """What a package registers: how admission policies of one kind are configured and made."""

    name: str
    """As written after ``admission:``, and the name of the entry point."""
    config_type: type[PolicyConfig]
    """A subclass of `PolicyConfig`."""
    make: Callable[[Any, PolicyContext], AdmissionPolicy]
    """``make(config, context)``. Raises `ConfigError` for what it cannot work with."""
    contract_version: int = CONTRACT_VERSION
    """As of a `Backend`."""
