"""The NVMe tier: blocks in slots of preallocated files.

    submit ──► slot ──► engine (NIXL or threads) ──► poll ──► index entry ──► DONE

All of the tier's state is touched by its caller's thread alone; the engine's threads only move bytes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.config import size_text
from kvbm_core.errors import QueueFullError, TierError, TierOpenError
from kvbm_core.log_limit import LogLimit
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
from kvbm_gds._reopening import Reopening
from kvbm_gds._slab import Slab, directory_of
from kvbm_gds._slots import Slots

__all__ = ["GdsTier"]

_log = logging.getLogger("kvbm_gds")

_CLOSE_WAIT_S: Final = 10.0
"""How long `close` waits for the disk."""
_REOPEN_EVERY_S: Final = 5.0
"""From when the files were taken away to the first try to open them anew, and from try to try."""


class GdsTier(Tier):
    """Blocks in slots of one size; never more on the disk than the capacity, and never fragmented."""

    def __init__(self, config: GdsConfig, context: TierContext) -> None:
        self._config = config
        self._context = context
        self._sizing = _sizing(config, context)
        self._lines = LogLimit(_log)
        """A disk that fails or is full fails every block."""
        self._slab = Slab(config, context.rank)
        try:
            directory_of(config).drop_other_ranks(context.rank, context.world_size, _log)
            self._engines: Engines = open_engines(config, self._slab, self._sizing, context.wake)
            entries = self._open_files()
        except BaseException:
            self._slab.close()
            raise
        self._slots = Slots(self._slab, self._sizing.slots, context, self._index_failed)
        self._inventory = self._slots.take_stock(entries)
        self._writing: set[BlockKey] = set()
        self._sequence = max((entry.sequence for entry in entries), default=0)
        self._flying: dict[int, tuple[Transfer, int, int]] = {}
        """Ticket to transfer, slot and sequence."""
        self._done: list[Completion] = []
        self._closed = False
        self._out = ""
        """Why the files cannot be used; empty if they can."""
        self._reopening: Reopening | None = None
        self._next_reopen_s = 0.0
        self._capabilities = Capabilities(
            capacity_blocks=self._sizing.slots,
            queue_depth=config.queue_depth,
            durable=True,
            device_direct=self._engines.device is not None,
            detail=f"{self._engines.detail}{'' if self._slab.direct else ', through the page cache'}",
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed else "out" if self._out else f"{len(self._flying)} in flight"
        return f"<GdsTier {self._slab.path} {len(self._slots.ready)}/{self._sizing.slots} blocks, {state}>"

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
        for transfer, _, _ in self._flying.values():
            self._complete(transfer, Outcome.FAILED, Reason.ERROR, "the tier was closed")
        self._flying.clear()
        if not ended:
            _log.error("%s: transfers go on after %g s; files stay open", self._slab.path, _CLOSE_WAIT_S)
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
            self._complete(transfer, *answer)
            return None
        if transfer.op is Op.STORE:
            slot = self._slots.take()
            if slot is None:
                self._complete(transfer, Outcome.FAILED, Reason.ERROR, "the index cannot be written")
                return None
            self._writing.add(transfer.key)
        else:
            slot = self._slots.read(transfer.key)
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

    def _answer(self, transfer: Transfer) -> tuple[Outcome, Reason, str] | None:
        """Say how a transfer ends that needs no disk."""
        ready = transfer.key in self._slots.ready
        if transfer.op is not Op.STORE and not ready:
            return Outcome.MISSING, Reason.MISSING, ""
        if ready and transfer.op is not Op.LOAD:
            return Outcome.DONE, Reason.NONE, ""
        if self._out:
            return Outcome.FAILED, Reason.ERROR, self._out
        if transfer.op is Op.STORE and transfer.key in self._writing:
            return Outcome.FAILED, Reason.BUSY, "it is being written"
        if transfer.op is Op.STORE and self._slots.full:
            return Outcome.FAILED, Reason.FULL, f"all of {self._sizing.slots} slots are taken"
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
            what = self._slab.damage({self._flying[io.token.ticket][1] for io in ios})
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
        self._lines.error(
            "out",
            "tier gds is out for a while: in %s %s; keep other programs out of this directory. Its files are "
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
                self._lines.error("reopen", "tier gds stays out: %s", reopening.error)
                return
            self._slab, self._engines, entries = reopening.opened
            wanted = self._slots.ready
            self._slots = Slots(self._slab, self._sizing.slots, self._context, self._index_failed)
            self._slots.take_stock(entries, wanted)
            self._out = ""
            left = len(self._slots.ready)
            _log.warning("tier gds works again: %s has %d of %d blocks", self._slab.path, left, len(wanted))

    def _end(self, io: Io) -> None:
        transfer, slot, sequence = self._flying.pop(io.token.ticket)
        if transfer.op is Op.STORE:
            self._writing.remove(transfer.key)
            self._end_store(transfer, slot, sequence, io)
            return
        self._slots.end_read(slot)
        if io.error:
            self._fail(transfer, Reason.ERROR, io.error)
        else:
            self._complete(transfer, Outcome.DONE)

    def _end_store(self, transfer: Transfer, slot: int, sequence: int, io: Io) -> None:
        error, code = io.error, io.code
        if not error:
            try:
                self._slots.fill(transfer.key, slot, sequence)
            except OSError as problem:
                error, code = f"the index cannot be written ({problem.strerror})", problem.errno or 0
        if not error:
            self._complete(transfer, Outcome.DONE)
            return
        self._slots.give_up(slot)
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
        self, transfer: Transfer, outcome: Outcome, reason: Reason = Reason.NONE, detail: str = ""
    ) -> None:
        self._done.append(Completion(transfer.ticket, outcome, reason, detail))


def _sizing(config: GdsConfig, context: TierContext) -> Sizing:
    sizing = plan_sizing(config.capacity // context.world_size, context.block_bytes)
    if sizing is None:
        least = share_bytes(1, context.block_bytes) * context.world_size
        raise TierOpenError(
            f"capacity: {size_text(config.capacity)} over {context.world_size} ranks hold no block of "
            f"{size_text(context.block_bytes, up=True)}; write at least {size_text(least, up=True)}",
            operation="open", tier="gds",
        )  # fmt: skip
    assert sizing.slot_bytes % PAGE_BYTES == 0
    return sizing
