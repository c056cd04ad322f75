"""What is learned: how soon objects of a class are used again, and what holding one is worth.

    worth(class, age) = max over t of   P(used before age + t) / E(time held until then)

That is the hit density of an object: hits for each unit of room and time (Beckmann, Chen, Cidon, NSDI 2018),
as a Gittins index: of all times to give up, the best. Rates of use are counted for each class and bin of age,
over objects that are there and over ghosts, so nothing depends on what the policy itself evicts. A clock
counts accesses.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final

__all__ = ["CLASSES", "CONTEXTS", "LEVELS", "NEW", "Model"]

LEVELS: Final = 4
"""Classes by accesses so far: one, two, three, more."""
CONTEXTS: Final = 5
"""Classes by the prompt that an object was offered with, see `Adaptive.offered`."""
CLASSES: Final = LEVELS * CONTEXTS
NEW: Final = CONTEXTS - 2
"""The context of a prompt of which nothing was known; also where nobody says what is offered together."""
_BINS: Final = 24
_PRIOR_HITS: Final = 8.0
"""What is assumed weighs as much as so many uses that were seen."""
_PRIOR_CHANCE: Final = 0.3
"""Of being used before the age has doubled: recently used objects are used first, as LRU assumes."""
_LEAST_RATE: Final = 1e-12
_HALF_LIFE_ROOMS: Final = 128
"""After so many accesses, in rooms of the cache, what was counted weighs half."""


class Model:
    """Rates of use by class and age, and the worth that follows.

    Args:
        room: Objects that the cache has room for.
        first: Accesses that the youngest bin of age takes.
        span: Accesses up to which objects are watched.
    """

    def __init__(self, room: int, first: int, span: int) -> None:
        growth = (span / first) ** (1 / (_BINS - 1))
        self.edges = [0.0, *(first * growth**at for at in range(_BINS))]
        """Ages at which bins begin."""
        self.last_bin = _BINS
        self.hits = [[0.0] * (_BINS + 1) for _ in range(CLASSES)]
        """For each class and bin: uses seen."""
        self.watched = [[0.0] * (_BINS + 1) for _ in range(CLASSES)]
        """For each class and bin: objects watched, times accesses."""
        self._widths = [b - a for a, b in zip(self.edges, self.edges[1:], strict=False)] + [float(span)]
        middles = [edge + width / 2 for edge, width in zip(self.edges, self._widths, strict=True)]
        self._assumed = [_PRIOR_CHANCE / (middle + room / 8) for middle in middles]
        self._half_life = _HALF_LIFE_ROOMS * room
        self._since = 0
        self.worth: list[list[float]] = []
        """For each class and bin."""
        self.learn(0)

    def __repr__(self) -> str:
        return f"<Model of {sum(map(sum, self.hits)):.0f} uses>"

    def bin_of(self, age: float) -> int:
        """Give the bin that an age falls in."""
        return bisect_right(self.edges, age) - 1

    def learn(self, accesses: int) -> None:
        """Take the worth from what was counted, and let what was counted fade by so many accesses."""
        every_hits, every_watched = _sums(self.hits), _sums(self.watched)
        rates = _rates(every_hits, every_watched, self._assumed)
        worth = []
        for level in range(LEVELS):
            classes = range(level * CONTEXTS, (level + 1) * CONTEXTS)
            hits = _sums([self.hits[each] for each in classes])
            watched = _sums([self.watched[each] for each in classes])
            usual = _rates(hits, watched, rates)
            worth += [
                _densities(_rates(self.hits[each], self.watched[each], usual), self._widths)
                for each in classes
            ]
        self.worth = worth
        kept = 0.5 ** (accesses / self._half_life)
        for rows in (self.hits, self.watched):
            rows[:] = [[count * kept for count in row] for row in rows]


def _sums(rows: list[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _rates(hits: list[float], watched: list[float], usual: list[float]) -> list[float]:
    """Give uses an access for each bin; where little was seen, what is usual."""
    return [
        min(1.0, max(_LEAST_RATE, (count + _PRIOR_HITS) / (time + _PRIOR_HITS / rate)))
        for count, time, rate in zip(hits, watched, usual, strict=True)
    ]


def _densities(rates: list[float], widths: list[float]) -> list[float]:
    """Give the Gittins index at the begin of each bin."""
    lasts = [math.exp(-rate * width) for rate, width in zip(rates, widths, strict=True)]
    best = [0.0] * len(rates)
    for begin in range(len(rates)):
        there, used, held = 1.0, 0.0, 0.0
        for rate, last in zip(rates[begin:], lasts[begin:], strict=True):
            used += there * (1 - last)
            held += there * (1 - last) / rate
            there *= last
            best[begin] = max(best[begin], used / held)
    return best
