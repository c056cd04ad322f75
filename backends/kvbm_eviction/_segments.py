"""Objects in segments: those of one class that were used at about the same time.

    class 0   ▢▢▢▢▢▢▢▢  ▢▢▢▢  ▢▢▢  ▢▢  ▢      one segment for each bin of age: older ones have merged
    class 1   ▢▢▢▢  ▢  ▢▢                     the segment of the least worth gives up its objects first,
                                              in the order in which they were used

So an eviction compares some hundred segments at any number of objects, and that seldom.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from itertools import islice

from kvbm_core import BlockKey

__all__ = ["Segment", "Segments", "Worth"]


class Segment:
    """Objects of one class and of about one age.

    A segment that is closed has them backwards, because a dictionary gives up its last key at once.
    """

    __slots__ = ("born", "into", "is_open", "keys", "kind", "number", "watched")

    def __init__(self, number: int, kind: int, born: float) -> None:
        self.number = number
        self.kind = kind
        """The class."""
        self.born = born
        """When its objects were used, on the clock of accesses: the mean."""
        self.keys: dict[BlockKey, int] = {}
        """The objects that are there, and the bytes that each takes."""
        self.watched = 0
        """Those that are there, and ghosts."""
        self.is_open = True
        self.into: Segment | None = None
        """The one it has merged into."""

    def __repr__(self) -> str:
        return f"<Segment {self.number}: class {self.kind}, since {self.born:.0f}, {len(self.keys)} objects>"

    def close(self) -> None:
        """Take no more objects."""
        if self.is_open:
            self.is_open = False
            self.keys = dict(reversed(self.keys.items()))

    def take_in(self, older: Segment) -> None:
        """Merge with an older one."""
        total = self.watched + older.watched
        self.born = (self.born * self.watched + older.born * older.watched) / total
        self.watched = total
        self.keys.update(older.keys)
        older.into, older.keys, older.watched = self, {}, 0

    @property
    def final(self) -> Segment:
        """The one that has its objects now."""
        found = self
        while found.into is not None:
            found = found.into
        if found is not self:
            self.into = found
        return found


Worth = Callable[[Segment], float]
"""Says what the objects of a segment are worth, for each; the least goes first."""


class Segments:
    """All segments, and which gives up objects next.

    Args:
        classes: How many there are.
        worth: Of the segments, until `rank` is given another.
    """

    def __init__(self, classes: int, worth: Worth) -> None:
        self._worth = worth
        self._of: list[list[Segment]] = [[] for _ in range(classes)]
        self._open: list[Segment | None] = [None] * classes
        self._by_number: dict[int, Segment] = {}
        self._numbers = 0
        self._ranks: list[tuple[float, float, int, Segment]] = []
        """Those that have objects, the next to give one up last: the worth, when it began, its number."""

    def __len__(self) -> int:
        return sum(map(len, self._of))

    def __iter__(self) -> Iterator[Segment]:
        for each in self._of:
            yield from each

    def open(self, kind: int, now: int) -> Segment:
        """Give the segment that takes the objects of a class that are used now."""
        found = self._open[kind]
        if found is None:
            found = self._open[kind] = self._made(kind, now)
        return found

    def beside(self, segment: Segment) -> Segment:
        """Make one of the same class and age; it gives up no objects until the next `rank`."""
        made = self._made(segment.kind, segment.born)
        made.is_open = False
        return made

    def find(self, number: int) -> Segment | None:
        """Give the segment that had a number, or has its objects now. None: they are not watched any more."""
        found = self._by_number.get(number)
        return found and found.final

    def add(self, segment: Segment, key: BlockKey, nbytes: int) -> None:
        """Put an object into a segment that is open."""
        if not segment.keys:
            insort(self._ranks, self._rank_of(segment))
        segment.keys[key] = nbytes

    def lowest(self) -> Segment | None:
        """Give the segment whose objects are worth least. None: there are no objects."""
        ranks = self._ranks
        while ranks and not ranks[-1][3].keys:
            ranks.pop()
        return ranks[-1][3] if ranks else None

    def next_victims(self, count: int) -> list[BlockKey]:
        """Give so many objects at most that are worth least, the least first."""
        found: list[BlockKey] = []
        for *_, segment in reversed(self._ranks):
            keys = segment.keys if segment.is_open else reversed(segment.keys)
            found += islice(keys, count - len(found))
            if len(found) >= count:
                break
        return found

    def close(self, segment: Segment) -> None:
        """Have a segment take no more objects."""
        if segment.is_open:
            segment.close()
            self._open[segment.kind] = None

    def merge(self, bin_of: Callable[[float], int], last_bin: int, now: int) -> None:
        """Close all, merge those of one class and one bin of age, and forget ghosts that are too old."""
        for kind, row in enumerate(self._of):
            self._open[kind] = None
            row.sort(key=lambda each: each.born)
            kept: list[Segment] = []
            last = -1
            for segment in row:
                segment.close()
                at = bin_of(now - segment.born)
                if not segment.watched or (at == last_bin and not segment.keys):
                    continue
                if at == last and at:
                    segment.take_in(kept.pop())
                kept.append(segment)
                last = at
            self._of[kind] = kept

    def tidy(self) -> None:
        """Forget the numbers of segments that are not watched any more."""
        alive = {id(segment) for segment in self}
        self._by_number = {
            number: final for number, each in self._by_number.items() if id(final := each.final) in alive
        }

    def rank(self, worth: Worth) -> None:
        """Order all by what they are worth now."""
        self._worth = worth
        self._ranks = sorted(self._rank_of(segment) for segment in self if segment.keys)

    def _rank_of(self, segment: Segment) -> tuple[float, float, int, Segment]:
        return -self._worth(segment), -segment.born, segment.number, segment

    def _made(self, kind: int, born: float) -> Segment:
        self._numbers += 1
        made = self._by_number[self._numbers] = Segment(self._numbers, kind, born)
        self._of[kind].append(made)
        return made
