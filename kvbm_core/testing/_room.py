"""What a bounded tier holds, counted beside it: for the tests of its room."""

from __future__ import annotations

import itertools
import random
from typing import Final

from kvbm_core.testing._rig import Rig, key_of
from kvbm_core.tier import Outcome, Reason, Tier

__all__ = ["MOST_OBJECTS", "Room", "count_of"]

MOST_OBJECTS: Final = 1024
"""Tests that fill a tier must end."""
_ROUNDS: Final = 4


def count_of(rig: Rig, tier: Tier) -> int:
    """Count the longest objects that a tier has room for."""
    capabilities = tier.capabilities
    assert capabilities.capacity_bytes is not None
    count = capabilities.capacity_bytes // capabilities.charge(rig.max_bytes)
    assert 8 < count <= MOST_OBJECTS, (
        f"the suite fills the tier: give it settings for 9 to {MOST_OBJECTS} objects of {rig.max_bytes} "
        f"bytes, not {count}"
    )
    return count


class Room:
    """Fills a tier with objects of many lengths, and insists on the sum of their charges.

    Args:
        rig: Of the test.
        tier: It is bounded, and has nothing yet.
    """

    def __init__(self, rig: Rig, tier: Tier) -> None:
        self._rig = rig
        self._tier = tier
        self._random = random.Random(0)
        self._numbers = itertools.count(1000)
        self._charge = tier.capabilities.charge
        self._capacity_bytes = tier.capabilities.capacity_bytes or 0
        self._used_bytes = 0
        self._planned: list[int] = []
        self.held: dict[int, int] = {}
        """Number to length of every object that the tier has, oldest first."""

    @property
    def left_bytes(self) -> int:
        """Bytes of the capacity that no object takes."""
        return self._capacity_bytes - self._used_bytes

    def fill(self, low: int, high: int) -> None:
        """Store objects of random lengths; what fits is stored, what does not is refused.

        Args:
            low: Length of the shortest, in bytes.
            high: Length of the longest, inclusive.
        """
        for _ in range(_ROUNDS):
            while self._charge(nbytes := self._random.randint(low, high)) <= self.left_bytes:
                self._plan(nbytes)
            self._store()
            self._refused(nbytes)

    def top_up(self) -> None:
        """Store the longest object that there is room for, until not even one byte has any."""
        while self._charge(1) <= self.left_bytes:
            low, high = 1, self._rig.max_bytes
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self._charge(middle) <= self.left_bytes else (low, middle - 1)
            self._plan(low)
            self._store()
        self._refused(1)

    def forget(self, *numbers: int) -> None:
        """Discard objects."""
        self._tier.discard([key_of(number) for number in numbers])
        for number in numbers:
            self._used_bytes -= self._charge(self.held.pop(number))

    def forget_some(self, share: float) -> None:
        """Discard a share of the objects, chosen at random."""
        self.forget(*self._random.sample(sorted(self.held), int(share * len(self.held))))

    def check(self) -> None:
        """Insist that each object is there as it was stored."""
        self._rig.must_hold(self._tier, *self.held)

    def reopened(self, tier: Tier) -> None:
        """Go on with another tier that has the same objects."""
        self._tier = tier

    def _plan(self, nbytes: int) -> None:
        number = next(self._numbers)
        assert self._charge(nbytes) > 0, f"{nbytes} bytes take nothing of the capacity"
        self._rig.set_length(nbytes, number)
        self.held[number] = nbytes
        self._used_bytes += self._charge(nbytes)
        self._planned.append(number)

    def _store(self) -> None:
        planned, self._planned = self._planned, []
        for number, end in zip(planned, self._rig.store(self._tier, *planned), strict=True):
            assert end.outcome is Outcome.DONE, (
                f"{self.held[number]} bytes were refused ({end}), though the charges of all objects are "
                f"{self._used_bytes} of {self._capacity_bytes} bytes"
            )

    def _refused(self, nbytes: int) -> None:
        number = next(self._numbers)
        self._rig.set_length(nbytes, number)
        [end] = self._rig.store(self._tier, number)
        assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.FULL), (
            f"{nbytes} bytes more ended {end}, though {self._used_bytes} of {self._capacity_bytes} bytes are "
            "taken"
        )
