"""What the mover has under way: jobs of a plan, the moves and copies of their blocks, each tier's traffic."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.device import Fence, Work
from kvbm_core.layers import DeadlineTier
from kvbm_core.plan import Load, Lookup, Report, Store
from kvbm_core.tier import Op, Reason, Transfer
from kvbm_core.worker.host_buffers import Hold, Slot

__all__ = ["Copy", "Failed", "Job", "Move", "Traffic", "is_done"]

logger = logging.getLogger("kvbm_core")

_FIRST_BYTES: Final = 64 << 20
"""Of a load from the lender: under way a millisecond on the link while the next are looked up."""
_FIRST_BLOCKS: Final = 128
"""Likewise, where they are small: they are looked up in half a millisecond."""
_TIMES_FIRST: Final = 4
"""Of the other parts."""
_LOAD_PAUSE_S: Final = 0.001
"""Not shorter: each look takes the interpreter from the engine, in the middle of its computation."""
_STORE_PAUSE_S: Final = 0.002
_OPS: Final = {Store: Op.STORE, Load: Op.LOAD, Lookup: Op.LOOKUP}


@dataclass(slots=True, eq=False)
class Job:
    """One operation of a plan."""

    op: Store | Load | Lookup
    began_s: float
    deadline_s: float
    left: dict[int, int]
    """Tier to blocks whose end there is not known yet."""
    fence: Fence = None
    """Where it came in the engine's order of work."""
    failures: dict[int, dict[int, Reason]] = field(default_factory=dict)

    @property
    def pause_s(self) -> float:
        """How long the device's copies for it need not be looked at: they wake nobody when they end."""
        return _LOAD_PAUSE_S if isinstance(self.op, Load) else _STORE_PAUSE_S

    def parts(self, block_bytes: int) -> list[range]:
        """Divide a load from the lender: the first blocks are on their way while the next are looked up."""
        count = len(self.op.keys)
        first = min(count, max(1, min(_FIRST_BLOCKS, _FIRST_BYTES // block_bytes)))
        step = _TIMES_FIRST * first
        return [range(first), *(range(at, min(count, at + step)) for at in range(first, count, step))]

    def failed(self, tier: int) -> Report:
        """Report that nothing of it has reached a tier."""
        return Report(self.op.op, tier, dict.fromkeys(range(len(self.op.keys)), Reason.ERROR), 0.0)

    def end(self, places: Sequence[int], tier: int, reason: Reason) -> Report | None:
        """Note how blocks ended in one tier; report the last of a tier."""
        if reason is not Reason.NONE:
            self.failures.setdefault(tier, {}).update(dict.fromkeys(places, reason))
        self.left[tier] -= len(places)
        if self.left[tier]:
            return None
        del self.left[tier]
        return Report(self.op.op, tier, self.failures.get(tier, {}), time.monotonic() - self.began_s)


@dataclass(slots=True, eq=False)
class Move:
    """One block of a job on its way to or from one tier."""

    job: Job
    at: int
    """Position in the operation's keys."""
    tier: int
    slot: Slot | None = None
    fills: bool = False
    """The slot is the lender's and shall be published."""

    @property
    def key(self) -> BlockKey:
        return self.job.op.keys[self.at]

    def transfer(self, ticket: int) -> Transfer:
        """Ask for it."""
        region = self.slot.region if self.slot else None
        return Transfer(ticket, _OPS[type(self.job.op)], self.key, region, self.job.deadline_s)


class Failed(Work):
    """A copy that could not be started."""

    def done(self) -> bool:
        raise RuntimeError("the copy could not be started")

    @property
    def given_up(self) -> frozenset[int]:
        return frozenset()


@dataclass(slots=True, eq=False)
class Copy:
    """What the device copies for a job at once: `moves`, a `hold` or `slots`."""

    job: Job
    places: Sequence[int]
    """Positions in the operation's keys."""
    moves: Sequence[Move] = ()
    """Of a load, what a tier has brought."""
    hold: Hold | None = None
    """To or from the lender's memory."""
    slots: Mapping[int, Slot] = field(default_factory=dict)
    """Of a store, by position, what goes to other tiers only."""
    work: Work = Failed()  # noqa: RUF009 - it holds nothing
    """So until it is started."""


@dataclass(slots=True, eq=False, repr=False)
class Traffic:
    """What is under way in one tier behind its layers."""

    tier: DeadlineTier
    loads: deque[Move] = field(default_factory=deque)
    """Not yet submitted: the tier's queue is full, or no region is free."""
    stores: deque[Move] = field(default_factory=deque)
    """Likewise. They wait for the loads, and leave half of the tier's queue to them."""
    open: dict[int, Move] = field(default_factory=dict)
    late: dict[int, Move] = field(default_factory=dict)
    """Given up, but the region is still the tier's."""
    doomed: set[BlockKey] = field(default_factory=set)
    """Keys of late moves, to be forgotten when the tier has let go: dropped, or stored too late."""

    def __repr__(self) -> str:
        return f"{len(self.open)} open {len(self.loads) + len(self.stores)} queued"

    def busy_with(self, key: BlockKey) -> bool:
        """Say whether a transfer of this block is under way."""
        moves = itertools.chain(self.open.values(), self.late.values(), self.loads, self.stores)
        return any(move.key == key for move in moves)

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """Have the tier forget blocks; those still in use, as soon as they are not."""
        late = {move.key for move in self.late.values()}
        self.doomed |= late.intersection(keys)
        self.tier.discard([key for key in keys if key not in late])

    def forget_doomed(self, key: BlockKey) -> None:
        """Have the tier forget a block that may be there and nobody knows, unless it is on its way again."""
        if key in self.doomed and not self.busy_with(key):
            self.doomed.remove(key)
            self.tier.discard([key])


def is_done(work: Work) -> bool | None:
    """True: copied. False: failed. None: not yet."""
    try:
        return True if work.done() else None
    except Exception:  # As in `Mover._start_copy`.
        if not isinstance(work, Failed):
            logger.exception("a device copy failed")
        return False
