"""Whether what is loaded from a lower tier is kept above, by what such blocks were worth there before.

A slot above serves whoever comes back before its block is evicted. Blocks that come up from below compete
for it with those that were just computed. So the leader follows a sample of both, and stops to promote where
those that came up are loaded again from above much less often: then they only push others out, as in a loop
over more than fits above.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvbm_core.block import BlockKey

__all__ = ["Promotion"]

_SAMPLED: Final = 16
"""Of 256 keys so many are followed, and promoted also while the others are not."""
_MOST_FOLLOWED: Final = 8192
_MEMORY: Final = 512
"""Ends of followed blocks after which the counts are halved."""
_MIN_ENDS: Final = 64
"""Before so many ends nothing is concluded."""
_FRACTION: Final = 0.5
"""Of the worth of computed blocks: promoted ones that are worth less are not kept above."""


@dataclass(slots=True)
class _Followed:
    """A sample of blocks in the tier above, from when they came there until they were loaded or evicted."""

    keys: dict[BlockKey, None] = field(default_factory=dict)
    used: int = 0
    ended: int = 0

    def end(self, keys: Iterable[BlockKey], *, used: bool) -> None:
        for key in keys:
            if key in self.keys:
                del self.keys[key]
                self.ended += 1
                self.used += used
        if self.ended > _MEMORY:
            self.ended, self.used = self.ended // 2, self.used // 2

    def begin(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            if len(self.keys) < _MOST_FOLLOWED:
                self.keys[key] = None

    @property
    def worth(self) -> float | None:
        """The part that was loaded from above before it was evicted. None: not known."""
        return self.used / self.ended if self.ended >= _MIN_ENDS else None


class Promotion:
    """Chooses which blocks of a lower tier the tier above keeps."""

    def __init__(self) -> None:
        self._promoted = _Followed()
        self._computed = _Followed()

    def __repr__(self) -> str:
        return f"<Promotion: worth {self._promoted.worth}, of computed blocks {self._computed.worth}>"

    @property
    def is_worth_it(self) -> bool:
        """True unless promoted blocks were loaded again from above much less often than computed ones."""
        promoted, computed = self._promoted.worth, self._computed.worth
        if promoted is None or computed is None:
            return True
        return promoted > 0 and promoted >= _FRACTION * computed

    def chosen(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Choose among blocks that are loaded from below those that are kept above."""
        return list(keys) if self.is_worth_it else _sample(keys)

    def kept(self, keys: Iterable[BlockKey], *, computed: bool) -> None:
        """Take in which blocks the tier above keeps, loaded from below or computed."""
        (self._computed if computed else self._promoted).begin(_sample(keys))

    def loaded_above(self, keys: Iterable[BlockKey]) -> None:
        """Take in blocks that are loaded from the tier above."""
        self._end(_sample(keys), used=True)

    def evicted_above(self, keys: Iterable[BlockKey]) -> None:
        """Take in blocks that the tier above has evicted."""
        self._end(_sample(keys), used=False)

    def _end(self, keys: list[BlockKey], *, used: bool) -> None:
        self._promoted.end(keys, used=used)
        self._computed.end(keys, used=used)


def _sample(keys: Iterable[BlockKey]) -> list[BlockKey]:
    return [key for key in keys if key[0] < _SAMPLED]
