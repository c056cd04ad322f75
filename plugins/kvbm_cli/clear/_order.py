"""Which objects are the oldest of so many bytes, without a list of them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

__all__ = ["Order"]

_MOST: Final = 1 << 16


class Order:
    """How many bytes were stored when: exact for few objects, in spans of equal length for many.

    Behaviour:
        - `most` spans are in memory at most. They grow by doubling.

    Args:
        most: Spans.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._span = 0.0
        self._bytes: Counter[float] = Counter()
        self._before = -math.inf
        self._within = -math.inf
        self._left_bytes = 0.0

    def __repr__(self) -> str:
        return f"<Order of {len(self._bytes)} spans>"

    def add(self, order: float, nbytes: int) -> None:
        """Count an object."""
        self._bytes[self._floor(order)] += nbytes
        while len(self._bytes) > self._most:
            length = max(self._bytes) - min(self._bytes)
            self._span = 2 * self._span or length / self._most
            counted, self._bytes = self._bytes, Counter()
            for each, total in counted.items():
                self._bytes[self._floor(each)] += total

    def cut(self, most_bytes: float) -> None:
        """Choose the oldest, so that `most_bytes` are left at most."""
        excess = self._bytes.total() - most_bytes
        for each in sorted(self._bytes) if excess > 0 else ():
            self._within, self._left_bytes = each, excess
            if excess <= self._bytes[each]:
                break
            self._before, excess = math.nextafter(each, math.inf), excess - self._bytes[each]

    def chosen(self, order: float, nbytes: int) -> bool:
        """Say whether an object goes. Of the last span those go that are asked of first, as many as must."""
        span = self._floor(order)
        if span < self._before:
            return True
        if span != self._within or self._left_bytes <= 0:
            return False
        self._left_bytes -= nbytes
        return True

    def _floor(self, order: float) -> float:
        return order // self._span * self._span if self._span else order
