"""Blocks in host memory: one arena taken at start, cut into equal slots.

    arena (page aligned, every page touched at open)
    ┌────────────────┬────────────────┬──── ─ ─ ───┬────────────────┐
    │ slot 0         │ slot 1         │            │ slot n-1       │   slot = block_bytes, rounded
    └────────────────┴────────────────┴──── ─ ─ ───┴────────────────┘         up to a page

A block is known by its slot alone: storing, lending and discarding are dictionary operations.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.errors import QueueFullError, TierError, TierOpenError, TransitionError
from kvbm_core.tier import (
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
from kvbm_cpu._memory import require_memory

__all__ = ["CpuTier"]

_log = logging.getLogger("kvbm_cpu")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_PAGE_BYTES: Final = 4096
_QUEUE_DEPTH: Final = 1024
_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_WRITE: Final = 23
"""Since Linux 5.14. The mmap module does not name it, and its madvise holds the interpreter lock."""
_MAX_TOUCH_THREADS: Final = 16
"""More did not make it faster: the kernel's clearing of pages has the memory busy."""


class CpuTier(Tier, Addressable):
    """Blocks in page-locked (where there is an accelerator) host memory, lent without a copy."""

    def __init__(self, config: CpuConfig, context: TierContext) -> None:
        share_bytes = config.capacity // context.world_size
        self._block_bytes = context.block_bytes
        self._slot_bytes = _round_up(context.block_bytes, _PAGE_BYTES)
        slots = share_bytes // self._slot_bytes
        _check_room(config, context, self._slot_bytes, slots)
        self._arena: mmap.mmap | None = _take(slots * self._slot_bytes, config, context)
        self._address = _address_of(self._arena)
        self._unpin = _prepare(self._address, slots, self._slot_bytes, config, context)
        self._wake = context.wake
        self._capabilities = Capabilities(capacity_blocks=slots, queue_depth=_QUEUE_DEPTH, addressable=True)
        # A stack: the slot freed last is the one most likely still in the processor's cache.
        self._free = list(range(slots - 1, -1, -1))
        self._reserved: dict[BlockKey, int] = {}
        self._published: dict[BlockKey, int] = {}
        self._regions: dict[int, Region] = {}
        """By slot, as far as they were lent."""
        self._done: list[Completion] = []

    def __repr__(self) -> str:
        if self._arena is None:
            return "<CpuTier closed>"
        pinned = "pageable" if self._unpin is None else "pinned"
        return (
            f"<CpuTier {len(self._published)}/{self._capabilities.capacity_blocks} blocks, "
            f"{len(self._reserved)} reserved, {pinned}>"
        )

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[BlockKey]:
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
                tier="cpu",
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

    def reserve(self, key: BlockKey) -> Region | None:
        """See `Addressable.reserve`."""
        self._require_open("reserve")
        if key in self._published or key in self._reserved or not self._free:
            return None
        slot = self._reserved[key] = self._free.pop()
        return self._region(slot)

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
        return None if slot is None else self._region(slot)

    def _run(self, transfer: Transfer) -> Completion:
        if transfer.op is Op.STORE:
            return self._store(transfer)
        slot = self._published.get(transfer.key)
        if slot is None:
            return Completion(transfer.ticket, Outcome.MISSING, Reason.MISSING)
        if transfer.op is Op.LOAD:
            assert transfer.region is not None
            ctypes.memmove(transfer.region.address, self._slot_address(slot), self._block_bytes)
        return Completion(transfer.ticket, Outcome.DONE)

    def _store(self, transfer: Transfer) -> Completion:
        key, region = transfer.key, transfer.region
        if key in self._published:
            return Completion(transfer.ticket, Outcome.DONE)
        if key in self._reserved:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.BUSY)
        if not self._free:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.FULL)
        assert region is not None
        slot = self._free.pop()
        ctypes.memmove(self._slot_address(slot), region.address, self._block_bytes)
        self._published[key] = slot
        return Completion(transfer.ticket, Outcome.DONE)

    def _slot_address(self, slot: int) -> int:
        return self._address + slot * self._slot_bytes

    def _region(self, slot: int) -> Region:
        region = self._regions.get(slot)
        if region is None:
            region = Region(self._slot_address(slot), self._block_bytes, owner=self._arena)
            self._regions[slot] = region
        return region

    def _take_reserved(self, key: BlockKey, verb: str) -> int:
        slot = self._reserved.pop(key, None)
        if slot is None:
            raise TransitionError(f"block {key.hex()[:16]} is not reserved and cannot be {verb}", tier="cpu")
        return slot

    def _require_open(self, operation: str) -> None:
        if self._arena is None:
            raise TierError("the tier is closed", operation=operation, tier="cpu")


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _check_room(config: CpuConfig, context: TierContext, slot_bytes: int, slots: int) -> None:
    if slots < 1:
        raise TierOpenError(
            f"capacity: {int(config.capacity)} bytes over {context.world_size} ranks hold no block of "
            f"{context.block_bytes} bytes; write at least {slot_bytes * context.world_size}",
            operation="open",
            tier="cpu",
        )
    require_memory(slots * slot_bytes, "this rank's share is", "open")


