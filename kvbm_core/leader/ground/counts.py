"""What is known of one tier in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from kvbm_core.tier import Op, Reason

__all__ = ["TierCounts", "TierLevels"]


@dataclass(slots=True)
class TierCounts:
    """What has happened in one tier since the start, in blocks if nothing else is said."""

    stored: int = 0
    """Blocks that were written here on every rank."""
    stored_bytes: int = 0
    """Of the blocks, over all ranks, as the engine has them; likewise `loaded_bytes`."""
    loaded: int = 0
    """Blocks that were read from here into the engine's memory."""
    loaded_bytes: int = 0
    """As `stored_bytes`."""
    evicted: int = 0
    """Blocks that went to make room."""
    declined: int = 0
    """Found here, and computed all the same, because that was expected to be faster."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Not even tried, by why: ``backlog`` (too many were waiting to be stored here), ``unusable`` (the
    tier is left alone after failures), ``gone`` (it left the host pool before its turn came), ``late``
    (evicted from the tier above before it was copied here)."""
    filled_bytes: Counter[tuple[int, str]] = field(default_factory=Counter)
    """Of `stored_bytes` those that came from another tier: by its position, and why (see `FillReason`)."""
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By operation (``store``, ``load``, ``lookup``) and reason."""


class TierLevels(NamedTuple):
    """Where one tier stands now."""

    blocks: int
    """In it, those on their way in among them."""
    used_bytes: int
    """That they take of its capacity, over all ranks."""
    waiting_blocks: int
    """Being stored, or waiting for that."""
    usable: bool
    """False from when it is left alone after failures until what failed works again."""
    capacity_bytes: int | None
    """As configured, over all ranks. None: no limit."""
    capacity_now_bytes: int | None
    """Less while its medium has no room for more."""
    left_alone_for: tuple[Op, Reason] | None
    """The operation that failed last and why, as long as it is not usable."""
