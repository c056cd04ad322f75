"""The leader's state of one tier, and of one operation that is under way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from kvbm_core.block import BlockKey
from kvbm_core.errors import ConfigError
from kvbm_core.leader.breaker import Breaker
from kvbm_core.leader.counts import TierCounts
from kvbm_core.leader.prefix_probe import PrefixProbe
from kvbm_core.leader.tier_index import TierIndex
from kvbm_core.plan import Load, Lookup, Store, TierStatus
from kvbm_core.tier import Reason

__all__ = ["Pending", "TierState", "same_stack"]


@dataclass(slots=True)
class TierState:
    """What the leader knows of one tier."""

    name: str
    index: TierIndex
    is_host_pool: bool
    shared: bool
    """Other engines use what lies here: what is forgotten here stays there."""
    direct: bool
    """It reads into device memory, so that its blocks do not pass the host pool."""
    probe: PrefixProbe | None
    """For a tier that cannot list its blocks."""
    breaker: Breaker = field(default_factory=Breaker)
    counts: TierCounts = field(default_factory=TierCounts)
    storing: int = 0
    """Blocks on their way in."""
    owed: OrderedDict[BlockKey, Container[BlockKey]] = field(default_factory=OrderedDict)
    """Blocks the host pool has and this tier shall get when fewer are on their way, each with its prefix."""


@dataclass(slots=True)
class Pending:
    """An operation whose reports have not all come."""

    op: Store | Load | Lookup
    waiting: dict[int, int]
    """Tier to ranks still to report."""
    failures: dict[int, dict[int, Reason]] = field(default_factory=dict)
    """Tier to position to reason, over all ranks."""
    took_s: float = 0.0
    """On the slowest rank so far."""
    doomed: bool = False
    """A reset came in between: what arrives is dropped again."""
    pinned: bool = True
    """The blocks of a load are pinned. False for blocks that had left their tier when it was planned."""


def same_stack(ranks: Sequence[Sequence[TierStatus]]) -> None:
    """Refuse workers whose stacks differ.

    Raises:
        ConfigError: Names the rank and both stacks.
    """
    first = [status.name for status in ranks[0]]
    for rank, statuses in enumerate(ranks):
        if (names := [status.name for status in statuses]) != first:
            raise ConfigError(
                f"rank {rank} has the tiers {names}, rank 0 has {first}; "
                "give every worker the same configuration"
            )
