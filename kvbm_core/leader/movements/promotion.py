"""Whether what is loaded from a lower tier is kept above, by what such blocks were worth there before.

A slot above serves whoever comes back before its block is evicted. Blocks that come up from below compete
for it with those that were just computed. So the leader follows a sample of both, and stops to promote where
those that came up are loaded again from above much less often: then they only push others out, as in a loop
over more than fits above. It tries again after a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvbm_core.block import BlockKey

__all__ = ["Promotion"]

_SAMPLED: Final = 16
"""Of 256 keys so many are followed."""
_MOST_FOLLOWED: Final = 8192
_MEMORY: Final = 512
"""Ends of followed blocks after which the counts are halved."""
_MIN_ENDS: Final = 64
"""Before so many ends nothing is concluded."""
_FRACTION: Final = 0.5
_LEAST: Final = 0.05
"""Promoted blocks worth less than that, or than this fraction of computed ones, do not stay above."""
_FIRST_PAUSE: Final = 4096
_LONGEST_PAUSE: Final = 1 << 18
"""So many blocks are not kept above then; each trial that fails doubles it."""


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
        self._pause = _FIRST_PAUSE
        self._left = 0
        """Blocks that are not kept before the next trial."""

    def __repr__(self) -> str:
        worths = f"worth {self._promoted.worth}, of computed blocks {self._computed.worth}"
        return f"<Promotion: {worths}, pauses for {self._left} blocks>"

    @property
    def is_paused(self) -> bool:
        """True while nothing is kept above."""
        return self._left > 0

    def chosen(self, keys: Sequence[BlockKey]) -> Sequence[BlockKey]:
        """Choose among blocks that are loaded from below those that are kept above: all or none."""
        if self._left > 0:
            self._left -= len(keys)
            return ()
        worth = self._promoted.worth
        if worth is None:
            return keys
        if worth >= max(_LEAST, _FRACTION * (self._computed.worth or 0.0)):
            self._pause = _FIRST_PAUSE
            return keys
        self._left, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        self._promoted = _Followed()
        return ()

    def came_above(self, keys: Iterable[BlockKey], *, computed: bool) -> None:
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
