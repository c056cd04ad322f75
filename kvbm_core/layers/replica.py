"""Ranks that hold the same bytes: one of them writes into a shared tier."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvbm_core.layers.forward import ForwardTier
from kvbm_core.tier import Completion, Op, Outcome, Tier, Transfer

__all__ = ["ReplicaTier"]


class ReplicaTier(ForwardTier):
    """Leaves writing to another rank that holds the same bytes.

    Behaviour:
        - A store completes DONE and writes nothing. A block counts as stored when every rank has said
          so, and the one that writes says it last or first.
    """

    def __init__(self, inner: Tier, wake: Callable[[], None]) -> None:
        super().__init__(inner)
        self._wake = wake
        self._left: list[Completion] = []

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        self._inner.submit([transfer for transfer in transfers if transfer.op is not Op.STORE])
        self._left += [Completion(t.ticket, Outcome.DONE) for t in transfers if t.op is Op.STORE]
        self._wake()

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        left, self._left = self._left, []
        return [*left, *self._inner.poll()]
