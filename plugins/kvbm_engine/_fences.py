"""Blocks that an engine may take from a running request: those behind a window or a chunk, and old states.

An engine does not say when it takes one back, but always to whom it gives one. A block that is given to
anyone is from then on nobody else's: what was to be stored of it is passed over. No block is held back, so
that the engine's KV cache is as large as without tiers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from kvbm_engine._requests import RequestState

__all__ = ["Fences"]


class Fences:
    """Knows in which requests' tables a block stands that the engine may give to another one."""

    def __init__(self) -> None:
        self._places: dict[int, list[tuple[weakref.ref[RequestState], list[int], int]]] = {}
        """Block to the requests that share it: each with the table that it stands in, and the place there. A
        request that begins anew has other tables, in which the same block may stand at the same place."""

    def __repr__(self) -> str:
        return f"<Fences around {len(self._places)} blocks>"

    def add(self, state: RequestState, group: int, first: int) -> None:
        """Watch the blocks of a request's table from the place `first` on."""
        table, own = state.blocks[group], weakref.ref(state)
        for place in range(first, len(table)):
            if block := table[place]:
                shared = self._places.get(block, ())
                others = [each for each in shared if each[0] is not own and each[0]() is not None]
                self._places[block] = [*others, (own, table, place)]

    def given(self, blocks: Iterable[int]) -> None:
        """Take the blocks out of the tables that they stand in: the engine has given them to somebody."""
        if not self._places:
            return
        for block in blocks:
            for _, table, place in self._places.pop(block, ()):
                if place < len(table) and table[place] == block:
                    table[place] = 0
