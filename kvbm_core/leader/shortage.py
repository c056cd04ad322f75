"""Media that hold less than the capacity that is configured, because other files take the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvbm_core.leader.ground.tier_state import TierState
from kvbm_core.leader.ground.tiers import Tiers
from kvbm_core.leader.in_flight import LegEnded
from kvbm_core.leader.tier_news import TierNews

__all__ = ["FIRST_PAUSE_S", "LONGEST_PAUSE_S", "Shortages"]

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
"""A tier that is short of room is let hold more after a pause, which doubles as long as that fails."""
_HOST_POOL_PAUSE_S: Final = 0.1
"""Of the host pool, at first: its memory is there, and as a rule in use for a moment only."""
_PARTS: Final = 16
"""It is let hold so large a part of its capacity more at a time, the host pool all. Only where nearly all
that it may hold is used: else nothing would be known."""


@dataclass(slots=True)
class _Short:
    """A tier that holds less than its capacity."""

    grows_s: float
    """When it is let hold more."""
    pause_s: float
    """Until then, from when it was short of room last."""
    op: int
    """The last operation that was planned before it was known that there is no room."""
    has_grown: bool = False
    """True if it was let hold more since it was short of room last."""


class Shortages:
    """Keeps what each tier may hold at what its medium had room for, and lets it grow again.

    A store that the medium had no room for shrinks its tier to the blocks that it holds: the next evict the
    oldest. The others under way at that moment may find no room either, and shrink it further.

    Args:
        tiers: The leader's tiers.
        news: Is told which are short of room, and which no more.
    """

    def __init__(self, tiers: Tiers, news: TierNews) -> None:
        self._tiers = tiers
        self._news = news
        self._short: dict[int, _Short] = {}

    def __repr__(self) -> str:
        return f"<Shortages {', '.join(self._tiers[position].name for position in self._short)}>"

    def note(self, leg: LegEnded, latest: int, now_s: float) -> bool:
        """Take in that a tier had no room for a block of an operation.

        Args:
            leg: The operation's end in that tier.
            latest: The number of the operation that was planned last.
            now_s: The time.

        Returns:
            True if blocks had been evicted for it: then it is the tier's fault.
        """
        position = leg.tier
        tier = self._tiers[position]
        capacity = tier.index.capacity_bytes
        if capacity is None or tier.capabilities.shared:
            return False
        known = self._short.get(position)
        evicted = known is not None and not known.has_grown and leg.pending.op.op > known.op
        held = max(*tier.charges, tier.index.used_bytes)
        if held < capacity:
            tier.index.capacity_bytes = held
            if capacity == tier.capacity_bytes:
                self._news.full(tier, held, leg.pending.details.get(position, ""), now_s)
        elif known is None:
            return False
        pause_s = known.pause_s if known else self._first_pause_s(tier)
        if known and known.has_grown:
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._short[position] = _Short(now_s + pause_s, pause_s, latest)
        return evicted and not tier.is_host_pool

    def grow(self, now_s: float) -> None:
        """Let the tiers hold more whose turn it is. Costs nothing where none is short of room."""
        for position, short in list(self._short.items()):
            tier = self._tiers[position]
            limit, most = tier.index.capacity_bytes, tier.capacity_bytes
            assert limit is not None
            assert most is not None
            used = tier.index.used_bytes
            has_room = used * _PARTS < limit * (_PARTS - 1) and used + max(tier.charges) <= limit
            if now_s < short.grows_s or has_room:
                continue
            if limit == most:
                del self._short[position]
                self._news.whole(tier, now_s)
                continue
            step = most if tier.is_host_pool else max(*tier.charges, most // _PARTS)
            tier.index.capacity_bytes = min(most, limit + step)
            if short.has_grown:  # The room that it was given before was there.
                short.pause_s = self._first_pause_s(tier)
            short.has_grown, short.grows_s = True, now_s + short.pause_s

    @staticmethod
    def _first_pause_s(tier: TierState) -> float:
        return _HOST_POOL_PAUSE_S if tier.is_host_pool else FIRST_PAUSE_S
