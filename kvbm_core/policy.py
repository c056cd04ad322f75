"""Which block goes when room is wanted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable

from kvbm_core.block import BlockKey

__all__ = ["EvictionPolicy", "Lru"]


class EvictionPolicy(ABC):
    """The blocks of one tier that may be evicted, in an order of its own.

    A block that is pinned is taken out and comes back, as the most recently used, when it is not.
    """

    @abstractmethod
    def add(self, key: BlockKey) -> None:
        """Take a block in, or make one that is there the most recently used: the last to go."""

    @abstractmethod
    def remove(self, key: BlockKey) -> bool:
        """Take a block out. False if it was not there."""

    @abstractmethod
    def victim(self) -> BlockKey | None:
        """Take out the block to be evicted next. None if there is none."""

    @abstractmethod
    def keys(self) -> Iterable[BlockKey]:
        """List the blocks, the next victim first."""

    @abstractmethod
    def __contains__(self, key: object, /) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...


class Lru(OrderedDict[BlockKey, None], EvictionPolicy):
    """Least recently used first. Every operation takes the same time at any size.

    It *is* its dictionary, so that asking whether a block is there costs no Python call: a lookup
    asks thousands of times.
    """

    def add(self, key: BlockKey) -> None:
        """See `EvictionPolicy.add`."""
        self[key] = None
        self.move_to_end(key)

    def remove(self, key: BlockKey) -> bool:
        """See `EvictionPolicy.remove`."""
        if key not in self:
            return False
        del self[key]
        return True

    def victim(self) -> BlockKey | None:
        """See `EvictionPolicy.victim`."""
        return self.popitem(last=False)[0] if self else None
