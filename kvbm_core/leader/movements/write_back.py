"""The blocks that tiers below the host pool get later: too many at once, or in the host pool already."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable
from typing import Final

from kvbm_core.block import BlockKey, BlockState
from kvbm_core.leader.draft import Draft
from kvbm_core.leader.ground.tier_state import TierState
from kvbm_core.leader.ground.tiers import Tiers
from kvbm_core.plan import FillReason

__all__ = ["WriteBack"]

_SHARES: Final = 4
_SMALL_SHARE: Final = 8
"""Of a host pool of a few blocks, so that a prompt's blocks go together."""


class WriteBack:
    """Bounds what is on its way into each tier, and queues the rest.

    Args:
        tiers: The leader's tiers.
        draft: Takes the fills.
        max_store_blocks: Blocks on their way into a tier below the host pool, at once; as many more wait. A
            quarter of the host pool at most: they lie in its memory, and a tier may hang.
    """

    def __init__(self, tiers: Tiers, draft: Draft, max_store_blocks: int) -> None:
        self._tiers = tiers
        self._draft = draft
        self._max_waiting = self.max_storing = max_store_blocks
        pool = tiers[tiers.host_pool] if tiers.host_pool >= 0 else None
        if pool is not None and pool.capacity_bytes is not None:
            objects = pool.capacity_bytes // max(pool.charges)
            self.max_storing = min(max_store_blocks, max(_SMALL_SHARE, objects // _SHARES))

    def __repr__(self) -> str:
        return f"<WriteBack {sum(len(tier.write_back) for tier in self._tiers)} blocks>"

    def is_due(self, now_s: float) -> bool:
        """Return True if `plan` may begin to copy something."""
        return any(tier.write_back and tier.breaker.closed(now_s) for tier in self._tiers)

    def admit(
        self, tier: TierState, keys: list[BlockKey], prefix: Container[BlockKey], now_s: float, group: int
    ) -> list[BlockKey]:
        """Choose the blocks that are written from the device now.

        The blocks in the host pool are queued, because they need not be gathered again; so are those that
        are too many at once. Without a host pool the surplus is dropped.
        """
        usable = tier.breaker.closed(now_s)
        room = max(0, self.max_storing - tier.storing) if usable else 0
        if self._tiers.host_pool < 0 or tier.is_host_pool:
            tier.counts.dropped["backlog" if usable else "unusable"] += len(keys[room:])
            return keys[:room]
        there = self._tiers[self._tiers.host_pool].index.ready
        later = [key for key in keys if key in there]
        if not later and len(keys) <= room:
            return keys
        fresh = [key for key in keys if key not in there]
        self._enqueue(tier, [*fresh[room:], *later], (prefix, group))
        return fresh[:room]

    def plan(self, now_s: float) -> None:
        """Copy what is due from the host pool, as far as there is room on the way."""
        for tier in self._tiers:
            if tier.write_back and tier.breaker.closed(now_s):
                for group, runs in self._due(tier).items():
                    self._draft.fill(
                        self._tiers.host_pool, tier.position, runs, group, FillReason.WRITE_BACK
                    )  # fmt: skip

    def _due(self, tier: TierState) -> dict[int, list[tuple[list[BlockKey], Container[BlockKey]]]]:
        """Take the blocks that a tier gets now: of each KV group those of one prefix together."""
        index = self._tiers[self._tiers.host_pool].index
        due: list[tuple[BlockKey, tuple[Container[BlockKey], int]]] = []
        while tier.write_back and tier.storing + len(due) < self.max_storing:
            key, whose = next(iter(tier.write_back.items()))
            state = index.state(key)
            if state is BlockState.FILLING:
                break
            del tier.write_back[key]
            if state is BlockState.READY:
                due.append((key, whose))
            elif key not in tier.index:
                tier.counts.dropped["gone"] += 1
        runs: dict[int, list[tuple[list[BlockKey], Container[BlockKey]]]] = {}
        for _, run in itertools.groupby(due, key=lambda pair: (id(pair[1][0]), pair[1][1])):
            together = list(run)
            prefix, group = together[0][1]
            runs.setdefault(group, []).append(([key for key, _ in together], prefix))
        return runs

    def _enqueue(
        self, tier: TierState, keys: Iterable[BlockKey], whose: tuple[Container[BlockKey], int]
    ) -> None:
        for key in keys:
            # Full: the end of a prefix is dropped, because its end without its head is worth nothing.
            if len(tier.write_back) < self._max_waiting:
                tier.write_back[key] = whose
            elif key not in tier.write_back:
                tier.counts.dropped["backlog"] += 1
