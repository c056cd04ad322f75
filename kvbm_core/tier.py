"""The contract between the core and a backend: what a tier is, and the values that cross it.

    core ── submit(transfers) ──► tier ── its own threads, disks, networks
    core ◄── poll() completions ── tier ── wake() when there is something to poll

A tier holds objects by key: an object is one block of one KV group on one rank, and its length is its
own. A tier decides nothing: the objects to keep, and for how long, are planned elsewhere, and a tier is
told. Everything that takes time is submitted and polled, in batches.
"""

from __future__ import annotations

import ctypes
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.config import Settings

__all__ = [
    "CONTRACT_VERSION",
    "PAGE_BYTES",
    "Addressable",
    "Backend",
    "Capabilities",
    "Completion",
    "Op",
    "Outcome",
    "Reason",
    "Region",
    "Tier",
    "TierConfig",
    "TierContext",
    "Transfer",
    "host_pool_of",
]

CONTRACT_VERSION: Final = 2
"""Raised when a backend written for the old contract would no longer be correct."""

PAGE_BYTES: Final = 4096
"""Every region that crosses the contract starts on such a page and owns its pages whole."""


class Op(enum.Enum):
    """What a transfer asks of a tier."""

    STORE = "store"
    """Write the region's bytes under the key."""
    LOAD = "load"
    """Fill the region with the bytes under the key."""
    LOOKUP = "lookup"
    """Say whether the key is there: DONE or MISSING. No region. A lookup is submitted and polled
    like any other operation, because on a remote tier it takes as long."""


class Outcome(enum.Enum):
    """How a transfer ended."""

    DONE = "done"
    """It worked."""
    MISSING = "missing"
    """There is no such object. After a LOAD the region is as it was."""
    FAILED = "failed"
    """It did not work; `Completion.reason` says why. After a LOAD the region holds anything."""


class Reason(enum.Enum):
    """Why a transfer did not end DONE. The words are also the labels of the counters."""

    NONE = "none"
    """It is DONE."""
    MISSING = "missing"
    """There is no such object."""
    CORRUPT = "corrupt"
    """Bytes came back, but not those that were stored."""
    FULL = "full"
    """No room: no slot, no space on the disk, no staging memory."""
    BUSY = "busy"
    """Refused for now: the queue is full, or the key is being written or is reserved."""
    DEADLINE = "deadline"
    """It took too long."""
    ERROR = "error"
    """Anything else; the log has the message."""

    @property
    def is_fault(self) -> bool:
        """True if it speaks against the tier, not against one block."""
        return self in (Reason.CORRUPT, Reason.DEADLINE, Reason.ERROR)


@dataclass(frozen=True, slots=True)
class Region:
    """Contiguous memory that a transfer reads or writes.

    The region of a transfer starts at a multiple of `PAGE_BYTES`, and the memory behind `nbytes` up
    to the next multiple is nobody's: a tier may read and write it, as O_DIRECT must.
    """

    address: int
    """Of the first byte."""
    nbytes: int
    """Its length."""
    on_device: bool = False
    """False: host memory. True: memory of the accelerator, for tiers that are `device_direct`."""
    owner: Any = field(default=None, repr=False, compare=False)
    """Whatever must stay referenced for the address to stay valid."""

    def view(self) -> memoryview:
        """Give the bytes as a writable view. Only for host memory."""
        array_type = ctypes.c_ubyte * self.nbytes
        return memoryview(array_type.from_address(self.address)).cast("B")

    def part(self, offset: int, nbytes: int) -> Region:
        """Give `nbytes` of this region, starting at byte `offset`."""
        assert offset >= 0
        assert offset + nbytes <= self.nbytes
        return Region(self.address + offset, nbytes, self.on_device, self.owner)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One object's move to or from a tier."""

    ticket: int
    """Chosen by the core, unique among the transfers in flight in this tier."""
    op: Op
    """What is asked."""
    key: BlockKey
    """Of the object: 32 bytes."""
    region: Region | None = None
    """Of a STORE: the object, at most ``TierContext.max_bytes`` long. Of a LOAD: at least as long as the
    object; the tier fills its first bytes, see `Completion.nbytes`. The tier's own from submit to
    completion. None for LOOKUP."""
    deadline_s: float = float("inf")
    """On the clock of ``time.monotonic``: nobody waits longer. A tier may use it; the deadline
    layer enforces it."""
    head: BlockKey | None = None
    """The key of the prompt's first block, where the core knows it: a tier that several engines share can
    find with it who has a prefix, without a question for each block."""


