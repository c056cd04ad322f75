"""Shadow caches: what a small part of the objects would hit under each way to rank them.

One object in n is sampled, and the room is n times smaller, so a shadow misses as the whole cache would
(Waldspurger and others, ATC 2017). It has keys and no bytes.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Final

from kvbm_core import BlockKey, Lru, Origin
from kvbm_eviction._model import Model
from kvbm_eviction._segments import Segment, Segments, Worth

__all__ = ["DensityShadow", "Duel", "PlainShadow"]

_TICKS_A_ROOM: Final = 32
_LEAST_TICK: Final = 32
_MARGIN: Final = 0.004
"""So many more of all uses must be hits, in the latest that count, before what is learned is followed."""
_LATEST_ROOMS: Final = 4
"""After so many uses, in rooms of a shadow cache, what was hit counts half."""
_MOST_DEBT: Final = 0.003
"""Hits that what is learned may have lost to LRU since it was best, as a part of all uses so far; and"""
_FEW_ROOMS: Final = 0.01
"""so many more, in rooms of a shadow cache; so many more must it have hit as well before it is followed."""


class PlainShadow:
    """A cache of keys under LRU."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._order = Lru()
        self.hits = 0.0
        """Those that count."""

    def __repr__(self) -> str:
        return f"<PlainShadow {len(self._order)} of {self._room} objects, {self.hits:.0f} hits>"

    def offer(self, keys: Sequence[BlockKey]) -> None:
        """Ask for a prompt's objects, in its order, and store those that are not there."""
        order = self._order
        self.hits += _leading(keys, order)
        order.offered(keys, Origin())
        absent = [key for key in keys if key not in order]
        if (excess := len(order) + len(absent) - self._room) > 0:
            order.evict(excess, set(keys))
            del absent[self._room - len(order) :]
        for key in reversed(absent):
            order.insert(key, 1)


class DensityShadow:
    """A cache of keys that keeps what is worth most.

    Args:
        room: Objects that it has room for.
        classes: Of objects.
        worth: What they are worth.
    """

    def __init__(self, room: int, classes: int, worth: Worth) -> None:
        self._room, self._worth = room, worth
        self._segments = Segments(classes, worth)
        self._where: dict[BlockKey, Segment] = {}
        self.hits = 0.0
        """Those that count."""

    def __repr__(self) -> str:
        return f"<DensityShadow {len(self._where)} of {self._room} objects, {self.hits:.0f} hits>"

    def offer(self, keys: Sequence[BlockKey], kinds: Sequence[int], now: int) -> None:
        """Ask for a prompt's objects, and store those that are not there, as far as they are let in.

        Args:
            keys: In the order of the prompt.
            kinds: The classes that they are of from now on.
            now: On the clock of accesses.
        """
        where = self._where
        self.hits += _leading(keys, where)
        absent: list[tuple[BlockKey, int]] = []
        for key, kind in zip(reversed(keys), reversed(kinds), strict=True):
            if key in where:
                segment = where[key].final
                del segment.keys[key]
                segment.watched -= 1
                self._put(key, kind, now)
            else:
                absent.append((key, kind))
        room = self._room - len(where)
        let_in = 0
        for _, kind in reversed(absent):
            if let_in >= room:
                if not self._makes_room(kind, now):
                    break
                room += 1
            let_in += 1
        for key, kind in absent[len(absent) - let_in :]:
            self._put(key, kind, now)

    def _makes_room(self, kind: int, now: int) -> bool:
        """Have an object go for one of a class; False if none is worth less."""
        lowest = self._segments.lowest()
        if lowest is None or (lowest.is_open and lowest.born == now):
            return False
        if self._worth(Segment(0, kind, now)) <= self._worth(lowest):
            return False
        self._segments.close(lowest)
        del self._where[lowest.keys.popitem()[0]]
        lowest.watched -= 1
        return True

    def _put(self, key: BlockKey, kind: int, now: int) -> None:
        segment = self._segments.open(kind, now)
        segment.watched += 1
        self._segments.add(segment, key, 1)
        self._where[key] = segment

    def tick(self, model: Model, now: int) -> None:
        """Rank all objects anew."""
        self._segments.merge(model.bin_of, model.last_bin, now)
        self._segments.rank(self._worth)
        self._segments.tidy()


class Duel:
    """Two shadow caches, and which of them has hit more lately.

    Args:
        room: Objects that each has room for.
        model: What is learned of all objects.
        classes: Of objects.
        worth: What they are worth.
    """

    def __init__(self, room: int, model: Model, classes: int, worth: Worth) -> None:
        self._model = model
        self._plain = PlainShadow(room)
        self._density = DensityShadow(room, classes, worth)
        self._tick = max(_LEAST_TICK, room // _TICKS_A_ROOM)
        self._latest = _LATEST_ROOMS * room
        self._few = _FEW_ROOMS * room
        self._until_tick = self._tick
        self._uses = 0.0
        """Those that count."""
        self._all_uses = 0
        self._last_lead = self._debt = 0.0
        self.follows_density = False
        """True while what is learned hits more than LRU."""

    def __repr__(self) -> str:
        return f"<Duel of {self._plain!r} and {self._density!r}, {self._uses:.0f} uses>"

    def offer(self, keys: Sequence[BlockKey], kinds: Sequence[int], now: int) -> None:
        """Have both see what a prompt asks for, see `DensityShadow.offer`."""
        self._plain.offer(keys)
        self._density.offer(keys, kinds, now)
        self._uses += len(keys)
        self._all_uses += len(keys)
        self._until_tick -= len(keys)
        if self._until_tick <= 0:
            self._decide(now)

    def _decide(self, now: int) -> None:
        lead = self._density.hits - self._plain.hits
        self._debt = max(0.0, self._debt - (lead - self._last_lead))
        bearable = _MOST_DEBT * self._all_uses + self._few
        if lead < 0 or self._debt > bearable:
            self.follows_density = False
        elif lead > _MARGIN * self._uses + self._few and self._debt <= bearable / 2:
            self.follows_density = True
        kept = 0.5 ** (self._tick / self._latest)
        self._uses *= kept
        self._plain.hits *= kept
        self._density.hits *= kept
        self._last_lead = lead * kept
        self._density.tick(self._model, now)
        self._until_tick = self._tick


def _leading(keys: Sequence[BlockKey], there: Container[BlockKey]) -> int:
    """Count the leading keys that are there: of a prefix no more can be used."""
    return next((at for at, key in enumerate(keys) if key not in there), len(keys))
