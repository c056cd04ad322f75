"""What the leader wants moved, and what came of it: values that travel between processes.

Planner ── Plan(drops, stores, loads, lookups, fills, probes, used) ──► TransferEngine
Planner ◄── Report(op, tier, failures) ── TransferEngine        (from every rank)
"""

from __future__ import annotations

import enum

import msgspec

from kvbm_core.block import BlockKey
from kvbm_core.tier import Capabilities, Reason

__all__ = [
    "Fill",
    "FillReason",
    "Load",
    "Lookup",
    "Plan",
    "Probe",
    "Report",
    "Store",
    "TierStatus",
    "WriteOrder",
]


class FillReason(enum.Enum):
    """Why blocks go from tier to tier. The words are also labels of a counter."""

    WRITE_BACK = "write_back"
    """Stored in the host pool, and due in a tier below."""
    DEMOTION = "demotion"
    """About to be evicted above."""
    PROMOTION = "promotion"
    """Loaded from below, and kept above."""
    PREFETCH = "prefetch"
    """Wanted soon."""


class Store(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks of one KV group to be written into tiers."""

    op: int
    """Number of the operation; the transfer engine reports once for each of `tiers`."""
    keys: list[BlockKey]
    """Of the blocks."""
    blocks: list[int]
    """Device blocks to gather, one a key."""
    tiers: list[int]
    """Positions in the stack, 0 the fastest."""
    group: int = 0
    """Number of the KV group."""


class Load(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Neighbouring blocks of one request to be read from one tier into device blocks."""

    op: int
    """As of a store."""
    request: str
    """Whose prefix it is; its loads are complete together."""
    tier: int
    """Position of the tier that has the blocks."""
    fill: int
    """The tier that keeps the blocks that are read: the host pool; -1 for none."""
    keys: list[BlockKey]
    """Of the blocks."""
    blocks: list[int]
    """Device blocks to fill, one a key."""
    in_step: bool = False
    """The engine uses the blocks in the very step that the load is planned for, and its device waits."""
    group: int = 0
    """As of a store."""
    head: BlockKey = b""
    """The key of the prompt's first block in the group. Empty: not known."""

    @property
    def tiers(self) -> list[int]:
        """The tiers it ends in: the one it reads, and the one that keeps the blocks."""
        return [self.tier] if self.fill < 0 else [self.tier, self.fill]


class Lookup(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks that a tier shall be asked for."""

    op: int
    tier: int
    keys: list[BlockKey]
    group: int = 0
    head: BlockKey = b""
    """As of a load."""

    @property
    def tiers(self) -> list[int]:
        """The tier that is asked, as other operations name theirs."""
        return [self.tier]


class Fill(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks of one KV group to be copied from tier to tier: to write back, demote or prefetch them."""

    op: int
    source: int
    """The tier that has them."""
    target: int
    """The tier that shall have them."""
    keys: list[BlockKey]
    host_pool: int
    """Position of the host pool, whose memory is read or filled in place; -1 for none."""
    group: int = 0
    reason: FillReason = FillReason.WRITE_BACK

    @property
    def tiers(self) -> list[int]:
        """The tiers it ends in: the target, and a source that has to be read."""
        return [self.target] if self.source == self.host_pool else [self.source, self.target]


class Probe(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tier that is left alone: each rank tries it now and then until it works, also while the engine idles.

    The rank reports once, when its part of the tier works. Nobody waits for that.
    """

    op: int
    tier: int
    first_pause_s: float
    """Until it is tried first; doubled after each try."""
    longest_pause_s: float

    @property
    def tiers(self) -> list[int]:
        """The tier that is tried, as other operations name theirs."""
        return [self.tier]


class WriteOrder(msgspec.Struct, frozen=True):
    """What the engine writes, and in which order: what a plan says of it, see there."""

    overwrites: list[int] = []
    unordered: list[int] = []
    blocks_final: bool = False


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """What to do next. Drops come before stores, stores before loads and fills."""

    drops: list[tuple[int, list[BlockKey]]] = []
    """Tier and the keys it shall forget."""
    stores: list[Store] = []
    """Device blocks to be written into tiers."""
    loads: list[Load] = []
    """Device blocks to be filled from tiers."""
    lookups: list[Lookup] = []
    """Questions to tiers."""
    overwrites: list[int] = []
    """Device blocks that the engine writes anew from this step on, beside those of the loads."""
    unordered: list[int] = []
    """Those of `overwrites` that may be written outside the engine's order of work: another connector loads
    into them as soon as the step begins. Nothing reads them any more when the plan has been submitted."""
    blocks_final: bool = False
    """True if the blocks of all stores were computed before the latest plan that overwrites any. They are
    then read beside what the engine has begun since, not after it."""
    probes: list[Probe] = []
    """Tiers that shall be tried."""
    fills: list[Fill] = []
    """Copies from tier to tier."""
    used: list[tuple[int, list[BlockKey]]] = []
    """Tiers that keep the order of use, and which keys of what each has or gets requests have had since the
    last plan: the one used last is the last."""

    def __bool__(self) -> bool:
        operations = self.stores or self.loads or self.lookups or self.fills or self.probes
        return bool(self.drops or operations or self.overwrites or self.used)


class Report(msgspec.Struct, frozen=True, array_like=True):
    """How one operation ended in one tier, on one rank."""

    op: int
    """Number of the operation."""
    tier: int
    """Position of the tier it ended in."""
    failures: dict[int, Reason] = {}
    """Position in the operation's keys to why it did not work; all others did."""
    seconds: float = 0.0
    """From the plan's arrival to the end."""
    full: bool = False
    """True if the tier itself had no room for a block: not staging, and not the device."""
    detail: str = ""
    """The tier's own words for a failure, see `Completion.detail`; those of the first that had any."""
    charges: list[int] = []
    """Of a store: for each key the bytes of the tier's capacity that its object takes on this rank, see
    `Capabilities.charge`. Empty: each as reserved, see `TierStatus.charges`."""


class TierStatus(msgspec.Struct, frozen=True):
    """What a worker says of one of its tiers when it has opened it."""

    name: str
    """What the configuration calls it."""
    capabilities: Capabilities
    """Of the tier behind its layers."""
    inventory: list[tuple[BlockKey, int]]
    """The objects found at open, oldest first: key, and the bytes of the capacity that each takes."""
    charges: tuple[int, ...] = (1,)
    """For each KV group the bytes of the capacity that an object takes at most on this rank."""
    block_bytes: tuple[int, ...] = (0,)
    """For each KV group the bytes of a block on this rank, for counters."""
