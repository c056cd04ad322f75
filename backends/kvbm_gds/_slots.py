"""Which slot holds what. A slot is written only when the disk says that it holds nothing.

    free ── take ──► writing ── fill ──► ready ── forget ──► free, as soon as nobody reads it
                        │                            │
                        └─ give_up ──► free          └─ its entry cannot be cleared ──► stale ── mend ──► free

A disk that fails for a while leaves stale slots. They are cleared later, and lost to nobody until then.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterable
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.tier import TierContext
from kvbm_gds._layout import Entry
from kvbm_gds._slab import Slab

__all__ = ["Slots"]

_MEND_EVERY_S: Final = 1.0
"""A disk that failed is not asked more often whether it works again."""


class Slots:
    """The slots of a slab.

    Args:
        slab: Where entries are written.
        count: How many there are.
        context: Says which objects are this tier's: their namespace, and the longest.
        complain: Called with the error when an entry could not be written.
    """

    def __init__(
        self, slab: Slab, count: int, context: TierContext, complain: Callable[[OSError], None]
    ) -> None:
        self._slab = slab
        self._count = count
        self._context = context
        self._complain = complain
        self.ready: dict[BlockKey, int] = {}
        self._lengths = array("Q", bytes(8 * count))
        """Of the object in each slot that is ready, in bytes."""
        self._others: OrderedDict[int, None] = OrderedDict()
        """Slots of other namespaces, oldest first: kept until their room is needed."""
        self._free: deque[int] = deque()
        """Taken from the right. What was written lies there: its blocks on the disk exist."""
        self._reading: dict[int, int] = {}
        """Slot to transfers that read it."""
        self._doomed: set[int] = set()
        """Slots that are free as soon as nobody reads them."""
        self._stale: set[int] = set()
        """Slots whose entry is to be cleared before anything else."""
        self._next_mend_s = 0.0

    def take_stock(
        self, entries: Iterable[Entry], wanted: Container[BlockKey] | None = None
    ) -> list[tuple[BlockKey, int]]:
        """Begin with what was found on the disk. An object that fits no region is not this tier's.

        Args:
            entries: Oldest first.
            wanted: Keys that are still asked for; None: all of this namespace.

        Returns:
            The objects that are ready, oldest first: key and length in bytes.
        """
        found: dict[BlockKey, int] = {}
        self._others = OrderedDict()
        for entry in entries:
            ours = entry.namespace == self._context.namespace and 0 < entry.nbytes <= self._context.max_bytes
            if ours and entry.key not in found and (wanted is None or entry.key in wanted):
                found[entry.key] = entry.slot
                self._lengths[entry.slot] = entry.nbytes
            else:
                self._others[entry.slot] = None
        self.ready = found
        taken = {*found.values(), *self._others}
        # Neighbouring blocks get neighbouring slots.
        self._free = deque(slot for slot in reversed(range(self._count)) if slot not in taken)
        self._reading, self._doomed, self._stale = {}, set(), set()
        return [(key, self._lengths[slot]) for key, slot in found.items()]

    def nbytes(self, key: BlockKey) -> int:
        """Give the length of an object; 0 if it is not ready."""
        slot = self.ready.get(key)
        return 0 if slot is None else self._lengths[slot]

    def take(self) -> int | None:
        """Give a slot to be written; None if there is none, or its entry cannot be cleared."""
        if self._free:
            return self._free.pop()
        if not self._others:
            return None
        slot, _ = self._others.popitem(last=False)
        return slot if self._clear(slot) else None

    @property
    def full(self) -> bool:
        """Every slot holds an object that is asked for, or is read."""
        return not self._free and not self._others and not self._stale

    def fill(self, key: BlockKey, slot: int, sequence: int, nbytes: int) -> None:
        """Say that a slot holds a whole object of this length.

        Raises:
            OSError: If the disk does not take it. Then the slot holds nothing.
        """
        try:
            self._slab.fill(slot, self._context.namespace, key, sequence, nbytes)
        except OSError:
            # Half of the entry, or all of it, may be there.
            self._stale.add(slot)
            raise
        self.ready[key] = slot
        self._lengths[slot] = nbytes

    def give_up(self, slot: int) -> None:
        """Take back a slot that was not written. Others come first: the disk may have no room for it."""
        if slot not in self._stale:
            self._free.appendleft(slot)

    def forget(self, key: BlockKey) -> None:
        """Take back the slot of an object."""
        slot = self.ready.pop(key, None)
        if slot is None:
            return
        self._clear(slot)
        if self._reading.get(slot):
            self._doomed.add(slot)
        else:
            self._release(slot)

    def read(self, key: BlockKey) -> int:
        """Give the slot of an object, which is not written to until `end_read`."""
        slot = self.ready[key]
        self._reading[slot] = self._reading.get(slot, 0) + 1
        return slot

    def end_read(self, slot: int) -> None:
        """Say that one read of a slot is over."""
        self._reading[slot] -= 1
        if not self._reading[slot]:
            del self._reading[slot]
            if slot in self._doomed:
                self._doomed.remove(slot)
                self._release(slot)

    def mend(self, *, at_once: bool = False) -> None:
        """Clear what could not be cleared before. Asks the disk once in a while, or at once."""
        if not self._stale or (time.monotonic() < self._next_mend_s and not at_once):
            return
        for slot in list(self._stale):
            if not self._clear(slot):
                return
            if slot not in self._doomed:
                self._release(slot)

    def _release(self, slot: int) -> None:
        if slot not in self._stale:
            self._free.append(slot)

    def _clear(self, slot: int) -> bool:
        """Say on the disk that a slot holds nothing; if that fails the slot must not be written again."""
        try:
            self._slab.clear(slot)
        except OSError as error:
            self._stale.add(slot)
            self._next_mend_s = time.monotonic() + _MEND_EVERY_S
            self._complain(error)
            return False
        self._stale.discard(slot)
        return True
