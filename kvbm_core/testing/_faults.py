"""A tier that misbehaves on command."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence

from kvbm_core.block import BlockKey
from kvbm_core.tier import Capabilities, Completion, Op, Outcome, Reason, Tier, Transfer

__all__ = ["FaultyTier"]


class FaultyTier(Tier):
    """Wraps a tier; `fault` decides, for each transfer, what goes wrong.

    Args:
        inner: The tier that does the work.
        fault: Given a transfer, names a fault or returns None for none:
            ``error`` (completes FAILED), ``hang`` (never completes), ``late`` (completes a second
            later), ``flip`` (one bit of a load is wrong), ``lie`` (a load says DONE and reads
            nothing), ``raise`` (`submit` raises RuntimeError), ``block`` (`submit` sleeps for two
            seconds), ``twice`` (completes twice).
        seed: Of the choice of bits.
    """

    def __init__(self, inner: Tier, fault: Callable[[Transfer], str | None], seed: int = 0) -> None:
        self._inner = inner
        self._fault = fault
        self._random = random.Random(seed)
        self._faults: dict[int, tuple[str, Transfer]] = {}
        self._held: list[tuple[float, Completion]] = []

    def __repr__(self) -> str:
        return f"<Faulty {self._inner!r}>"

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._inner.capabilities

    def inventory(self) -> Iterable[BlockKey]:
        """See `Tier.inventory`."""
        return self._inner.inventory()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`; misbehaves."""
        passed = []
        for transfer in transfers:
            fault = self._fault(transfer)
            if fault == "raise":
                raise RuntimeError("injected")
            if fault == "block":
                time.sleep(2)
            if fault == "error":
                self._held.append((0, Completion(transfer.ticket, Outcome.FAILED, Reason.ERROR)))
            elif fault == "lie" and transfer.op is Op.LOAD:
                self._held.append((0, Completion(transfer.ticket, Outcome.DONE)))
            elif fault != "hang":
                passed.append(transfer)
                if fault:
                    self._faults[transfer.ticket] = (fault, transfer)
        self._inner.submit(passed)

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`; misbehaves."""
        now_s = time.monotonic()
        out = [completion for due_s, completion in self._held if due_s <= now_s]
        self._held = [(due_s, c) for due_s, c in self._held if due_s > now_s]
        for completion in self._inner.poll():
            fault, transfer = self._faults.pop(completion.ticket, (None, None))
            if fault == "late":
                self._held.append((now_s + 1, completion))
                continue
            if fault == "flip" and transfer and transfer.op is Op.LOAD and transfer.region:
                view = transfer.region.view()
                view[self._random.randrange(len(view))] ^= 1 << self._random.randrange(8)
            out += [completion] * (2 if fault == "twice" else 1)
        return out

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        self._inner.discard(keys)

    def close(self) -> None:
        """See `Tier.close`."""
        self._inner.close()
