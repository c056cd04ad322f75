"""Device blocks that nobody can take back: their requests do not run, and so cannot be preempted."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Parked"]


@dataclass(slots=True)
class _Stay:
    """One request's blocks."""

    blocks: int
    loading_blocks: int
    """Of these, those whose loads have not ended."""
    has_gone: bool = False
    """True if the request was aborted. The engine keeps its blocks until its loads have ended."""


class Parked:
    """Device blocks of requests that load, or have loaded and were not scheduled since.

    Args:
        room_blocks: All that the engine has for requests.
        one_queue: True if the engine keeps requests that hold blocks in one queue with those that wait for
            some, and looks at nobody behind one that finds no room.
    """

    def __init__(self, room_blocks: int, *, one_queue: bool) -> None:
        self._room_blocks = room_blocks
        self._one_queue = one_queue
        self._stays: dict[str, _Stay] = {}
        self.blocks = 0
        """Of all."""
        self.in_need: set[str] = set()
        """Requests that wait until enough of these are free again, see `stop_the_queue`."""

    def __repr__(self) -> str:
        return f"<Parked {self.blocks} blocks of {len(self._stays)} requests>"

    def __len__(self) -> int:
        return len(self._stays)

    def add(self, request: str, blocks: int, loading_blocks: int = 0) -> None:
        """Note that a request holds so many blocks, of which so many are on their way."""
        self.remove(request)
        self._stays[request] = _Stay(blocks, loading_blocks)
        self.blocks += blocks

    def loaded(self, request: str, blocks: int) -> None:
        """Note that loads of so many blocks of a request have ended, well or not."""
        if (stay := self._stays.get(request)) is None:
            return
        stay.loading_blocks -= blocks
        if stay.has_gone and stay.loading_blocks <= 0:
            self.remove(request)

    def remove(self, request: str) -> None:
        """Note that a request runs."""
        if (stay := self._stays.pop(request, None)) is not None:
            self.blocks -= stay.blocks

    def forget(self, request: str) -> None:
        """Note that a request is gone. What still loads for it is parked until that has ended."""
        self.in_need.discard(request)
        if (stay := self._stays.get(request)) is None:
            return
        stay.has_gone = True
        if stay.loading_blocks <= 0:
            self.remove(request)

    def lose_loads(self) -> None:
        """Note that no report of any load will come."""
        for request, stay in list(self._stays.items()):
            self.loaded(request, stay.loading_blocks)

    def stop_the_queue(self, request: str, whole_blocks: int) -> bool:
        """Return True for a request whose whole prompt finds room only when parked requests give theirs back.

        In an engine with one queue a request that has loaded may stand for ever behind one without room.
        So such a request waits elsewhere, and nobody else begins to load before it runs.
        """
        own = self._stays.get(request)
        others = self.blocks - (own.blocks if own else 0)
        stops = self._one_queue and others > 0 and others + whole_blocks > self._room_blocks
        (self.in_need.add if stops else self.in_need.discard)(request)
        return stops
