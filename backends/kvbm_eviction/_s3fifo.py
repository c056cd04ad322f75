"""S3-FIFO: three queues and no order of use (Yang, Zhang, Qiu, Yue, Vinayak, SOSP 2023), counted in bytes.

new ──► small, a tenth of the room ──used again──► main ──used since──► main, at its end
│ else                              │ else
▼                                   ▼
ghosts ──comes back──► main          gone
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import islice
from typing import Final

from kvbm_core import BlockKey, EvictionPolicy, Fifo, PolicyContext
from kvbm_eviction._ghosts import Ghosts

__all__ = ["S3Fifo"]

_SMALL_PART: Final = 10
_MOST_USES: Final = 3
_SPARED_AT_ONCE: Final = 64
"""Protected objects passed over in one eviction, beside `_SPARED_EACH` for each victim."""
_SPARED_EACH: Final = 8


class S3Fifo(EvictionPolicy):
    """Two queues and ghosts. An object that is used once passes through a tenth of the room."""

    def __init__(self, context: PolicyContext) -> None:
        self._small, self._main = Fifo(), Fifo()
        self._uses: dict[BlockKey, int] = {}
        """Of those that were used since they came to their queue, up to three."""
        self._small_bytes = context.capacity_bytes // _SMALL_PART
        self._ghosts = Ghosts(context.capacity_bytes // context.usual_bytes)

    def __repr__(self) -> str:
        return f"<S3Fifo {self._small.nbytes} bytes small, {self._main.nbytes} main>"

    def insert(self, key: BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`."""
        if self._ghosts.take(key):
            self._main.insert(key, nbytes)
        else:
            self._small.insert(key, nbytes)

    def touch(self, key: BlockKey) -> None:
        """See `EvictionPolicy.touch`."""
        self._uses[key] = min(_MOST_USES, self._uses.get(key, 0) + 1)

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy.remove`."""
        (self._small if key in self._small else self._main).remove(key)
        self._uses.pop(key, None)

    def next_victims(self, count: int) -> Sequence[BlockKey]:
        """See `EvictionPolicy.next_victims`. Those used since they came are not among them."""
        named = [*self._small.next_victims(count), *self._main.next_victims(count)]
        return list(islice((key for key in named if key not in self._uses), count))

    def evict(self, nbytes: int, protected: Container[BlockKey]) -> Sequence[BlockKey]:
        """See `EvictionPolicy.evict`."""
        victims: list[BlockKey] = []
        spared, met = _SPARED_AT_ONCE, dict[BlockKey, bool]()
        # Each use is taken back once, so this ends.
        while nbytes > 0 and spared > 0 and (self._small or self._main):
            queue = self._small if self._small.nbytes > self._small_bytes or not self._main else self._main
            freed = queue.nbytes
            [key] = queue.evict(1, ())
            freed -= queue.nbytes
            if key not in met:
                met[key] = key in protected
            if met[key]:
                queue.insert(key, freed)
                spared -= 1
            elif uses := self._uses.pop(key, 0):
                self._main.insert(key, freed)
                if uses > 1 and queue is self._main:
                    self._uses[key] = uses - 1
            else:
                if queue is self._small:
                    self._ghosts.put(self._ghosts.place(key), 1)
                victims.append(key)
                nbytes -= freed
                spared += _SPARED_EACH
        return victims
