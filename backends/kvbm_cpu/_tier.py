"""Objects in host memory: one arena taken at start, cut into equal slots.

    arena (page aligned, every page touched at open)
    ┌────────────────┬────────────────┬──── ─ ─ ───┬────────────────┐
    │ slot 0         │ slot 1         │            │ slot n-1       │   slot = max_bytes, rounded
    └────────────────┴────────────────┴──── ─ ─ ───┴────────────────┘         up to a page

An object of any length up to `TierContext.max_bytes` takes one slot. It is known by its slot, and the slot's
region has its length: storing, lending and discarding are dictionary operations.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.config import size_text
from kvbm_core.errors import QueueFullError, TierError, TierOpenError, TransitionError
from kvbm_core.log_limit import TierLog
from kvbm_core.tier import (
    PAGE_BYTES,
    Addressable,
    Capabilities,
    Completion,
    Op,
    Outcome,
    Reason,
    Region,
    Tier,
    TierContext,
    Transfer,
)
from kvbm_cpu._config import CpuConfig
from kvbm_cpu._memory import in_turn, require_memory

__all__ = ["CpuTier"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_QUEUE_DEPTH: Final = 1024
_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_WRITE: Final = 23
"""Since Linux 5.14. The mmap module does not name it, and its madvise holds the interpreter lock."""
_MAX_TOUCH_THREADS: Final = 16
"""More did not make it faster: the kernel's clearing of pages has the memory busy."""


