"""A thread and a bound on time for each tier."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.errors import QueueFullError, TierError
from kvbm_core.layers.forward import ForwardTier
from kvbm_core.layers.order_tier import OrderTier
from kvbm_core.tier import Capabilities, Completion, Outcome, Reason, Tier, Transfer

__all__ = ["DeadlineTier"]

logger = logging.getLogger("kvbm_core")

_LATE: Final = (
    "no answer by the deadline: look whether its disk or its server hangs (dmesg), or is too slow for "
    "store_deadline_s and load_deadline_s"
)


class DeadlineTier(ForwardTier):
    """Gives a tier a thread of its own, and every ticket exactly one outcome in time.

    Behaviour:
        - A transfer not complete at its deadline completes FAILED with reason DEADLINE.
        - A tier that raises, blocks or answers twice delays nobody but itself.
        - A late transfer's region is still the tier's: `released` says when it has let go.
    """

    _TICK_S: Final = 0.001
    """How often a tier that does not `wake` is polled while something is in flight."""
    _LATE_TICK_S: Final = 0.05
    """Likewise while only late transfers are."""
    _MAX_RAISES: Final = 8
    """After so many batches that raised outside the contract the tier is left alone for good: each
    leaves regions behind that nobody may touch again."""

    def __init__(
        self,
        inner: Tier,
        woken: threading.Event,
        name: str,
        wake: Callable[[], None],
        *,
        stages: bool = False,
    ) -> None:
        """Take a tier over.

        Args:
            inner: From now on called by this layer's thread alone.
            woken: What the inner tier's `TierContext.wake` sets.
            name: The tier's name, for the log.
            wake: Called when `poll` has something to return.
            stages: Whether there is device memory for a `device_direct` tier to read into.
        """
        super().__init__(inner)
        self._event = woken
        self._name = name
        self._wake_outer = wake
        # Its memory cannot be lent through this layer.
        direct = inner.capabilities.device_direct and stages
        self._capabilities = dataclasses.replace(inner.capabilities, addressable=False, device_direct=direct)
        self._lock = threading.Lock()
        self._inbox: deque[tuple[str, Sequence[Transfer] | Sequence[BlockKey]]] = deque()
        self._outbox: deque[Completion] = deque()
        self._open: dict[int, float] = {}  # ticket → deadline
        self._late: set[int] = set()
        self._released: list[int] = []
        self._closing = False
        self._raises = 0
        self._thread = threading.Thread(target=self._run, name=f"kvbm-{name}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Deadline {self._inner!r} {len(self._open)} open {len(self._late)} late>"

    @property
    def name(self) -> str:
        """The tier's name, for the log."""
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        with self._lock:
            # A late transfer still takes a place in the inner tier's queue.
            taken = len(self._open) + len(self._late)
            if self._raises >= self._MAX_RAISES:
                raise TierError("it raised too often", operation="submit", tier=self._name)
            if taken + len(transfers) > self._capabilities.queue_depth:
                raise QueueFullError(f"{taken} transfers are open", operation="submit", tier=self._name)
            self._open.update((t.ticket, t.deadline_s) for t in transfers)
        self._inbox.append(("submit", transfers))
        self._event.set()

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        self._expire(time.monotonic(), detail=_LATE)
        done = []
        while self._outbox:
            done.append(self._outbox.popleft())
        return done

    def holds(self, ticket: int) -> bool:
        """Say whether a failed transfer's region is still the tier's."""
        with self._lock:
            return ticket in self._late

    def released(self) -> Sequence[int]:
        """Take the late tickets whose regions the tier has let go of since the last call."""
        with self._lock:
            released, self._released = self._released, []
        return released

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        self._inbox.append(("discard", keys))
        self._event.set()

    def used(self, keys: Sequence[BlockKey]) -> None:
        """Note which objects were used, see `OrderTier.used`. Of no use to a tier without it."""
        if isinstance(self._inner, OrderTier):
            self._inbox.append(("used", keys))
            self._event.set()

    def close(self) -> None:
        """See `Tier.close`. Waits at most a few seconds for a tier that hangs."""
        self._closing = True
        self._event.set()
        self._thread.join(timeout=10)
        if self._thread.is_alive():
            logger.warning("tier %s did not close within 10 s; it is left behind", self._name)

    def _expire(
        self, now_s: float, reason: Reason = Reason.DEADLINE, among: set[int] | None = None, detail: str = ""
    ) -> None:
        """Fail what is overdue (among some tickets); its regions stay the tier's."""
        with self._lock:
            expired = [
                ticket
                for ticket, deadline_s in self._open.items()
                if deadline_s <= now_s and (among is None or ticket in among)
            ]
            for ticket in expired:
                del self._open[ticket]
                self._late.add(ticket)
        self._outbox.extend(Completion(ticket, Outcome.FAILED, reason, detail) for ticket in expired)

    def _run(self) -> None:
        """Be the one thread that calls the inner tier."""
        if isinstance(self._inner, OrderTier):
            self._guard("restore")
        while not self._closing or self._inbox:
            self._event.wait(self._TICK_S if self._open else self._LATE_TICK_S if self._late else None)
            self._event.clear()
            while self._inbox:
                self._guard(*self._inbox.popleft())
            self._finish(self._guard("poll") or ())
        self._guard("close")
        self._finish(self._guard("poll") or ())

    def _guard(
        self, method: str, batch: Sequence[Transfer] | Sequence[BlockKey] | None = None
    ) -> Sequence[Completion] | None:
        """Call the inner tier; whatever it raises becomes completions."""
        try:
            result = getattr(self._inner, method)(*(() if batch is None else (batch,)))
        except QueueFullError:
            self._refuse(batch or (), Reason.BUSY)
        except TierError as error:
            self._refuse(batch or (), Reason.ERROR, str(error))
        except Exception as error:  # a thread's top: it becomes completions.
            self._raises += 1
            logger.log(
                logging.ERROR if self._raises in (1, self._MAX_RAISES) else logging.DEBUG,
                "tier %s raised in %s (%d of %d times before it is left alone)",
                self._name, method, self._raises, self._MAX_RAISES, exc_info=True,
            )  # fmt: skip
            asked = {t.ticket for t in batch or () if isinstance(t, Transfer)}
            # The type alone: the text of a foreign error may quote a password.
            self._expire(math.inf, Reason.ERROR, asked, f"{type(error).__name__} in {method}")
            self._wake_outer()
        else:
            return result  # type: ignore[no-any-return]
        return None

    def _refuse(
        self, batch: Sequence[Transfer] | Sequence[BlockKey], reason: Reason, detail: str = ""
    ) -> None:
        """Fail a batch of which the tier says that nothing was started."""
        transfers = [t for t in batch if isinstance(t, Transfer)]
        self._finish([Completion(t.ticket, Outcome.FAILED, reason, detail) for t in transfers])

    def _finish(self, completions: Sequence[Completion]) -> None:
        """Pass on what was awaited, note what was late, ignore what was never asked."""
        with self._lock:
            for completion in completions:
                if self._open.pop(completion.ticket, None) is not None:
                    self._outbox.append(completion)
                elif completion.ticket in self._late:
                    self._late.discard(completion.ticket)
                    self._released.append(completion.ticket)
        if completions:
            self._wake_outer()
