"""The order in which a durable tier's objects were used, kept over a restart as objects of that tier.

    leader ── Plan.used ──► order ── about once a minute, and at close ──► STORE of its parts
    open   ── LOAD of its parts ──► the order of the inventory

What is lost is an order: then objects are listed as they were written. That costs hits, never a block.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.errors import TierError
from kvbm_core.layers.forward import ForwardTier
from kvbm_core.layers.order_parts import OrderShape, entries_of, read_generation, sorted_by_use
from kvbm_core.staging import Staging
from kvbm_core.tier import Capabilities, Completion, Op, Outcome, Tier, Transfer

__all__ = ["OrderTier"]

logger = logging.getLogger("kvbm_core")

_EVERY_S: Final = 60.0
"""From a change to when the order is written."""
_WAIT_S: Final = 2.0
"""How long the tier is waited for to give the order when it is opened, and to take it when it is closed."""
_PAUSE_S: Final = 0.001
_TICKET: Final = -1
"""Of the layer's own transfer: there is one at a time. The core's are above 0."""


class OrderTier(ForwardTier):
    """Lists a durable tier's objects in the order of use, also after a restart.

    Behaviour:
        - `inventory` names what was used last: last. What was stored after the order was written comes
          behind; what it has no room for comes first, in the order of writing.
        - Its own objects are not listed, and their room is no part of `Capabilities.capacity_bytes`.
        - A tier that does not take or give the order costs a line of the log, and no transfer.

    Args:
        inner: The tier.
        shape: Of the order.
        wake: Called when `poll` has something to do.
        name: The tier's name, for the log.
    """

    def __init__(self, inner: Tier, shape: OrderShape, wake: Callable[[], None], name: str) -> None:
        super().__init__(inner)
        self._shape = shape
        self._wake = wake
        self._name = name
        bare = inner.capabilities
        assert bare.capacity_bytes is not None
        self._capabilities = dataclasses.replace(
            bare, capacity_bytes=bare.capacity_bytes - shape.room_bytes, queue_depth=bare.queue_depth - 1
        )
        region = Staging(0, shape.part_bytes).take()
        assert region is not None
        self._region = region
        self._own: Transfer | None = None
        """What the tier was asked for here, and has not answered yet: until then the region is the tier's."""
        self._own_end: Completion | None = None
        self._stores: dict[int, BlockKey] = {}
        """Of the core, under way, by ticket."""
        self._held: list[Completion] = []
        """Of the core's transfers, taken and not passed on yet."""
        self._changed = self._closing = self._has_failed = False
        self._timer: threading.Timer | None = None
        """From a change until the order is written."""
        self._entries = b""
        """The order, ready to be written. Set by the timer's thread."""
        self._left: list[bytes] = []
        self._count = 0
        """Parts to be written yet, the next one last; and how many there were."""
        self._generation = 0
        self._listed = list(inner.inventory())
        self._restored = threading.Event()
        self._order: dict[BlockKey, None] = {}
        """What the tier has, or will have; the one used last is the last."""

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def restore(self) -> None:
        """Read the order, before the first `submit` and in the thread that calls it: as the contract has it."""
        shape, entries, give_up_s = self._shape, b"", time.monotonic() + _WAIT_S
        try:
            there = {key for key, _ in self._listed}
            for parity in (0, 1):
                if shape.key(parity, 0) in there:
                    number, found = read_generation(shape, partial(self._load, give_up_s, parity))
                    if number > self._generation:
                        self._generation, entries = number, found
        finally:
            own = {*shape.keys(0), *shape.keys(1)}
            self._listed = sorted_by_use([each for each in self._listed if each[0] not in own], entries)
            self._order = dict.fromkeys(key for key, _ in self._listed)
            self._restored.set()

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        """See `Tier.inventory`. Waits for `restore`, which another thread may be at."""
        # A tier that hangs in a call keeps nobody: then its objects are as it lists them.
        self._restored.wait(2 * _WAIT_S)
        return self._listed

    def used(self, keys: Sequence[BlockKey]) -> None:
        """Note which objects were used, or will be stored, the one used last: last."""
        order = self._order
        for key in keys:
            order.pop(key, None)
            order[key] = None
        self._note()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        self._listed = []
        self._inner.submit(transfers)
        self._stores.update((each.ticket, each.key) for each in transfers if each.op is Op.STORE)

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        self._take()
        self._write()
        done, self._held = self._held, []
        return done

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        self._inner.discard(keys)
        for key in keys:
            self._order.pop(key, None)

    def close(self) -> None:
        """See `Tier.close`. Writes the order, if the tier takes it in time."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._entries = entries_of(list(self._order))
            give_up_s = time.monotonic() + _WAIT_S
            while (self._entries or self._left) and time.monotonic() < give_up_s:
                self._write()
                self._wait_for_own(give_up_s)
        super().close()

    def _note(self) -> None:
        """Have the order written some time after a change."""
        self._changed = True
        excess = len(self._order) - self._shape.most_entries
        if excess > 0:
            # More than there is need for, so that the way to the front is not gone each time.
            for key in list(islice(self._order, excess + self._shape.most_entries // 4)):
                del self._order[key]
        if self._timer is None and not self._closing:
            self._timer = threading.Timer(_EVERY_S, self._prepare)
            self._timer.name, self._timer.daemon = f"kvbm-{self._name}-order", True
            self._timer.start()

    def _prepare(self) -> None:
        """Put the order into bytes. In the timer's thread."""
        self._changed = False
        # Listed in one step: no other thread has the interpreter meanwhile.
        self._entries = entries_of(list(self._order), _PAUSE_S)
        self._wake()

    def _take(self) -> bool:
        """Take in what has ended in the tier; False if nothing has."""
        ended = self._inner.poll()
        for completion in ended:
            if completion.ticket == _TICKET:
                self._own, self._own_end = None, completion
                continue
            self._held.append(completion)
            key = self._stores.pop(completion.ticket, None)
            if key is not None and completion.outcome is Outcome.DONE and key not in self._order:
                self._order[key] = None
                self._note()
        return bool(ended)

    def _write(self) -> None:
        """Go on with writing the order, one part at a time."""
        if self._own is not None:
            return
        end, self._own_end = self._own_end, None
        if self._left and end is not None:
            if end.outcome is not Outcome.DONE:
                self._give_up(end.detail or end.reason.value)
            else:
                self._left.pop()
                if not self._left:
                    self._inner.discard(self._shape.keys(self._generation - 1))
                    self._end_writing(failed=False)
        if self._entries and not self._left:
            self._generation += 1
            self._inner.discard(self._shape.keys(self._generation))
            parts = self._shape.make_parts(self._generation, self._entries)
            self._entries, self._left, self._count = b"", parts[::-1], len(parts)
        if self._left:
            self._region.view()[:] = self._left[-1].ljust(self._shape.part_bytes, b"\0")
            if not self._ask(Op.STORE, self._generation, self._count - len(self._left)):
                self._give_up("it takes nothing")

    def _give_up(self, why: str) -> None:
        if not self._has_failed:
            logger.warning(
                "tier %s: the order of use cannot be written (%s); a restart would find an older one. "
                "It is tried again by itself", self._name, why,
            )  # fmt: skip
        self._inner.discard(self._shape.keys(self._generation))
        self._generation -= 1
        self._changed = True
        self._end_writing(failed=True)

    def _end_writing(self, *, failed: bool) -> None:
        self._left, self._timer, self._has_failed = [], None, failed
        if self._changed:
            self._note()

    def _ask(self, op: Op, generation: int, part: int) -> bool:
        """Have the tier store or load a part; False if it does not."""
        self._own = Transfer(_TICKET, op, self._shape.key(generation, part), self._region)
        try:
            self._inner.submit([self._own])
        except TierError:
            self._own = None
        return self._own is not None

    def _wait_for_own(self, give_up_s: float) -> None:
        while self._own is not None and time.monotonic() < give_up_s:
            if not self._take():
                time.sleep(_PAUSE_S)

    def _load(self, give_up_s: float, generation: int, part: int) -> bytes:
        """Wait for a part; nothing if the tier does not give it."""
        if self._own is None and self._ask(Op.LOAD, generation, part):
            self._wait_for_own(give_up_s)
        end, self._own_end = self._own_end, None
        return bytes(self._region.view()) if end is not None and end.outcome is Outcome.DONE else b""
