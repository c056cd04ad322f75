"""Host regions in use: the lender's own memory, or the staging pool's.

A region may be read by several transfers at once, and a tier that was given up on may still write
to it. It is given back, or forgotten by the lender, when the last user has let go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvbm_core.block import BlockKey
from kvbm_core.device import Stageable
from kvbm_core.tier import Region
from kvbm_core.worker.staging import Staging

__all__ = ["Hold", "Slot", "Slots"]


@dataclass(slots=True, eq=False)
class Slot:
    """A region and its users."""

    region: Region
    users: int = 1
    key: BlockKey | None = None
    """Of a block in the lender's memory."""
    when_free: list[Callable[[], object]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Hold:
    """Blocks in the lender's memory used together. There are thousands, so none has a slot of its own."""

    regions: dict[int, Region]
    """By position among the blocks asked for, of those that could be had."""
    keys: frozenset[BlockKey]
    """Of the same, so that none is forgotten meanwhile."""
    when_free: list[Callable[[], object]] = field(default_factory=list)


class Slots:
    """Finds regions and counts their users.

    Args:
        lender: The tier that is both a `Tier` and `Addressable`, if there is one.
        staging: The pool for blocks that pass through no lender.
    """

    def __init__(self, lender: Any, staging: Staging | None) -> None:
        self._lender = lender
        self._staging = staging
        self._lent: dict[BlockKey, Slot] = {}
        self._holds: set[Hold] = set()

    def __repr__(self) -> str:
        return f"<Slots {len(self._lent)} of the lender, {len(self._holds)} holds, {self._staging!r}>"

    def reserve(self, key: BlockKey) -> Slot | None:
        """Use memory of the lender that is about to be filled. None if it has none, or has the block."""
        if self._lender is None or key in self._lent:
            return None
        return self._use_lent(key, self._lender.reserve(key))

    def borrow(self, key: BlockKey) -> Slot | None:
        """Use the memory of a block that the lender has. None if it has it not."""
        if key in self._lent:
            return self.share(self._lent[key])
        return None if self._lender is None else self._use_lent(key, self._lender.lend(key))

    def hold(self, keys: Sequence[BlockKey], *, fill: bool = False) -> Hold:
        """Use the memory of those of some blocks that the lender has, until `let_go`.

        `fill`: of those it has not, as far as it has room; each is to be published or abandoned.
        """
        take = self._lender.reserve if fill else self._lender.lend
        regions = {at: region for at, key in enumerate(keys) if (region := take(key))}
        hold = Hold(regions, frozenset(keys[at] for at in regions))
        if regions:  # Else there is no copy that would end it.
            self._holds.add(hold)
        return hold

    def let_go(self, hold: Hold) -> None:
        """End a hold."""
        self._holds.remove(hold)
        for action in hold.when_free:
            action()

    def stage(self) -> Slot | None:
        """Use memory of the staging pool. None if all is in use."""
        region = self._staging.take() if self._staging else None
        if self._staging is None or region is None:
            return None
        return Slot(region, when_free=[partial(self._staging.give_back, region)])

    def stage_on(self, device: Stageable, nbytes: int) -> Slot | None:
        """Use memory of the device. None if all that it sets aside is in use."""
        region = device.stage(nbytes)
        return None if region is None else Slot(region, when_free=[partial(device.unstage, region)])

    def for_load(self, key: BlockKey, *, keep: bool) -> tuple[Slot | None, bool]:
        """Use memory for a block that a load brings, and say whether it is the lender's, who may keep it."""
        slot = self.reserve(key) if keep else None
        return (slot, True) if slot else (self.stage(), False)

    def share(self, slot: Slot) -> Slot:
        """Add a user."""
        slot.users += 1
        return slot

    def release(self, slot: Slot) -> None:
        """Take a user away."""
        slot.users -= 1
        if slot.users == 0:
            if slot.key is not None:
                del self._lent[slot.key]
            for action in slot.when_free:
                action()

    def publish(self, key: BlockKey) -> None:
        """Say that a reserved block is complete."""
        self._lender.publish(key)

    def abandon(self, user: Slot | Hold, key: BlockKey) -> None:
        """Have the lender take reserved memory back when it is free."""
        user.when_free.append(partial(self._lender.abandon, key))

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """Have the lender forget blocks, at once or when nobody uses them."""
        unused = set(keys).difference(self._lent)
        for key in set(keys) - unused:
            self._lent[key].when_free.append(partial(self.drop, [key]))
        for hold in self._holds:
            if held := unused & hold.keys:
                hold.when_free.append(partial(self.drop, list(held)))
                unused -= held
        self._lender.discard([key for key in keys if key in unused])

    def close(self) -> None:
        """Give the staging memory up."""
        if self._staging:
            self._staging.close()

    def _use_lent(self, key: BlockKey, region: Region | None) -> Slot | None:
        if region is None:
            return None
        slot = self._lent[key] = Slot(region, key=key)
        return slot
