"""Tiers that fail are left alone until they work: each is tried meanwhile, and the log says so."""

from __future__ import annotations

from kvbm_core.block import PROBE_KEY
from kvbm_core.leader.draft import Draft
from kvbm_core.leader.ground.breaker import Breaker
from kvbm_core.leader.ground.tier_state import TierState
from kvbm_core.leader.tier_news import TierNews
from kvbm_core.plan import Probe
from kvbm_core.tier import Op, Reason

__all__ = ["LeftAlone"]


class LeftAlone:
    """Has each tier's breaker learn of what ends, and the ranks try a tier that it opens for.

    Args:
        draft: Takes the probes.
        news: Is told which tiers are left alone, and which work again.
    """

    def __init__(self, draft: Draft, news: TierNews) -> None:
        self._draft = draft
        self._news = news
        self._probed: set[int] = set()
        """Positions of the tiers that ranks try."""

    def __repr__(self) -> str:
        return f"<LeftAlone {len(self._probed)} tiers are tried>"

    def judge(self, tier: TierState, kind: Op, worst: Reason, detail: str, now_s: float) -> None:
        """Take in how an operation of a kind ended: NONE, or the reason that it failed for."""
        was_left_alone = tier.breaker.left_alone_for
        if tier.breaker.note(kind, worst, now_s):
            self._probe(tier)
            self._news.left_alone(tier, kind, worst, detail, now_s)
        elif was_left_alone and not tier.breaker.left_alone_for:
            self._news.works(tier, now_s)

    def end_probe(self, tier: TierState, detail: str, now_s: float) -> None:
        """Use a tier again that works on every rank; a detail says that a rank has logged it."""
        self._probed.discard(tier.position)
        tier.breaker.close(now_s)
        self._news.works(tier, now_s, is_said=bool(detail))

    def _probe(self, tier: TierState) -> None:
        """Have the ranks try a tier, unless they do."""
        # Host memory does not fail by itself, and is not behind a queue on the ranks.
        if tier.position in self._probed or tier.is_host_pool:
            return
        self._probed.add(tier.position)
        if not tier.capabilities.shared:  # A shared tier's own bound does without room for it.
            tier.drop(PROBE_KEY)  # Of an engine that was killed while it tried.
            largest = tier.charges.index(max(tier.charges))
            for key in tier.reserve([PROBE_KEY], (), largest):
                tier.index.not_stored(key)
        pauses_s = Breaker.first_pause_s, Breaker.longest_pause_s
        self._draft.add(Probe(self._draft.number(), tier.position, *pauses_s))
