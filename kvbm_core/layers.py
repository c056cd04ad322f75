"""What cuts across all tiers, as wrappers with the same interface.

mover ──► DeadlineTier ──► CheckedTier ──► ReplicaTier ──► the backend's tier
          a thread a tier,    footer on store,   only where another rank
          a bound on time     proof on load      writes the same bytes
"""

from __future__ import annotations

import dataclasses
import logging
import math
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import xxhash

from kvbm_core.block import KEY_BYTES, NAMESPACE_BYTES, BlockKey, Namespace
from kvbm_core.errors import QueueFullError, TierError
from kvbm_core.tier import Capabilities, Completion, Op, Outcome, Reason, Region, Tier, Transfer

__all__ = ["FOOTER_BYTES", "CheckedTier", "DeadlineTier", "ReplicaTier"]

logger = logging.getLogger("kvbm_core")

# magic, format version, footer bytes, payload bytes, namespace, key, then the checksum of payload
# and these fields. The footer follows the payload, so that the payload keeps its page alignment.
_FIELDS: Final = struct.Struct(f"<8sIIQ{NAMESPACE_BYTES}s{KEY_BYTES}s")
_MAGIC: Final = b"KVBMBLK\0"
_FORMAT_VERSION: Final = 1
_CHECKSUM_BYTES: Final = 16
FOOTER_BYTES: Final = 96
"""Bytes that `CheckedTier` adds behind a block's payload (88 used, 8 zero)."""


class CheckedTier(Tier):
    """Proves on every load that the bytes are those stored, under this key, in this namespace.

    Behaviour:
        - A flipped bit, a short value, another key's value, another namespace's value: FAILED with
          reason CORRUPT.
    """

    def __init__(
        self, inner: Tier, namespace: Namespace, read: Callable[[Region], memoryview] | None = None
    ) -> None:
        """Take a tier over.

        Args:
            inner: The tier.
            namespace: 16 bytes.
            read: Brings a region of device memory to the host, see `Stageable.read`.
        """
        self._inner = inner
        self._namespace = namespace
        self._read_device = read
        self._loads: dict[int, Transfer] = {}

    def __repr__(self) -> str:
        return f"<Checked {self._inner!r}>"

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._inner.capabilities

    def inventory(self) -> Iterable[BlockKey]:
        """See `Tier.inventory`."""
        return self._inner.inventory()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        for transfer in transfers:
            if transfer.op is Op.STORE:
                content = self._content(transfer)
                content[-FOOTER_BYTES:] = self._footer(transfer.key, content)
        self._inner.submit(transfers)
        self._loads.update((t.ticket, t) for t in transfers if t.op is Op.LOAD)

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        return [self._verify(completion) for completion in self._inner.poll()]

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        self._inner.discard(keys)

    def close(self) -> None:
        """See `Tier.close`."""
        self._inner.close()

    def _content(self, transfer: Transfer) -> memoryview:
        region = transfer.region
        assert region is not None
        if not region.on_device:
            return region.view()
        assert self._read_device is not None, "only a device that stages has such regions"
        return self._read_device(region)

    def _footer(self, key: BlockKey, content: memoryview) -> bytes:
        payload_bytes = len(content) - FOOTER_BYTES
        fields = _FIELDS.pack(_MAGIC, _FORMAT_VERSION, FOOTER_BYTES, payload_bytes, self._namespace, key)
        checksum = xxhash.xxh3_128(content[:payload_bytes])
        checksum.update(fields)
        return (fields + checksum.digest()).ljust(FOOTER_BYTES, b"\0")

    def _verify(self, completion: Completion) -> Completion:
        transfer = self._loads.pop(completion.ticket, None)
        if transfer is None or completion.outcome is not Outcome.DONE:
            return completion
        content = self._content(transfer)
        if content[-FOOTER_BYTES:] == self._footer(transfer.key, content):
            return completion
        return Completion(completion.ticket, Outcome.FAILED, Reason.CORRUPT)


class ReplicaTier(Tier):
    """Leaves writing to another rank that holds the same bytes.

    Behaviour:
        - A store completes DONE and writes nothing. A block counts as stored when every rank has said
          so, and the one that writes says it last or first.
    """

    def __init__(self, inner: Tier, wake: Callable[[], None]) -> None:
        self._inner = inner
        self._wake = wake
        self._left: list[Completion] = []

    def __repr__(self) -> str:
        return f"<Replica {self._inner!r}>"

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._inner.capabilities

    def inventory(self) -> Iterable[BlockKey]:
        """See `Tier.inventory`."""
        return self._inner.inventory()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        self._inner.submit([transfer for transfer in transfers if transfer.op is not Op.STORE])
        self._left += [Completion(t.ticket, Outcome.DONE) for t in transfers if t.op is Op.STORE]
        self._wake()

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        left, self._left = self._left, []
        return [*left, *self._inner.poll()]

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        self._inner.discard(keys)

    def close(self) -> None:
        """See `Tier.close`."""
        self._inner.close()


class DeadlineTier(Tier):
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
        self._inner = inner
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
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def inventory(self) -> Iterable[BlockKey]:
        """See `Tier.inventory`. Call it before the first `submit`."""
        return self._inner.inventory()

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
        self._expire(time.monotonic())
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

    def close(self) -> None:
        """See `Tier.close`. Waits at most a few seconds for a tier that hangs."""
        self._closing = True
        self._event.set()
        self._thread.join(timeout=10)
        if self._thread.is_alive():
            logger.warning("tier %s did not close within 10 s; it is left behind", self._name)

    def _expire(self, now_s: float, reason: Reason = Reason.DEADLINE, among: set[int] | None = None) -> None:
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
        self._outbox.extend(Completion(ticket, Outcome.FAILED, reason) for ticket in expired)

    def _run(self) -> None:
        """Be the one thread that calls the inner tier."""
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
        except TierError:
            self._refuse(batch or (), Reason.ERROR)
        except Exception:  # a thread's top: it becomes completions.
            self._raises += 1
            logger.log(
                logging.ERROR if self._raises in (1, self._MAX_RAISES) else logging.DEBUG,
                "tier %s raised in %s (%d of %d times before it is left alone)",
                self._name, method, self._raises, self._MAX_RAISES, exc_info=True,
            )  # fmt: skip
            self._expire(math.inf, Reason.ERROR, {t.ticket for t in batch or () if isinstance(t, Transfer)})
            self._wake_outer()
        else:
            return result  # type: ignore[no-any-return]
        return None

    def _refuse(self, batch: Sequence[Transfer] | Sequence[BlockKey], reason: Reason) -> None:
        """Fail a batch of which the tier says that nothing was started."""
        transfers = [t for t in batch if isinstance(t, Transfer)]
        self._finish([Completion(t.ticket, Outcome.FAILED, reason) for t in transfers])

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