class CpuTier(Tier, Addressable):
    """Objects in page-locked (where there is an accelerator) host memory, lent without a copy."""

    def __init__(self, config: CpuConfig, context: TierContext) -> None:
        share_bytes = config.capacity // context.world_size
        self._name, log = context.name, TierLog("kvbm_cpu", context.name)
        self._max_bytes = context.max_bytes
        self._slot_bytes = _round_up(context.max_bytes, PAGE_BYTES)
        slots = share_bytes // self._slot_bytes
        _require_a_slot(config, context, self._slot_bytes, slots)
        with in_turn(log):  # Until its pages are there, other ranks would find this memory free.
            require_memory(slots * self._slot_bytes, "this rank's share is", "open", self._name)
            self._arena: mmap.mmap | None = _take(slots * self._slot_bytes, config, context)
            self._address = _address_of(self._arena)
            parts = _touch_all(self._address, slots, self._slot_bytes, config, context)
        self._unpin = _page_lock(parts, context, log)
        self._wake = context.wake
        self._slots = slots
        self._capabilities = Capabilities(
            slots * self._slot_bytes, _QUEUE_DEPTH, addressable=True, unit_bytes=self._slot_bytes
        )
        # A stack: the slot freed last is the one most likely still in the processor's cache.
        self._free = list(range(slots - 1, -1, -1))
        self._reserved: dict[BlockKey, int] = {}
        self._published: dict[BlockKey, int] = {}
        self._regions: dict[int, Region] = {}
        """By slot: where the object lies that it holds or has held last, and how long that is."""
        self._done: list[Completion] = []

    def __repr__(self) -> str:
        if self._arena is None:
            return "<CpuTier closed>"
        pinned = "pageable" if self._unpin is None else "pinned"
        return (
            f"<CpuTier {len(self._published)}/{self._slots} objects, "
            f"{len(self._reserved)} reserved, {pinned}>"
        )

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        """See `Tier.inventory`. Memory starts empty."""
        return ()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`. The copy is done here; a copy this size costs less than handing it on."""
        self._require_open("submit")
        if len(self._done) + len(transfers) > _QUEUE_DEPTH:
            raise QueueFullError(
                f"{len(transfers)} transfers do not fit beside {len(self._done)} that were not polled; "
                f"the queue takes {_QUEUE_DEPTH}",
                operation="submit",
                tier=self._name,
            )
        self._done += [self._run(transfer) for transfer in transfers]
        if transfers:
            self._wake()

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        done, self._done = self._done, []
        return done

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        for key in keys:
            slot = self._published.pop(key, None)
            if slot is not None:
                self._free.append(slot)

    def close(self) -> None:
        """See `Tier.close`.

        The memory goes with the last region lent from it, so a copy still on its way is safe.
        """
        if self._arena is None:
            return
        if self._unpin is not None:
            self._unpin()
        self._arena = self._unpin = None
        self._published.clear()
        self._reserved.clear()
        self._regions.clear()
        self._free.clear()

    def reserve(self, key: BlockKey, nbytes: int) -> Region | None:
        """See `Addressable.reserve`. None also for a length that no object has."""
        self._require_open("reserve")
        known = key in self._published or key in self._reserved
        if known or not self._free or not 0 < nbytes <= self._max_bytes:
            return None
        slot = self._reserved[key] = self._free.pop()
        return self._place(slot, nbytes)

    def publish(self, key: BlockKey) -> None:
        """See `Addressable.publish`.

        Raises:
            TransitionError: If the key is not reserved.
        """
        self._published[key] = self._take_reserved(key, "published")

    def abandon(self, key: BlockKey) -> None:
        """See `Addressable.abandon`.

        Raises:
            TransitionError: If the key is not reserved.
        """
        self._free.append(self._take_reserved(key, "abandoned"))

    def view(self, key: BlockKey) -> Region | None:
        """See `Addressable.view`."""
        slot = self._published.get(key)
        return None if slot is None else self._regions[slot]

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE:
            return self._store(transfer)
        slot = self._published.get(transfer.key)
        if slot is None:
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        source = self._regions[slot]
        if transfer.op is Op.LOAD:
            target = transfer.region
            assert target is not None
            if source.nbytes > target.nbytes:
                detail = f"the object has {source.nbytes} bytes, {target.nbytes} were asked for"
                return Completion(transfer.ticket, Outcome.FAILED, Reason.CORRUPT, detail)
            ctypes.memmove(target.address, source.address, source.nbytes)
        return Completion(transfer.ticket, Outcome.DONE, nbytes=source.nbytes)

    def _store(self, transfer: Transfer) -> Completion:
        key, source = transfer.key, transfer.region
        if (slot := self._published.get(key)) is not None:
            return Completion(transfer.ticket, Outcome.DONE, nbytes=self._regions[slot].nbytes)
        if key in self._reserved:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.BUSY)
        if not self._free:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.FULL)
        assert source is not None
        if not 0 < source.nbytes <= self._max_bytes:  # A longer one would overwrite the next slot.
            detail = f"the object has {source.nbytes} bytes; a slot takes 1 to {self._max_bytes}"
            return Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR, detail)
        slot = self._published[key] = self._free.pop()
        ctypes.memmove(self._place(slot, source.nbytes).address, source.address, source.nbytes)
        return Completion(transfer.ticket, Outcome.DONE, nbytes=source.nbytes)

    def _place(self, slot: int, nbytes: int) -> Region:
        """Give a slot's memory to an object of this length."""
        region = self._regions.get(slot)
        if region is None or region.nbytes != nbytes:
            region = Region(self._address + slot * self._slot_bytes, nbytes, owner=self._arena)
            self._regions[slot] = region
        return region

    def _take_reserved(self, key: BlockKey, verb: str) -> int:
        slot = self._reserved.pop(key, None)
        if slot is None:
            raise TransitionError(f"{key.hex()[:16]} is not reserved and cannot be {verb}", tier=self._name)
        return slot

    def _require_open(self, operation: str) -> None:
        if self._arena is None:
            raise TierError("the tier is closed", operation=operation, tier=self._name)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _require_a_slot(config: CpuConfig, context: TierContext, slot_bytes: int, slots: int) -> None:
    if slots < 1:
        raise TierOpenError(
            f"capacity: {size_text(config.capacity)} over {context.world_size} ranks hold no object of "
            f"{size_text(context.max_bytes, up=True)}; write at least "
            f"{size_text(slot_bytes * context.world_size, up=True)}",
            operation="open",
            tier=context.name,
        )


def _take(nbytes: int, config: CpuConfig, context: TierContext) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _refused(nbytes, error, config, context) from error


def _refused(nbytes: int, error: OSError, config: CpuConfig, context: TierContext) -> TierOpenError:
    return TierOpenError(
        f"capacity: {size_text(config.capacity)} over {context.world_size} ranks: the kernel refused "
        f"{size_text(nbytes, up=True)} of memory ({os.strerror(error.errno or 0)}); write a smaller capacity",
        operation="open",
        tier=context.name,
    )


def _address_of(arena: mmap.mmap) -> int:
    # The ctypes object is dropped at once: while it lives, the arena cannot be closed.
    return ctypes.addressof(ctypes.c_char.from_buffer(arena))


def _touch_all(
    address: int, slots: int, slot_bytes: int, config: CpuConfig, context: TierContext
) -> list[_Part]:
    """Make every page present now, so that no store and no DMA pays for it later.

    In parallel, each part in a thread. Parts are whole slots, because DMA must not cross from one locked
    range into another. The kernel takes a page from the memory next to the core that touches it first, so
    the cores near the accelerator do it, where they are known.

    Raises:
        TierOpenError: If the kernel has no memory.
    """
    # Huge pages are a wish: a kernel without them says EINVAL and small pages do as well.
    _libc.madvise(address, slots * slot_bytes, _MADV_HUGEPAGE)
    count = min(len(context.cpus or os.sched_getaffinity(0)), _MAX_TOUCH_THREADS, slots)
    step = -(-slots // count)
    parts = [
        _Part(address + first * slot_bytes, min(step, slots - first) * slot_bytes, context)
        for first in range(0, slots, step)
    ]
    _side_by_side([part.touch for part in parts])
    if errors := [part.error for part in parts if part.error]:
        raise _refused(slots * slot_bytes, errors[0], config, context) from errors[0]
    return parts


def _page_lock(parts: Sequence[_Part], context: TierContext, log: TierLog) -> Callable[[], None] | None:
    """Page-lock memory that is present. Returns what undoes that, or None where there is none."""
    if context.pin is None:
        return None
    _side_by_side([part.page_lock for part in parts])

    def unpin() -> None:
        for part in parts:
            if part.unpin is not None:
                part.unpin()
                part.unpin = None

    if all(part.unpin for part in parts):
        return unpin
    unpin()
    _warn(log, sum(part.nbytes for part in parts), next(part.not_pinned for part in parts if part.not_pinned))
    return None


def _side_by_side(calls: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@dataclass(slots=True, eq=False)
class _Part:
    """Neighbouring slots, and what became of them."""

    address: int
    nbytes: int
    context: TierContext
    unpin: Callable[[], None] | None = None
    error: OSError | None = None
    not_pinned: Exception | None = None

    def touch(self) -> None:
        """Make its pages present. In a thread of its own, which ends here."""
        try:
            self._go_near()
            _touch(self.address, self.nbytes)
        except OSError as error:
            self.error = error

    def page_lock(self) -> None:
        """Page-lock it. In a thread of its own, which ends here."""
        assert self.context.pin is not None
        try:
            self._go_near()
            self.unpin = self.context.pin(self.address, self.nbytes)
        except Exception as error:  # noqa: BLE001 - the accelerator's own error type is not ours to know
            self.not_pinned = error

    def _go_near(self) -> None:
        if self.context.cpus:
            os.sched_setaffinity(0, self.context.cpus)


def _touch(address: int, nbytes: int) -> None:
    # Whole pages: a part may begin within a huge page, which two threads then touch.
    while _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE) != 0:
        code = ctypes.get_errno()
        if code == errno.EINVAL:  # A kernel before 5.14: write to the pages, which are all zero anyway.
            ctypes.memset(address, 0, nbytes)
            return
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code))


def _warn(log: TierLog, nbytes: int, error: Exception) -> None:
    log.warning(
        "cannot page-lock %s of host memory (%s: %s); going on with pageable memory: copies to and "
        "from the accelerator will be several times slower. Raise the memlock limit (ulimit -l) or write a "
        "smaller capacity.",
        size_text(nbytes, up=True),
        type(error).__name__,
        error,
    )
