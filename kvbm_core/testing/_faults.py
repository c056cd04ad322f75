"""A tier that misbehaves on command."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Final

from kvbm_core.layers import ForwardTier
from kvbm_core.tier import Completion, Op, Outcome, Reason, Tier, Transfer

__all__ = ["FaultyTier"]


class FaultyTier(ForwardTier):
    """Wraps a tier; `fault` decides, for each transfer, what goes wrong.

    ========== ==================================================================
    ``error``   completes FAILED with reason ERROR
    ``full``    a store completes FAILED with reason FULL, as on a full disk
    ``hang``    never completes
    ``late``    completes `late_s` later
    ``twice``   completes twice
    ``flip``    one bit of a load is wrong
    ``short``   the second half of a load is not written, and it says DONE
    ``lie``     a load says DONE and reads nothing
    ``raise``   `submit` raises RuntimeError
    ``block``   `submit` sleeps for two seconds
    ========== ==================================================================

    Args:
        inner: The tier that does the work.
        fault: Given a transfer, names a fault or returns None for none.
        seed: Of the choice of bits and of the order.
        late_s: Seconds, for ``late``.
        reorder: Give completions in another order than they came, some a poll later.
    """

    def __init__(
        self,
        inner: Tier,
        fault: Callable[[Transfer], str | None],
        seed: float = 0,
        *,
        late_s: float = 1.0,
        reorder: bool = False,
    ) -> None:
        super().__init__(inner)
        self._fault = fault
        self._random = random.Random(seed)
        self._late_s = late_s
        self._reorder = reorder
        self._faults: dict[int, tuple[str, Transfer, bytes]] = {}
        self._held: list[tuple[float, Completion]] = []

    def __repr__(self) -> str:
        return f"<Faulty {self._inner!r}>"

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`; misbehaves."""
        passed = []
        for transfer in transfers:
            fault = self._fault(transfer)
            if fault == "raise":
                raise RuntimeError("injected")
            if fault == "block":
                time.sleep(2)
            end = _END_AT_ONCE.get((fault, transfer.op)) or _END_AT_ONCE.get((fault, None))
            if end:
                self._held.append((0, Completion(transfer.ticket, *end)))
            elif fault != "hang":
                passed.append(transfer)
                if fault:
                    before = bytes(transfer.region.view()) if transfer.region else b""
                    self._faults[transfer.ticket] = (fault, transfer, before)
        self._inner.submit(passed)

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`; misbehaves."""
        now_s = time.monotonic()
        out = [completion for due_s, completion in self._held if due_s <= now_s]
        self._held = [(due_s, c) for due_s, c in self._held if due_s > now_s]
        for completion in self._inner.poll():
            fault, transfer, before = self._faults.pop(completion.ticket, (None, None, b""))
            if fault == "late":
                self._held.append((now_s + self._late_s, completion))
                continue
            if transfer and transfer.op is Op.LOAD and completion.outcome is Outcome.DONE:
                self._damage(fault, transfer, before, completion.nbytes)
            out += [completion] * (2 if fault == "twice" else 1)
        if self._reorder:
            self._random.shuffle(out)
            kept = self._random.randrange(len(out) + 1)
            self._held += [(0, completion) for completion in out[kept:]]
            out = out[:kept]
        return out

    def _damage(self, fault: str | None, transfer: Transfer, before: bytes, nbytes: int) -> None:
        assert transfer.region is not None
        view = transfer.region.view()[: nbytes or transfer.region.nbytes]
        if fault == "flip":
            view[self._random.randrange(len(view))] ^= 1 << self._random.randrange(8)
        if fault == "short":
            view[len(view) // 2 :] = before[len(view) // 2 : len(view)]


_END_AT_ONCE: Final[dict[tuple[str | None, Op | None], tuple[Outcome, Reason]]] = {
    ("error", None): (Outcome.FAILED, Reason.ERROR),
    ("full", Op.STORE): (Outcome.FAILED, Reason.FULL),
    ("lie", Op.LOAD): (Outcome.DONE, Reason.NONE),
}
