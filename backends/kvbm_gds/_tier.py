"""The NVMe tier: objects in slots of preallocated files.

    submit ──► slot ──► engine (NIXL or threads) ──► poll ──► index entry ──► DONE

All of the tier's state is touched by its caller's thread alone; the engine's threads only move bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.config import size_text
from kvbm_core.errors import QueueFullError, TierError, TierOpenError
from kvbm_core.log_limit import LogLimit
from kvbm_core.tier import (
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
from kvbm_gds._layout import Entry, Sizing, in_pages, plan_sizing, share_bytes
from kvbm_gds._reopening import Reopening
from kvbm_gds._slab import Slab, directory_of
from kvbm_gds._slots import Slots

__all__ = ["GdsTier"]

_CLOSE_WAIT_S: Final = 10.0
"""How long `close` waits for the disk."""
_REOPEN_EVERY_S: Final = 5.0
"""From when the files were taken away to the first try to open them anew, and from try to try."""


class GdsTier(Tier):
    """Objects in slots of one size; never more on the disk than the capacity, and never fragmented.

    Of a slot only the pages of its object are read and written.
    """

    def __init__(self, config: GdsConfig, context: TierContext) -> None:
        self._config = config
        self._context = context
        self._sizing = _sizing(config, context)
        self._slab = Slab(config, context)
        self._log = self._slab.log
        self._lines = LogLimit(self._log)
        """A disk that fails or is full fails every block."""
        try:
            directory_of(config).drop_other_ranks(context.rank, context.world_size, self._log)
            self._engines: Engines = open_engines(config, self._slab, self._sizing, context.wake)
            entries = self._open_files()
        except BaseException:
            self._slab.close()
            raise
        self._slots = Slots(self._slab, self._sizing.slots, context, self._index_failed)
        self._inventory = self._slots.take_stock(entries)
        self._slab.keep_facts(starts_empty=not self._inventory)
        self._writing: set[BlockKey] = set()
        self._sequence = max((entry.sequence for entry in entries), default=0)
        self._flying: dict[int, _Flight] = {}
        """By ticket."""
        self._done: list[Completion] = []
        self._closed = False
        self._out = ""
        """Why the files cannot be used; empty if they can."""
        self._reopening: Reopening | None = None
        self._next_reopen_s = 0.0
        self._capabilities = Capabilities(
            capacity_bytes=self._sizing.slots * self._sizing.slot_bytes,
            queue_depth=config.queue_depth,
            durable=True,
            device_direct=self._engines.device is not None,
            detail=f"{self._engines.detail}{'' if self._slab.direct else ', through the page cache'}",
            unit_bytes=self._sizing.slot_bytes,
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed else "out" if self._out else f"{len(self._flying)} in flight"
        return f"<GdsTier {self._slab.path} {len(self._slots.ready)}/{self._sizing.slots} objects, {state}>"

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        """See `Tier.inventory`. Oldest first; an object longer than `TierContext.max_bytes` is not listed."""
        return self._inventory

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        if self._closed:
            raise TierError("the tier is closed", operation="submit", tier=self._context.name)
        depth, taken = self._capabilities.queue_depth, len(self._flying) + len(self._done)
        if taken + len(transfers) > depth:
            raise QueueFullError(
                f"{len(transfers)} transfers do not fit beside {taken} in flight; the queue takes {depth}",
                operation="submit", tier=self._context.name,
            )  # fmt: skip
        self._heal()
        if not self._out:
            self._slots.mend()
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
            self._heal()
        done, self._done = self._done, []
        return done

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        if self._closed:
            return
        for key in keys:
            if self._out:
                # When the files are opened anew, what is not asked for any more gives way to others.
                self._slots.ready.pop(key, None)
            else:
                self._slots.forget(key)

    def close(self) -> None:
        """See `Tier.close`. Waits some seconds for the disk; what is not over then fails."""
        if self._closed:
            return
        if self._reopening is not None:
            self._reopening.close(_CLOSE_WAIT_S)
        ended = self._engines.close(_CLOSE_WAIT_S)
        self._finish(self._engines.take())
        if not self._out:
            self._slots.mend(at_once=True)
        self._closed = True
        for flight in self._flying.values():
            self._complete(flight.transfer, Outcome.FAILED, Reason.ERROR, "the tier was closed")
        self._flying.clear()
        if not ended:
            self._log.error("%s: transfers go on after %g s; files stay open", self._slab.path, _CLOSE_WAIT_S)
        self._slab.close(files=ended)
        self._lines.close()

    def _open_files(self) -> list[Entry]:
        try:
            entries = self._slab.open(self._sizing)
            self._engines.add_files(self._slab.fds, self._sizing)
        except BaseException:
            # Nothing is in flight: its threads end at once.
            self._engines.close(_CLOSE_WAIT_S)
            raise
        return entries

    def _accept(self, transfer: Transfer) -> Io | None:
        """Answer what needs no disk; give the I/O of what does."""
        answer = self._answer(transfer)
        if answer:
            self._done.append(answer)
            return None
        region = transfer.region
        assert region is not None
        if transfer.op is Op.STORE:
            slot, nbytes = self._slots.take(), region.nbytes
            if slot is None:
                self._complete(transfer, Outcome.FAILED, Reason.ERROR, "the index cannot be written")
                return None
            self._writing.add(transfer.key)
        else:
            nbytes, slot = self._slots.nbytes(transfer.key), self._slots.read(transfer.key)
        # Counted here, so that objects of a batch stay in their order, however they end.
        self._sequence += 1
        self._flying[transfer.ticket] = _Flight(transfer, slot, self._sequence, nbytes)
        fd, offset = self._slab.place(slot)
        write, length = transfer.op is Op.STORE, in_pages(nbytes)
        return Io(transfer, write, fd, offset, region.address, length, region.on_device)

    def _answer(self, transfer: Transfer) -> Completion | None:
        """Say how a transfer ends that needs no disk."""
        ticket, failed = transfer.ticket, Outcome.FAILED
        held, given = self._slots.nbytes(transfer.key), transfer.region.nbytes if transfer.region else 0
        if transfer.op is not Op.STORE and not held:
            return Completion(ticket, Outcome.MISSING, Reason.MISSING)
        if transfer.op is not Op.LOAD and held:
            return Completion(ticket, Outcome.DONE, nbytes=held)
        if self._out:
            return Completion(ticket, failed, Reason.ERROR, self._out)
        if held > given:
            detail = f"the object has {held} bytes, {given} were asked for"
            return Completion(ticket, failed, Reason.CORRUPT, detail)
        if transfer.op is Op.STORE and transfer.key in self._writing:
            return Completion(ticket, failed, Reason.BUSY, "it is being written")
        if not 0 < given <= self._context.max_bytes and transfer.op is Op.STORE:
            # A longer one would overwrite the next slot.
            detail = f"the object has {given} bytes; a slot takes 1 to {self._context.max_bytes}"
            return Completion(ticket, failed, Reason.ERROR, detail)
        if transfer.op is Op.STORE and self._slots.full:
            return Completion(ticket, failed, Reason.FULL, f"all of {self._sizing.slots} slots are taken")
        return None

    def _finish(self, ios: Sequence[Io]) -> None:
        """Take in what the engine has ended."""
        if not ios:
            return
        sound = {id(io) for io in self._keep_sound(list(ios))}
        for io in ios:
            if id(io) in sound:
                self._end(io)

    def _keep_sound(self, ios: list[Io]) -> list[Io]:
        """Go on with I/Os unless somebody took the files away: then end them, and open the files anew."""
        if not self._out and ios:
            what = self._slab.damage({self._flying[io.token.ticket].slot for io in ios})
            if what:
                self._go_out(what)
        if not self._out:
            return ios
        for io in ios:
            io.error = io.error or self._out
            self._end(io)
        return []

    def _go_out(self, why: str) -> None:
        self._out = why
        self._next_reopen_s = time.monotonic() + _REOPEN_EVERY_S
        self._lines.lasts(
            "out", time.monotonic(),
            "out for a while: in %s %s; keep other programs out of this directory. Its files are "
            "opened anew every %g s, until that works",
            self._slab.path, why, _REOPEN_EVERY_S,
        )  # fmt: skip

    def _heal(self) -> None:
        """Open the files anew if they were taken away: in a thread, and when nothing uses the old ones."""
        if not self._out or self._flying:
            return
        if self._reopening is None:
            if time.monotonic() >= self._next_reopen_s:
                old = (self._engines, self._slab)
                self._reopening = Reopening(self._config, self._context, self._sizing, old)
        elif self._reopening.ended:
            reopening, self._reopening = self._reopening, None
            if reopening.opened is None:
                self._next_reopen_s = time.monotonic() + _REOPEN_EVERY_S
                self._lines.error("reopen", "it stays out: %s", reopening.error)
                return
            self._slab, self._engines, entries = reopening.opened
            wanted = self._slots.ready
            self._slots = Slots(self._slab, self._sizing.slots, self._context, self._index_failed)
            self._slots.take_stock(entries, wanted)
            self._out = ""
            self._lines.over(
                "out", time.monotonic(), "it works again: %s has %d of %d objects; it was out %s",
                self._slab.path, len(self._slots.ready), len(wanted),
            )  # fmt: skip

    def _end(self, io: Io) -> None:
        flight = self._flying.pop(io.token.ticket)
        transfer = flight.transfer
        if transfer.op is Op.STORE:
            self._writing.remove(transfer.key)
            self._end_store(flight, io)
            return
        self._slots.end_read(flight.slot)
        if io.error:
            self._fail(transfer, Reason.ERROR, io.error)
        else:
            self._complete(transfer, Outcome.DONE, nbytes=flight.nbytes)

    def _end_store(self, flight: _Flight, io: Io) -> None:
        transfer, error, code = flight.transfer, io.error, io.code
        if not error:
            try:
                self._slots.fill(transfer.key, flight.slot, flight.sequence, flight.nbytes)
            except OSError as problem:
                error, code = f"the index cannot be written ({problem.strerror})", problem.errno or 0
        if not error:
            self._complete(transfer, Outcome.DONE, nbytes=flight.nbytes)
            return
        self._slots.give_up(flight.slot)
        full = not self._out and self._slab.is_full(code)
        self._fail(transfer, Reason.FULL if full else Reason.ERROR, error)

    def _fail(self, transfer: Transfer, reason: Reason, error: str) -> None:
        self._complete(transfer, Outcome.FAILED, reason, error)
        if self._out:
            return
        if reason is Reason.FULL:
            error += "; other files have taken the room that it needs: free some, or write a smaller capacity"
        self._lines.error(
            (transfer.op, reason), "a %s in %s failed: %s", transfer.op.value, self._slab.path, error
        )
        if reason is Reason.ERROR and self._slab.is_elsewhere():
            self._go_out("the directory was replaced by another")

    def _index_failed(self, error: OSError) -> None:
        self._lines.error(
            "index", "the index of %s cannot be written: %s; it is tried again by itself",
            self._slab.path, error.strerror,
        )  # fmt: skip

    def _complete(
        self,
        transfer: Transfer,
        outcome: Outcome,
        reason: Reason = Reason.NONE,
        detail: str = "",
        nbytes: int = 0,
    ) -> None:
        self._done.append(Completion(transfer.ticket, outcome, reason, detail, nbytes))


@dataclass(frozen=True, slots=True)
class _Flight:
    """A transfer that the disk works on."""

    transfer: Transfer
    slot: int
    sequence: int
    nbytes: int
    """Length of the object."""


def _sizing(config: GdsConfig, context: TierContext) -> Sizing:
    sizing = plan_sizing(config.capacity // context.world_size, context.max_bytes)
    if sizing is None:
        least = share_bytes(1, context.max_bytes) * context.world_size
        raise TierOpenError(
            f"capacity: {size_text(config.capacity)} over {context.world_size} ranks hold no object of "
            f"{size_text(context.max_bytes, up=True)}; write at least {size_text(least, up=True)}",
            operation="open", tier=context.name,
        )  # fmt: skip
    return sizing
