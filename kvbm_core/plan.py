"""What the leader wants moved, and what came of it: values that travel between processes.

Planner ── Plan(drops, stores, loads, lookups) ──► TransferEngine
Planner ◄── Report(op, tier, failures) ── TransferEngine        (from every rank)
"""

from __future__ import annotations

import msgspec

from kvbm_core.block import BlockKey
from kvbm_core.tier import Capabilities, Reason

__all__ = ["Load", "Lookup", "Plan", "Report", "Store", "TierStatus", "WriteOrder"]


class Store(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks to be written into tiers."""

    op: int
    """Number of the operation; the transfer engine reports once for each of `tiers`."""
    keys: list[BlockKey]
    blocks: list[int]
    """Device blocks to gather, one a key. Empty: the blocks are in the host pool."""
    tiers: list[int]
    """Positions in the stack, 0 the fastest."""


class Load(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Neighbouring blocks of one request to be read from one tier into device blocks."""

    op: int
    request: str
    """Whose prefix it is; its loads are complete together."""
    tier: int
    fill: int
    """The tier that keeps the blocks that are read: the host pool; -1 for none."""
    keys: list[BlockKey]
    blocks: list[int]
    in_step: bool = False
    """The engine uses the blocks in the very step that the load is planned for, and its device waits."""

    @property
    def tiers(self) -> list[int]:
        """The tiers it ends in: the one it reads, and the one that keeps the blocks."""
        return [self.tier] if self.fill < 0 else [self.tier, self.fill]


class Lookup(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks that a tier shall be asked for."""

    op: int
    tier: int
    keys: list[BlockKey]

    @property
    def tiers(self) -> list[int]:
        """The tier that is asked, as other operations name theirs."""
        return [self.tier]


class WriteOrder(msgspec.Struct, frozen=True):
    """What the engine writes, and in which order: what a plan says of it, see there."""

    overwrites: list[int] = []
    unordered: list[int] = []
    blocks_final: bool = False


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """What to do next. Drops come before stores, stores before loads."""

    drops: list[tuple[int, list[BlockKey]]] = []
    """Tier and the keys it shall forget."""
    stores: list[Store] = []
    loads: list[Load] = []
    lookups: list[Lookup] = []
    overwrites: list[int] = []
    """Device blocks that the engine writes anew from this step on, beside those of the loads."""
    unordered: list[int] = []
    """Those of `overwrites` that may be written outside the engine's order of work: another connector loads
    into them as soon as the step begins. Nothing reads them any more when the plan has been submitted."""
    blocks_final: bool = False
    """True if the blocks of all stores were computed before the latest plan that overwrites any. They are
    then read beside what the engine has begun since, not after it."""

    def __bool__(self) -> bool:
        return bool(self.drops or self.stores or self.loads or self.lookups or self.overwrites)


class Report(msgspec.Struct, frozen=True, array_like=True):
    """How one operation ended in one tier, on one rank."""

    op: int
    tier: int
    failures: dict[int, Reason] = {}
    """Position in the operation's keys to why it did not work; all others did."""
    seconds: float = 0.0
    """From the plan's arrival to the end."""
    full: bool = False
    """True if the tier itself had no room for a block: not staging, and not the device."""
    detail: str = ""
    """The tier's own words for a failure, see `Completion.detail`; those of the first that had any."""


class TierStatus(msgspec.Struct, frozen=True):
    """What a worker says of one of its tiers when it has opened it."""

    name: str
    capabilities: Capabilities
    inventory: list[BlockKey]
    block_bytes: int = 0
    """That a block takes in it on this rank, for messages. 0: not known."""