def _take(nbytes: int, config: CpuConfig, context: TierContext) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _refused(nbytes, error, config, context) from error


def _refused(nbytes: int, error: OSError, config: CpuConfig, context: TierContext) -> TierOpenError:
    return TierOpenError(
        f"capacity: {int(config.capacity)} bytes over {context.world_size} ranks: the kernel refused "
        f"{nbytes} bytes of memory ({os.strerror(error.errno or 0)}); write a smaller capacity",
        operation="open",
        tier="cpu",
    )


def _address_of(arena: mmap.mmap) -> int:
    # The ctypes object is dropped at once: while it lives, the arena cannot be closed.
    return ctypes.addressof(ctypes.c_char.from_buffer(arena))


def _prepare(
    address: int, slots: int, slot_bytes: int, config: CpuConfig, context: TierContext
) -> Callable[[], None] | None:
    """Make every page present now, so that no store and no DMA pays for it later, and page-lock it.

    In parallel, each part in a thread that touches it and then locks it. Parts are whole slots, because
    DMA must not cross from one locked range into another. The kernel takes a page from the memory next to
    the core that touches it first, so the cores near the accelerator do it, where they are known.

    Returns:
        What undoes the page lock, or None where there is none.

    Raises:
        TierOpenError: If the kernel has no memory.
    """
    # Huge pages are a wish: a kernel without them says EINVAL and small pages do as well.
    _libc.madvise(address, slots * slot_bytes, _MADV_HUGEPAGE)
    count = min(len(context.cpus or os.sched_getaffinity(0)), _MAX_TOUCH_THREADS, slots)
    step = -(-slots // count)
    parts = [
        _Part(address + first * slot_bytes, min(step, slots - first) * slot_bytes)
        for first in range(0, slots, step)
    ]
    threads = [threading.Thread(target=part.prepare, args=(context,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def unpin() -> None:
        for part in parts:
            if part.unpin is not None:
                part.unpin()
                part.unpin = None

    errors = [part.error for part in parts if part.error]
    if errors:
        unpin()
        raise _refused(slots * slot_bytes, errors[0], config, context) from errors[0]
    if all(part.unpin for part in parts):
        return unpin
    unpin()
    if context.pin is not None:
        _warn(slots * slot_bytes, next(part.not_pinned for part in parts if part.not_pinned))
    return None


@dataclass(slots=True, eq=False)
class _Part:
    """Neighbouring slots, and what became of them."""

    address: int
    nbytes: int
    unpin: Callable[[], None] | None = None
    error: OSError | None = None
    not_pinned: Exception | None = None

    def prepare(self, context: TierContext) -> None:
        """Touch and page-lock. In a thread of its own, which ends here."""
        try:
            if context.cpus:
                os.sched_setaffinity(0, context.cpus)
            _touch(self.address, self.nbytes)
        except OSError as error:
            self.error = error
            return
        try:
            self.unpin = context.pin(self.address, self.nbytes) if context.pin is not None else None
        except Exception as error:  # noqa: BLE001 - the accelerator's own error type is not ours to know
            self.not_pinned = error


def _touch(address: int, nbytes: int) -> None:
    # Whole pages: a part may begin within a huge page, which two threads then touch.
    while _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE) != 0:
        code = ctypes.get_errno()
        if code == errno.EINVAL:  # A kernel before 5.14: write to the pages, which are all zero anyway.
            ctypes.memset(address, 0, nbytes)
            return
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code))


def _warn(nbytes: int, error: Exception) -> None:
    _log.warning(
        "cannot page-lock %d bytes of host memory (%s: %s); going on with pageable memory: copies to and "
        "from the accelerator will be several times slower. Raise the memlock limit (ulimit -l) or write a "
        "smaller capacity.",
        nbytes,
        type(error).__name__,
        error,
    )
