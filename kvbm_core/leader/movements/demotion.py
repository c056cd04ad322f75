"""Blocks that a tier is about to evict are copied into the tier below, ahead of need.

    order of eviction above │ x x x x x x o o x o o o o o o o ...       x: in the tier below as well
                            ├─ can go without a loss ─┤
                            low_watermark: copy more ... high_watermark: enough

What comes too late is evicted all the same, and counted. Nothing waits for a demotion.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from kvbm_core.block import BlockKey, BlockState
from kvbm_core.groups import TAG_BYTES
from kvbm_core.leader.draft import Draft
from kvbm_core.leader.ground.tiers import Tiers
from kvbm_core.movement import Movement
from kvbm_core.plan import FillReason

__all__ = ["Demotion"]

_MOST_AHEAD: Final = 4096
"""Objects looked at in one look at the order of eviction: half a millisecond at most."""
_SPARED_AT_ONCE: Final = 64
"""Pinned objects after which a round of eviction stops, see `kvbm_core.policies`."""


class Demotion:
    """Fills one tier with what the tier above it is about to evict.

    Args:
        tiers: The leader's tiers.
        draft: Takes the fills.
        position: Of the lower tier.
        movement: Its settings.
        max_moving: Objects on their way into it at once.
        groups: Numbers of the KV groups, by the tags of their keys.
    """

    def __init__(
        self, tiers: Tiers, draft: Draft, position: int, movement: Movement, max_moving: int,
        groups: Mapping[bytes, int],
    ) -> None:  # fmt: skip
        self._draft = draft
        self._above, self._below = tiers[position - 1], tiers[position]
        self._movement = movement
        self._max_moving = max_moving
        self._groups = groups
        self._due: deque[BlockKey] = deque()
        """That are to be copied, the next to be evicted first."""
        self._covered = 0
        """Of those to be evicted next, how many can go without a loss when all that is due has been copied,
        at the last look."""
        self._seen = (0, 0)
        """Blocks evicted, and READY ones above, at the last look."""
        # The objects on their way down are the next to be evicted, and pinned.
        self._above.index.eviction_rounds = 1 + max_moving // _SPARED_AT_ONCE

    def __repr__(self) -> str:
        return f"<Demotion {self._above.name} to {self._below.name}: {len(self._due)} due>"

    def is_due(self, now_s: float) -> bool:
        """Return True if `plan` would begin to copy something that is known to be due."""
        return bool(self._due) and self._below.storing < self._max_moving and self._is_usable(now_s)

    def plan(self, now_s: float) -> None:
        """Copy what is due, as far as there is room on the way. Nothing while a tier is left alone."""
        if not self._is_usable(now_s):
            self._due.clear()
            self._covered = 0
            return
        if self._is_short():
            self._look()
        if self._due:
            self._copy(self._max_moving - self._below.storing, now_s)

    def evicted(self, keys: Sequence[BlockKey]) -> None:
        """Count what the tier above has evicted before it was copied."""
        there = self._below.index.ready
        late = sum(key not in there for key in keys)
        if late:
            self._below.counts.dropped["unusable" if self._below.breaker.left_alone_for else "late"] += late
            self._covered = 0  # The order was another one than at the last look.

    def failed(self) -> None:
        """Take in that blocks have not arrived: they are due again when something changes."""
        self._covered = 0

    def forget(self) -> None:
        """Give up what is due."""
        self._due.clear()
        self._covered = 0

    def _is_usable(self, now_s: float) -> bool:
        return self._above.breaker.closed(now_s) and self._below.breaker.closed(now_s)

    def _is_short(self) -> bool:
        """Return True if less than the low watermark could be given away, and something has changed."""
        index, evicted = self._above.index, self._above.counts.evicted
        if (evicted, index.ready_count) == self._seen:
            return False
        low, _, free = self._watermarks()
        return self._covered - (evicted - self._seen[0]) + free < low

    def _look(self) -> None:
        """Find what is due: the next to be evicted, as far as the high watermark."""
        index, there = self._above.index, self._below.index.ready
        _, high, free = self._watermarks()
        victims = index.next_victims(max(0, high - free))
        self._covered = len(victims)
        # What is pinned is on its way down, or in use.
        self._due = deque(key for key in victims if key not in there and not index.is_pinned(key))
        self._seen = (self._above.counts.evicted, index.ready_count)

    def _watermarks(self) -> tuple[int, int, int]:
        """Give both watermarks and what is free above, in objects."""
        index, charge = self._above.index, max(self._above.charges)
        assert index.capacity_bytes is not None, "a tier without a bound evicts nothing"
        objects = index.capacity_bytes // charge
        high = max(1, min(_MOST_AHEAD, round(self._movement.high_watermark * objects)))
        low = max(1, round(high * self._movement.low_watermark / self._movement.high_watermark))
        return low, high, (index.capacity_bytes - index.used_bytes) // charge

    def _copy(self, room: int, now_s: float) -> None:
        """Plan fills of up to so many objects, one for each KV group."""
        together: dict[int, list[BlockKey]] = {}
        above, below = self._above.index, self._below.index
        while self._due and room > 0:
            key = self._due.popleft()
            if key in above and below.state(key) is BlockState.ABSENT:
                group = self._groups[key[-TAG_BYTES:]] if len(self._groups) > 1 else 0
                together.setdefault(group, []).append(key)
                room -= 1
        for group, offered in together.items():
            keys = self._below.admitted(offered, now_s, group)
            self._draft.fill(
                self._above.position, self._below.position, [(keys, ())], group, FillReason.DEMOTION
            )