@dataclass(frozen=True, slots=True)
class Completion:
    """How one transfer ended."""

    ticket: int
    """The transfer's."""
    outcome: Outcome
    """How it ended."""
    reason: Reason = Reason.NONE
    """NONE when DONE, MISSING when MISSING."""
    detail: str = ""
    """Why it FAILED, for people: the medium's own error and, if known, the remedy, in one short line
    without secrets. It reaches the log, its first 200 characters, when the tier is left alone."""
    nbytes: int = 0
    """Length of the object. Of a LOAD that is DONE: the first bytes of the region that were filled. Of a
    STORE that is DONE: the bytes that the tier keeps. 0: as long as the region."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a tier can do. Constant from open to close; the core obeys it, the suite selects by it."""

    capacity_bytes: int | None
    """Bytes of objects that it holds for this namespace, each counted as `charge` says; it forgets none by
    itself. None: no limit that the core must keep, and objects may be gone at any time."""
    queue_depth: int = 64
    """Transfers it has at once, at least 1. Each takes a place from `Tier.submit` until `Tier.poll`
    has returned its completion."""
    durable: bool = False
    """What it said was stored, it serves again after a ``kill -9`` of the process. (What was
    discarded shortly before the kill may be there again too; after `close` it is gone.)"""
    addressable: bool = False
    """It is `Addressable`: the memory its objects lie in can be used directly."""
    device_direct: bool = False
    """It takes regions in device memory."""
    shared: bool = False
    """Other engines store here too, so a key may be there that nobody here stored."""
    remote_lookup: bool = False
    """It cannot list its objects at open: `inventory` is empty, ask with LOOKUP. Such a tier keeps its
    own bound: `capacity_bytes` is None."""
    detail: str = ""
    """How it works on this machine, for the log: the engine it chose, the place."""
    unit_bytes: int = 1
    """An object takes a whole number of these, at least 1: the slot of a slab, the page of a file."""
    overhead_bytes: int = 0
    """Bytes that each object takes beside its own, on average: a row of an index, half a page."""
    read_only: bool = False
    """It takes no STORE and no `discard`: others fill it."""

    def charge(self, nbytes: int) -> int:
        """Count the bytes of the capacity that an object takes; 0 for an object of 0 bytes."""
        units = -(-(nbytes + self.overhead_bytes) // self.unit_bytes) if nbytes else 0
        return units * self.unit_bytes


@dataclass(frozen=True, slots=True)
class TierContext:
    """What a tier is told when it is opened."""

    namespace: Namespace
    """16 bytes. Objects of another namespace are not this tier's to serve."""
    max_bytes: int
    """Length of the longest object: the payload of a block, its seal, and the growth of the codecs."""
    rank: int = 0
    """Which worker this is. Each rank keeps its own objects of every block."""
    world_size: int = 1
    """Ranks that there are. A `capacity` in the configuration is for all of them together. Where several
    engines divide it, their ranks are numbered through. A `shared` tier is told of one engine's ranks."""
    wake: Callable[[], None] = lambda: None
    """Call it, from any thread and also within `submit`, when `poll` has something to return, and not
    while holding a lock that `poll` needs. Without it the core still polls, but later."""
    pin: Callable[[int, int], Callable[[], None]] | None = None
    """Page-lock ``(address, nbytes)`` for DMA; returns what undoes it. None without an accelerator."""
    cpus: frozenset[int] | None = None
    """Processor cores near the accelerator: memory that they touch first is near it. None: all alike."""
    name: str = ""
    """What the configuration calls this tier. Each line about it begins so, see `log_limit.TierLog`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the namespace is made of, for people; no secrets. A tier that is `durable` keeps them beside its
    objects, see `namespace_facts`. Empty: nobody said."""


def host_pool_of(stack: Sequence[Capabilities]) -> int:
    """Return the position of the host pool: the first tier whose memory is used directly. -1 for none.

    Args:
        stack: Of every tier behind its layers, fastest first. A layer that copies clears `addressable`.
    """
    return next((at for at, each in enumerate(stack) if each.addressable), -1)


class Tier(ABC):
    """A place where complete objects are kept.

    **Requires**: calls never overlap. No method waits for I/O; a tier may own threads, and speaks
    only through `poll`.
    """

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this tier can do. The same value from open to close."""

    @abstractmethod
    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        """List the objects found at open, key and length in bytes, oldest first where the tier knows.

        **Requires**: called before the first `submit`.

        Behaviour:
            - Keys of another namespace are not listed.
            - A tier that is not durable, or has `remote_lookup`, lists nothing.
        """

    @abstractmethod
    def submit(self, transfers: Sequence[Transfer]) -> None:
        """Start transfers.

        Behaviour:
            - Each ticket completes exactly once, in any order.
            - Storing a key that is present completes DONE and writes nothing.
            - Loading a key that is absent completes MISSING and leaves the region as it was.
            - A LOAD that is DONE has filled the first `Completion.nbytes` bytes of its region, and only
              whole objects: one that is longer than the region completes FAILED with reason CORRUPT.
            - A torn or short object completes FAILED or MISSING, never DONE.
            - A second transfer of a key that is being stored completes as if it came before or
              after, or FAILED with reason BUSY.
            - The region belongs to the tier from here to the completion.

        Raises:
            QueueFullError: If the batch does not fit the queue, or is longer than it; nothing of it
                was started.
            TierError: If the tier is closed, or cannot start anything; nothing of it was started.
        """

    @abstractmethod
    def poll(self) -> Sequence[Completion]:
        """Take the completions that have come since the last call. Empty if there are none."""

    @abstractmethod
    def discard(self, keys: Sequence[BlockKey]) -> None:
        """Forget objects. A key that is absent is ignored.

        Behaviour:
            - A transfer submitted later does not see the object.
            - The room is free again for a STORE submitted later.
            - Never called for a key that has a transfer in flight.
            - Of a `shared` tier the core asks it only for objects that turned out to be corrupt.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish or fail what is in flight, then let go of everything. May be called twice.

        Behaviour:
            - `poll` afterwards returns what was in flight.
        """


class Addressable(ABC):
    """What a tier adds when the memory its objects lie in can be used directly, so that no copy is needed.

    Each region is as long as its object and owns its pages whole, see `Region`. All four return at once.
    """

    @abstractmethod
    def reserve(self, key: BlockKey, nbytes: int) -> Region | None:
        """Set memory aside for an object about to be written; it is not loadable before `publish`.

        Args:
            key: Of the object.
            nbytes: Its length, at most ``TierContext.max_bytes``.

        Returns:
            None if there is no room, or the key is known already.
        """

    @abstractmethod
    def publish(self, key: BlockKey) -> None:
        """Say that a reserved object is complete.

        Raises:
            TransitionError: If the key is not reserved.
        """

    @abstractmethod
    def abandon(self, key: BlockKey) -> None:
        """Give a reserved object's memory back.

        Raises:
            TransitionError: If the key is not reserved.
        """

    @abstractmethod
    def view(self, key: BlockKey) -> Region | None:
        """Give the memory of a published object; valid until `discard`. None if it is absent."""


class TierConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every backend's configuration: one frozen type with at most ten keys."""


def whole_pages(blocks: int, block_bytes: int) -> int:
    """Give the bytes of so many blocks that take whole pages and nothing else."""
    return blocks * -(-block_bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Backend:
    """What a backend package registers: how tiers of its kind are configured, checked and opened."""

    name: str
    """As written after ``backend:`` in the configuration, and the name of the entry point."""
    config_type: type[TierConfig]
    """A subclass of `TierConfig`: the keys beside ``backend``, as one frozen type."""
    open: Callable[[Any, TierContext], Tier]
    """``open(config, context)``. Raises `TierOpenError`."""
    check: Callable[[Any], None] = lambda config: None
    """Find mistakes early, before an engine loads its model: a path that cannot be written, a
    directory in use. Changes nothing. Raises `TierOpenError`."""
    contract_version: int = CONTRACT_VERSION
    """The version of the contract that it was written for. Write the number, not the constant."""
    shared: bool = False
    """Its tiers are `shared`. Then of neighbouring ranks that hold the same bytes only the first writes,
    and all are told the same rank, so that they read what it has written."""
    share_bytes: Callable[[int, int], int] = whole_pages
    """``share_bytes(blocks, block_bytes)`` gives a rank's share of the `capacity` with which its tier holds
    at least so many blocks. The default counts each block in whole pages, and nothing beside them."""
    stored: Callable[[Any], Sequence[Any]] | None = None
    """``stored(config)`` lists what lies in the place, each a `kvbm_core.stored.Stored`, without opening it
    and also beside an engine that uses it. Changes nothing. None: that cannot be told."""
    contents: Callable[[Any], Sequence[Any]] | None = None
    """``contents(config)`` opens what lies in the place for reading, each part a
    `kvbm_core.contents.Contents`, also beside an engine that uses it. None: that cannot be done."""
    bare: Callable[[Any, int, int, int], Any] | None = None
    """``bare(config, nbytes, objects, depth)`` opens the medium with no tier around it, a
    `kvbm_core.bare.Bare`, for so many objects of so many bytes, `depth` of them on their way at once at most.
    None: `kvbm bench tier` compares with nothing."""
