"""The policies that come with the core: least recently used, and first in, first out."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.hookspecs import hookimpl
from kvbm_core.policy import EvictionPolicy, Origin, Policy, PolicyConfig, PolicyContext

__all__ = ["Fifo", "Lru", "kvbm_policies"]

_CANDIDATES: Final = 64
_CANDIDATES_PART: Final = 256
"""So many are taken from the front of the order at once, or so small a part of all if that is more: the way
to the front is as long as many objects have gone from there."""
_MOST_HEADS: Final = 64
"""Prompts of which the head is remembered until their tail has come."""
_SPARED_AT_ONCE: Final = 64
"""Protected objects passed over in one eviction, beside `_SPARED_EACH` for each victim; the next eviction
goes on behind them."""
_SPARED_EACH: Final = 8


class NoSettings(PolicyConfig, frozen=True):
    """A policy without settings."""


class Fifo(dict[BlockKey, int], EvictionPolicy):
    """First in, first out. Every operation takes the same time at any number of objects.

    It *is* a dictionary of the bytes that each object takes, the next victim first: to ask whether an object
    is there costs no Python call, and a million take 42 bytes each.

    Protected objects at the front go to the end when they are met, so that each is met once in a round.
    """

    is_told_all = False
    """True if `offered` wants to know of prompts of which the tier has nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        """That all take."""
        self._candidates: dict[BlockKey, None] = {}
        """From the front, the next victim last: a dictionary gives up its last key at once, and finds its
        first one slowly once many before it are gone."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)} objects, {self.nbytes} bytes>"

    def insert(self, key: BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`."""
        self[key] = nbytes
        self.nbytes += nbytes

    def insert_each(self, sizes: Mapping[BlockKey, int]) -> None:
        """Take objects in that the tier holds now, in this order, each with the bytes that it takes."""
        self.update(sizes)
        self.nbytes += sum(sizes.values())

    def touch(self, key: BlockKey) -> None:
        """See `EvictionPolicy.touch`."""

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:
        """See `EvictionPolicy.offered`. The head of a prefix is the most recently used, so it goes last."""
        for key in reversed(keys):
            if key in self:
                self.touch(key)

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy.remove`."""
        self.nbytes -= self.pop(key)
        self._candidates.pop(key, None)

    def next_victims(self, count: int) -> Sequence[BlockKey]:
        """See `EvictionPolicy.next_victims`."""
        if len(self._candidates) < min(count, len(self)):
            self._take_candidates(2 * count)
        return list(itertools.islice(reversed(self._candidates), count))

    def admitted(self, keys: list[BlockKey], fitting: int, nbytes: int) -> list[BlockKey]:
        """Give the leading keys that are let in: here all.

        Args:
            keys: Of objects that are not known.
            fitting: So many of them fit without eviction, and need not be asked for. Below 0 for none.
            nbytes: The bytes of the capacity that each would take.
        """
        return keys

    def evict(
        self, nbytes: int, protected: Container[BlockKey], pinned: Container[BlockKey] = ()
    ) -> list[BlockKey]:
        """See `EvictionPolicy.evict`; `pinned` are more that must stay."""
        victims: list[BlockKey] = []
        candidates, pop, missing, spared = self._candidates, self.pop, nbytes, _SPARED_AT_ONCE
        for _ in range(len(self)):
            if missing <= 0 or not spared:
                break
            if not candidates:
                candidates = self._take_candidates(_CANDIDATES)
            key, _ = candidates.popitem()
            if key in pinned or key in protected:
                self[key] = pop(key)
                spared -= 1
            else:
                missing -= pop(key)
                victims.append(key)
                spared += _SPARED_EACH
        self.nbytes -= nbytes - missing
        return victims

    def _take_candidates(self, count: int) -> dict[BlockKey, None]:
        """Look up so many objects at the front, or more where the way there is long."""
        count = max(count, len(self) // _CANDIDATES_PART)
        self._candidates = dict.fromkeys(reversed(list(itertools.islice(self, count))))
        return self._candidates


class Lru(Fifo):
    """Least recently used first.

    A prompt's head counts as used after its tail, also where the tail comes in later than the head was used.
    """

    def __init__(self) -> None:
        super().__init__()
        self._heads: dict[BlockKey, list[BlockKey]] = {}
        """Of prompts of which the tail is on its way: the first block that comes, and those before it."""

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:
        """See `EvictionPolicy.offered`."""
        super().offered(keys, origin)
        self._await_tail(keys)

    def insert(self, key: BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`."""
        super().insert(key, nbytes)
        # Of a prompt's new blocks the first comes in last.
        if self._heads and (head := self._heads.pop(key, None)):
            for each in reversed(head):
                if each in self:
                    self._renew(each)

    def insert_each(self, sizes: Mapping[BlockKey, int]) -> None:
        """See `Fifo.insert_each`."""
        if self._heads.keys().isdisjoint(sizes):
            super().insert_each(sizes)
            return
        for key, nbytes in sizes.items():
            self.insert(key, nbytes)

    def touch(self, key: BlockKey) -> None:
        """See `EvictionPolicy.touch`."""
        self._renew(key)

    def _renew(self, key: BlockKey) -> None:
        self[key] = self.pop(key)
        self._candidates.pop(key, None)

    def _await_tail(self, keys: Sequence[BlockKey]) -> None:
        """Remember which of a prompt's blocks are here until the others have come."""
        first = next((key for key in keys if key not in self), None)
        if first is not None and (head := [key for key in keys if key in self]):
            self._heads[first] = head
            if len(self._heads) > _MOST_HEADS:
                del self._heads[next(iter(self._heads))]


def _make_lru(config: NoSettings, context: PolicyContext) -> Lru:
    return Lru()


def _make_fifo(config: NoSettings, context: PolicyContext) -> Fifo:
    return Fifo()


@hookimpl
def kvbm_policies() -> Sequence[Policy]:
    """Offer the policies ``lru`` and ``fifo``."""
    return [Policy("lru", NoSettings, _make_lru), Policy("fifo", NoSettings, _make_fifo)]
