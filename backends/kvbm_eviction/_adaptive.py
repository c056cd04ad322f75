"""Learns which objects are used again, and follows that as long as it hits more than LRU."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

from kvbm_core import BlockKey, EvictionPolicy, Lru, Origin, PolicyContext
from kvbm_eviction._ghosts import Ghosts
from kvbm_eviction._model import CLASSES, CONTEXTS, LEVELS, NEW, Model
from kvbm_eviction._segments import Segment, Segments
from kvbm_eviction._shadows import Duel

__all__ = ["Adaptive"]

_SIZES: Final = 4
"""Of objects: as large as usual, half, a quarter, less. Each is twice as dear to keep as the next."""
_TICKS_A_ROOM: Final = 48
_LEAST_TICK: Final = 32
_LEARN_TICKS: Final = 8
_TIDY_TICKS: Final = 64
_WATCHED_ROOMS: Final = 128
"""Objects are watched for so many accesses, in rooms of the cache."""
_SAME_USE_ROOMS: Final = 1 / 16
"""A second use after so few accesses is of the same request."""
_SHADOW_ROOM: Final = 1024
_SPARED_AT_ONCE: Final = 64
"""Protected objects passed over in one eviction, beside `_SPARED_EACH` for each victim."""
_SPARED_EACH: Final = 8


def _class_after(kind: int, context: int) -> int:
    """Give the class of an object that is used once more, with a prompt of this sort."""
    size, before = divmod(kind, CLASSES)
    return size * CLASSES + min(before // CONTEXTS + 1, LEVELS - 1) * CONTEXTS + context


_AFTER: Final = [
    [_class_after(kind, context) for context in range(CONTEXTS)] for kind in range(_SIZES * CLASSES)
]
"""What `_class_after` gives, by kind and context."""


class Adaptive(EvictionPolicy):
    """Segments of objects by class and age; what a class and an age are worth is learned.

    The class of an object: how often it was used, and with what sort of prompt it was offered last.
    """

    def __init__(self, context: PolicyContext) -> None:
        room = max(1, context.capacity_bytes // context.usual_bytes)
        self._tick = max(_LEAST_TICK, room // _TICKS_A_ROOM)
        self._same_use = max(self._tick, int(room * _SAME_USE_ROOMS))
        self._model = Model(room, self._tick, max(_WATCHED_ROOMS * room, 64 * self._tick))
        self._ghosts = Ghosts(_WATCHED_ROOMS * room)
        self._segments = Segments(_SIZES * CLASSES, self._density)
        self._where: dict[BlockKey, Segment] = {}
        self._recent = Lru()
        """All objects as well, in the order of their use."""
        self._usual_bits = context.usual_bytes.bit_length()
        self._one_in = max(1, room // _SHADOW_ROOM)
        self._duel = Duel(
            max(1, room // self._one_in), self._model, CLASSES, self._density
        )  # fmt: skip
        self._clock = 0
        """Accesses so far."""
        self._next_tick, self._ticks = self._tick, 0
        self._context = NEW
        self._is_told = False
        """True once prompts were offered: then an object that comes in is not used by that."""

    def __repr__(self) -> str:
        leader = "density" if self._duel.follows_density else "lru"
        return f"<Adaptive {leader}: {len(self._where)} objects in {len(self._segments)} segments>"

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:
        """See `EvictionPolicy.offered`. Says what sort of prompt it is: how much of it was known."""
        self._is_told = True
        where, find, one_in = self._where, self._ghosts.find, self._one_in
        known = 0
        for key in keys:
            if key not in where and not find(key):
                break
            known += 1
        self._context = _context_of(known, len(keys), origin)
        self._recent.offered(keys, origin)
        sampled: list[BlockKey] = []
        kinds: list[int] = []
        for key in reversed(keys):
            segment = self._used(key, where[key].final) if key in where else self._seen(key)
            if one_in == 1 or not (key[0] | key[1] << 8) % one_in:
                sampled.append(key)
                kinds.append(segment.kind % CLASSES)
        if sampled:
            self._duel.offer(sampled[::-1], kinds[::-1], self._clock)
        if self._clock >= self._next_tick:
            self._turn()

    def touch(self, key: BlockKey) -> None:
        """See `EvictionPolicy.touch`. Where prompts are offered, uses are known from that."""
        self._recent.touch(key)
        if self._is_told:
            return
        segment = self._used(key, self._where[key].final)
        if self._is_sampled(key):
            self._duel.offer([key], [segment.kind % CLASSES], self._clock)
        if self._clock >= self._next_tick:
            self._turn()

    def insert(self, key: BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`."""
        number = self._ghosts.take(key)
        segment = self._segments.find(number) if number else None
        if not self._is_told or segment is None:
            segment = self._asked_for(key, segment)
        kind = segment.kind % CLASSES + self._size_of(nbytes) * CLASSES
        if not segment.is_open or kind != segment.kind:
            segment.watched -= 1
            segment = self._segments.open(kind, self._clock)
            segment.watched += 1
        self._segments.add(segment, key, nbytes)
        self._where[key] = segment
        self._recent.insert(key, nbytes)
        if self._clock >= self._next_tick:
            self._turn()

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy.remove`."""
        self._recent.remove(key)
        segment = self._where.pop(key).final
        del segment.keys[key]
        segment.watched -= 1

    def admits(self, key: BlockKey, nbytes: int) -> bool:
        """See `EvictionPolicy.admits`. No, where what would have to go is worth more."""
        segment = self._watching(key) if self._is_told else self._seen(key)
        lowest = self._segments.lowest()
        if lowest is None or not self._duel.follows_density:
            return True
        worth = self._model.worth[segment.kind % CLASSES][0] * (1 << self._size_of(nbytes))
        return worth > self._density(lowest)

    def next_victims(self, count: int) -> Sequence[BlockKey]:
        """See `EvictionPolicy.next_victims`."""
        if self._duel.follows_density:
            return self._segments.next_victims(count)
        return self._recent.next_victims(count)

    def evict(self, nbytes: int, protected: Container[BlockKey]) -> Sequence[BlockKey]:
        """See `EvictionPolicy.evict`."""
        if self._duel.follows_density:
            return self._evict_least_worth(nbytes, protected)
        victims = self._recent.evict(nbytes, protected)
        for key in victims:
            segment = self._where.pop(key).final
            del segment.keys[key]
            self._remember(self._ghosts.place(key), segment)
        return victims

    def _evict_least_worth(self, nbytes: int, protected: Container[BlockKey]) -> Sequence[BlockKey]:
        victims: list[BlockKey] = []
        spared, has_ranked = _SPARED_AT_ONCE, False
        while nbytes > 0 and spared > 0:
            segment = self._segments.lowest()
            if segment is None:
                if has_ranked:
                    break
                self._segments.rank(self._density)
                has_ranked = True
                continue
            self._segments.close(segment)
            key, freed = segment.keys.popitem()
            if key in protected:
                aside = self._segments.beside(segment)
                segment.watched -= 1
                aside.watched += 1
                aside.keys[key] = freed
                self._where[key] = aside
                spared -= 1
                continue
            del self._where[key]
            self._recent.remove(key)
            self._remember(self._ghosts.place(key), segment)
            victims.append(key)
            nbytes -= freed
            spared += _SPARED_EACH
        return victims

    def _is_same_use(self, segment: Segment, age: float) -> bool:
        """Guess that it is still the same request, or one beside it."""
        return segment.is_open or age <= self._same_use

    def _is_sampled(self, key: BlockKey) -> bool:
        return self._one_in == 1 or not (key[0] | key[1] << 8) % self._one_in

    def _used(self, key: BlockKey, segment: Segment) -> Segment:
        """Move a known object to the segment of those that are used now."""
        age = self._clock - segment.born
        if self._is_same_use(segment, age):
            if segment.is_open:
                segment.keys[key] = segment.keys.pop(key)
            return segment
        nbytes = segment.keys.pop(key)
        now = self._access(segment, age)
        self._segments.add(now, key, nbytes)
        self._where[key] = now
        return now

    def _seen(self, key: BlockKey) -> Segment:
        """Note that somebody asks for an object that is not there, and give the segment that watches it."""
        place = self._ghosts.place(key)
        number = self._ghosts.at(place)
        before = self._segments.find(number) if number else None
        segment = self._asked_for(key, before)
        if segment is not before:
            self._remember(place, segment)
        return segment

    def _watching(self, key: BlockKey) -> Segment:
        """Give the segment that watches an object that was offered."""
        number = self._ghosts.find(key)
        return (self._segments.find(number) if number else None) or self._seen(key)

    def _asked_for(self, key: BlockKey, before: Segment | None) -> Segment:
        """Count the use of an object that is not there, unless it is of the same request."""
        if before is None:
            segment = self._access(None, 0.0)
        else:
            age = self._clock - before.born
            segment = before if self._is_same_use(before, age) else self._access(before, age)
        if not self._is_told and self._is_sampled(key):
            self._duel.offer([key], [segment.kind % CLASSES], self._clock)
        return segment

    def _access(self, before: Segment | None, age: float) -> Segment:
        """Count a use, and give the segment of those that are used now."""
        kind = self._context
        if before is not None:
            before.watched -= 1
            self._model.hits[before.kind % CLASSES][self._model.bin_of(age)] += 1
            kind = _AFTER[before.kind][kind]
        segment = self._segments.open(kind, self._clock)
        segment.watched += 1
        self._clock += 1
        return segment

    def _remember(self, place: tuple[int, int], segment: Segment) -> None:
        """Keep a ghost."""
        before = self._ghosts.put(place, segment.number)
        if before and (lost := self._segments.find(before)) is not None:
            lost.watched -= 1

    def _turn(self) -> None:
        """Count what is watched, learn from it, and rank all segments anew."""
        model, now = self._model, self._clock
        elapsed = now - self._next_tick + self._tick
        for segment in self._segments:
            model.watched[segment.kind % CLASSES][model.bin_of(now - segment.born)] += (
                segment.watched * elapsed
            )
        self._segments.merge(model.bin_of, model.last_bin, now)
        self._ticks += 1
        if not self._ticks % _LEARN_TICKS:
            model.learn(_LEARN_TICKS * self._tick)
        if not self._ticks % _TIDY_TICKS:
            self._segments.tidy()
        self._segments.rank(self._density)
        self._next_tick = now + self._tick

    def _density(self, segment: Segment) -> float:
        """Give what the objects of a segment are worth now, for each byte."""
        size, kind = divmod(segment.kind, CLASSES)
        return self._model.worth[kind][self._model.bin_of(self._clock - segment.born)] * (1 << size)

    def _size_of(self, nbytes: int) -> int:
        return max(0, min(_SIZES - 1, self._usual_bits - nbytes.bit_length()))


def _context_of(known: int, count: int, origin: Origin) -> int:
    """Give the class of a prompt: how much of it was known. What is generated is a class of its own."""
    if origin.is_generated:
        return CONTEXTS - 1
    fresh = (count - known) / count
    if fresh < 0.06:
        return 0
    if fresh < 0.25:
        return 1
    return 2 if known > 1 else NEW
