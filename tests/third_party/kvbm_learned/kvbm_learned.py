"""Learns which objects are used again, and how soon, and keeps what earns most for each byte.

    worth = age + chance of use / (length * distance of use)

The frame is Greedy-Dual-Size-Frequency (Cherkasova 1998): the object of the least worth goes, and the age
rises to its worth, so that what is not used any more sinks. Chance and distance are not counted for each
object: they are learned online for each class of objects of similar length and number of uses, from every use
and eviction.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Sequence
from dataclasses import dataclass

import kvbm_core as kvbm

__all__ = ["Learned", "LearnedConfig", "kvbm_policies"]

_SPARED_AT_ONCE = 64
"""Protected objects passed over in one eviction, beside `_SPARED_EACH` for each victim."""
_SPARED_EACH = 8
_ASIDE_EVICTIONS = 256
"""Protected objects that were met wait for so many evictions before they are candidates again."""
_MOST_USES = 7
"""More are one class."""
_STALE_FACTOR = 3
"""Entries of the heap, for each object, above which it is made anew."""


class LearnedConfig(kvbm.PolicyConfig, frozen=True):
    """Settings of `Learned`.

    Raises:
        ConfigError: If the rate is out of range.
    """

    rate: float = 0.05
    """How fast it learns: the weight of the latest outcome, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise kvbm.ConfigError(f"rate: {self.rate!r}; write a number above 0 and at most 1, like 0.05")


@dataclass(slots=True)
class _Class:
    """What is known of objects of similar length and number of uses."""

    chance: float = 0.5
    """Of being used again before eviction."""
    distance: float = 1.0
    """Capacities of new objects between two uses."""


@dataclass(slots=True)
class _Object:
    nbytes: int
    uses: int
    since_bytes: int
    """On the clock of `Learned`: when it was used last."""
    entry: int
    """The number of its entry in the heap; others of its are stale."""


class Learned(kvbm.EvictionPolicy):
    """A heap of objects by worth."""

    def __init__(self, capacity_bytes: int, usual_bytes: int, rate: float) -> None:
        self._capacity_bytes = max(1, capacity_bytes)
        self._usual_bytes = usual_bytes
        self._rate = rate
        self._objects: dict[kvbm.BlockKey, _Object] = {}
        self._classes: dict[tuple[int, int], _Class] = {}
        self._heap: list[tuple[float, int, kvbm.BlockKey]] = []
        self._aside: list[tuple[float, int, kvbm.BlockKey]] = []
        self._age = 0.0
        self._clock_bytes = 0
        """Bytes of all objects inserted so far."""
        self._entries = 0
        self._evictions = 0

    def __repr__(self) -> str:
        return f"<Learned {len(self._objects)} objects, age {self._age:.3g}, {len(self._classes)} classes>"

    def insert(self, key: kvbm.BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`."""
        self._clock_bytes += nbytes
        self._objects[key] = _Object(nbytes, 0, self._clock_bytes, 0)
        self._push(key)

    def touch(self, key: kvbm.BlockKey) -> None:
        """See `EvictionPolicy.touch`. Its class was right to hope for it."""
        found = self._objects[key]
        known = self._class_of(found)
        distance = (self._clock_bytes - found.since_bytes) / self._capacity_bytes
        known.chance += self._rate * (1 - known.chance)
        known.distance += self._rate * (distance - known.distance)
        found.uses += 1
        found.since_bytes = self._clock_bytes
        self._push(key)

    def remove(self, key: kvbm.BlockKey) -> None:
        """See `EvictionPolicy.remove`. Nothing is learned by it."""
        del self._objects[key]

    def evict(self, nbytes: int, protected: Container[kvbm.BlockKey]) -> Sequence[kvbm.BlockKey]:
        """See `EvictionPolicy.evict`."""
        self._evictions += 1
        if not self._heap or self._evictions % _ASIDE_EVICTIONS == 0:
            self._take_back()
        victims: list[kvbm.BlockKey] = []
        met: list[tuple[float, int, kvbm.BlockKey]] = []
        spared = _SPARED_AT_ONCE
        while nbytes > 0 and spared and self._next():
            worth, entry, key = heapq.heappop(self._heap)
            if key in protected:
                met.append((worth, entry, key))
                spared -= 1
                continue
            found = self._objects.pop(key)
            known = self._class_of(found)
            known.chance -= self._rate * known.chance
            self._age = max(self._age, worth)
            nbytes -= found.nbytes
            victims.append(key)
            spared += _SPARED_EACH
        self._aside += met
        return victims

    def _next(self) -> bool:
        """Bring a known object to the top of the heap; where it has none, those set aside."""
        while True:
            while self._heap and self._is_stale(self._heap[0]):
                heapq.heappop(self._heap)
            if self._heap or not self._aside:
                return bool(self._heap)
            self._take_back()

    def _take_back(self) -> None:
        self._heap = [each for each in self._heap + self._aside if not self._is_stale(each)]
        self._aside = []
        heapq.heapify(self._heap)

    def _is_stale(self, each: tuple[float, int, kvbm.BlockKey]) -> bool:
        found = self._objects.get(each[2])
        return found is None or found.entry != each[1]

    def _class_of(self, found: _Object) -> _Class:
        name = found.nbytes.bit_length(), min(found.uses, _MOST_USES)
        known = self._classes.get(name)
        if known is None:
            known = self._classes[name] = _Class()
        return known

    def _push(self, key: kvbm.BlockKey) -> None:
        found = self._objects[key]
        known = self._class_of(found)
        worth = self._age + known.chance * self._usual_bytes / (found.nbytes * (known.distance + 0.01))
        self._entries += 1
        found.entry = self._entries
        heapq.heappush(self._heap, (worth, found.entry, key))
        if len(self._heap) + len(self._aside) > _STALE_FACTOR * len(self._objects) + 64:
            self._take_back()


def _make(config: LearnedConfig, context: kvbm.PolicyContext) -> Learned:
    return Learned(context.capacity_bytes, context.usual_bytes, config.rate)


@kvbm.hookimpl
def kvbm_policies() -> Sequence[kvbm.Policy]:
    """Offer the policy ``learned``."""
    return [kvbm.Policy("learned", LearnedConfig, _make, contract_version=2)]
