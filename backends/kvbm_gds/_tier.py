"""The NVMe tier: blocks in slots of preallocated files.

    submit ──► slot ──► engine (NIXL or threads) ──► poll ──► index entry ──► DONE

All of the tier's state is touched by its caller's thread alone; the engine's threads only move bytes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.errors import QueueFullError, TierError, TierOpenError
from kvbm_core.tier import (
    PAGE_BYTES,
    Capabilities,
    Completion,
    Op,
    Outcome,
    Reason,
    Tier,
    TierContext,
    Transfer,
)
from kvbm_gds._config import GdsConfig
from kvbm_gds._engines import Engines, open_engines
from kvbm_gds._io import Io
from kvbm_gds._layout import Entry, Sizing, plan_sizing, share_bytes
from kvbm_gds._slab import Slab, directory_of

__all__ = ["GdsTier"]

_log = logging.getLogger("kvbm_gds")

_CLOSE_WAIT_S: Final = 10.0
"""How long `close` waits for the disk."""
_REPORT_EVERY_S: Final = 60.0
"""A disk that fails or is full fails every block: one line, and then how many they were."""


class GdsTier(Tier):
    """Blocks in slots of one size; never more on the disk than the capacity, and never fragmented."""

    def __init__(self, config: GdsConfig, context: TierContext) -> None:
        self._context = context
        self._sizing = _sizing(config, context)
        self._slab = Slab(config, context.rank)
        try:
            directory_of(config).drop_other_ranks(context.rank, context.world_size, _log)
            self._engines: Engines = open_engines(config, self._slab, self._sizing, context.wake)
            entries = self._open_files()
        except BaseException:
            self._slab.close()
            raise
        self._ready: dict[BlockKey, int] = {}
        self._others: OrderedDict[int, None] = OrderedDict()
        """Slots of other namespaces, oldest first: kept until their room is needed."""
        self._inventory = self._take_stock(entries)
        taken = {*self._ready.values(), *self._others}
        # Taken from the end: neighbouring blocks get neighbouring slots.
        self._free = [slot for slot in reversed(range(self._sizing.slots)) if slot not in taken]
        self._writing: dict[BlockKey, int] = {}
        self._reading: dict[int, int] = {}
        """Slot to transfers that read it."""
        self._doomed: set[int] = set()
        """Slots that are free as soon as nobody reads them."""
        self._sequence = max((entry.sequence for entry in entries), default=0)
        self._flying: dict[int, tuple[Transfer, int, int]] = {}
        """Ticket to transfer, slot and sequence."""
        self._done: list[Completion] = []
        self._failures = Counter[str]()
        """Of each kind, since the last line in the log."""
        self._next_report_s: dict[str, float] = {}
        self._closed = self._out = False
        self._capabilities = Capabilities(
            capacity_blocks=self._sizing.slots,
            queue_depth=config.queue_depth,
            durable=True,
            device_direct=self._engines.device is not None,
            detail=f"{self._engines.detail}{'' if self._slab.direct else ', through the page cache'}",
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed else "out" if self._out else f"{len(self._flying)} in flight"
        return f"<GdsTier {self._slab.path} {len(self._ready)}/{self._sizing.slots} blocks, {state}>"

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[BlockKey]:
        """See `Tier.inventory`. Oldest first; a block of another length is not listed."""
        return self._inventory

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        if self._closed:
            raise TierError("the tier is closed", operation="submit", tier="gds")
        depth, taken = self._capabilities.queue_depth, len(self._flying) + len(self._done)
        if taken + len(transfers) > depth:
            raise QueueFullError(
                f"{len(transfers)} transfers do not fit beside {taken} in flight; the queue takes {depth}",
                operation="submit", tier="gds",
            )  # fmt: skip
        done = len(self._done)
        ios = [io for transfer in transfers if (io := self._accept(transfer)) is not None]
        ios = self._keep_sound(ios)
        if ios:
            self._engines.post(ios)
        if len(self._done) > done:
            self._context.wake()

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        if not self._closed:
            self._finish(self._engines.take())
        done, self._done = self._done, []
        return done

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        if self._closed:
            return
        for key in keys:
            slot = self._ready.pop(key, None)
            if slot is None or not self._clear(slot):
                continue
            if self._reading.get(slot):
                self._doomed.add(slot)
            else:
                self._free.append(slot)

    def close(self) -> None:
        """See `Tier.close`. Waits some seconds for the disk; what is not over then fails."""
        if self._closed:
            return
        ended = self._engines.close(_CLOSE_WAIT_S)
        self._finish(self._engines.take())
        self._closed = True
        for transfer, _, _ in self._flying.values():
            self._complete(transfer, Outcome.FAILED, Reason.ERROR)
        self._flying.clear()
        if not ended:
            _log.error("%s: transfers go on after %g s; files stay open", self._slab.path, _CLOSE_WAIT_S)
        self._slab.close(files=ended)

    def _open_files(self) -> list[Entry]:
        try:
            entries = self._slab.open(self._sizing)
            self._engines.add_files(self._slab.fds, self._sizing)
        except BaseException:
            # Nothing is in flight: its threads end at once.
            self._engines.close(_CLOSE_WAIT_S)
            raise
        return entries

    def _take_stock(self, entries: Iterable[Entry]) -> list[BlockKey]:
        found = []
        for entry in entries:
            ours = entry.namespace == self._context.namespace and entry.nbytes == self._context.block_bytes
            if ours and entry.key not in self._ready:
                self._ready[entry.key] = entry.slot
                found.append(entry.key)
            else:
                self._others[entry.slot] = None
        return found

    def _accept(self, transfer: Transfer) -> Io | None:
        """Answer what needs no disk; give the I/O of what does."""
        answer = self._answer(transfer)
        if answer:
            self._complete(transfer, *answer)
            return None
        if transfer.op is Op.STORE:
            free = self._take_slot()
            if free is None:
                self._complete(transfer, Outcome.FAILED, Reason.ERROR)
                return None
            slot = self._writing[transfer.key] = free
        else:
            slot = self._ready[transfer.key]
            self._reading[slot] = self._reading.get(slot, 0) + 1
        # Counted here, so that blocks of a batch stay in their order, however they end.
        self._sequence += 1
        self._flying[transfer.ticket] = (transfer, slot, self._sequence)
        region = transfer.region
        assert region is not None
        fd, offset = self._slab.place(slot)
        return Io(
            transfer, transfer.op is Op.STORE, fd, offset, region.address, self._sizing.slot_bytes,
            region.on_device,
        )  # fmt: skip

    def _answer(self, transfer: Transfer) -> tuple[Outcome, Reason] | None:
        """Say how a transfer ends that needs no disk."""
        ready = transfer.key in self._ready
        if transfer.op is not Op.STORE and not ready:
            return Outcome.MISSING, Reason.MISSING
        if ready and transfer.op is not Op.LOAD:
            return Outcome.DONE, Reason.NONE
        if self._out:
            return Outcome.FAILED, Reason.ERROR
        if transfer.op is Op.STORE and transfer.key in self._writing:
            return Outcome.FAILED, Reason.BUSY
        if transfer.op is Op.STORE and not self._free and not self._others:
            return Outcome.FAILED, Reason.FULL
        return None

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        slot, _ = self._others.popitem(last=False)
        return slot if self._clear(slot) else None

    def _clear(self, slot: int) -> bool:
        """Say on the disk that a slot holds nothing; if that fails the slot must not be written again."""
        try:
            self._slab.clear(slot)
        except OSError as error:
            self._go_out(f"the index cannot be written ({error.strerror})")
            return False
        return True

    def _finish(self, ios: Sequence[Io]) -> None:
        """Take in what the engine has ended."""
        if not ios:
            return
        sound = {id(io) for io in self._keep_sound(list(ios))}
        for io in ios:
            if id(io) in sound:
                self._end(io)

    def _keep_sound(self, ios: list[Io]) -> list[Io]:
        """Go on with I/Os unless somebody took the files away: then end them, and the tier is out."""
        if not self._out and ios:
            what = self._slab.damage({self._flying[io.token.ticket][1] for io in ios})
            if what:
                self._go_out(f"{what} by somebody else; keep other programs out of this directory")
        if not self._out:
            return ios
        for io in ios:
            io.error = io.error or "the files were taken away"
            self._end(io)
        return []

    def _go_out(self, why: str) -> None:
        if not self._out:
            self._out = True
            _log.error("tier gds is out until the engine is restarted: in %s %s", self._slab.path, why)

    def _end(self, io: Io) -> None:
        transfer, slot, sequence = self._flying.pop(io.token.ticket)
        if transfer.op is Op.STORE:
            del self._writing[transfer.key]
            self._end_store(transfer, slot, sequence, io.error)
            return
        self._reading[slot] -= 1
        if not self._reading[slot]:
            del self._reading[slot]
            if slot in self._doomed:
                self._doomed.remove(slot)
                self._free.append(slot)
        if io.error:
            self._report("load", io.error)
            self._complete(transfer, Outcome.FAILED, Reason.ERROR)
        else:
            self._complete(transfer, Outcome.DONE)

    def _end_store(self, transfer: Transfer, slot: int, sequence: int, error: str) -> None:
        if not error:
            try:
                self._slab.fill(
                    slot, self._context.namespace, transfer.key, sequence, self._context.block_bytes
                )
            except OSError as problem:
                error = str(problem)
        if error:
            self._free.append(slot)
            full = not self._out and self._slab.disk_is_full()
            self._complete(transfer, Outcome.FAILED, Reason.FULL if full else Reason.ERROR)
            self._report("store", error)
            return
        self._ready[transfer.key] = slot
        self._complete(transfer, Outcome.DONE)

    def _report(self, kind: str, error: str) -> None:
        if self._out:
            return
        self._failures[kind] += 1
        now_s = time.monotonic()
        if now_s < self._next_report_s.get(kind, 0.0):
            return
        self._next_report_s[kind] = now_s + _REPORT_EVERY_S
        _log.error(
            "a %s in %s failed: %s (%d since the last such line)",
            kind, self._slab.path, error, self._failures.pop(kind),
        )  # fmt: skip

    def _complete(self, transfer: Transfer, outcome: Outcome, reason: Reason = Reason.NONE) -> None:
        self._done.append(Completion(transfer.ticket, outcome, reason))


def _sizing(config: GdsConfig, context: TierContext) -> Sizing:
    sizing = plan_sizing(config.capacity // context.world_size, context.block_bytes)
    if sizing is None:
        least = share_bytes(1, context.block_bytes) * context.world_size
        raise TierOpenError(
            f"capacity: {int(config.capacity)} bytes over {context.world_size} ranks hold no block of "
            f"{context.block_bytes} bytes; write at least {least}",
            operation="open", tier="gds",
        )  # fmt: skip
    assert sizing.slot_bytes % PAGE_BYTES == 0
    return sizing
