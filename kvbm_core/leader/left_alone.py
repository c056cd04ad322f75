"""Tiers that fail are left alone until they work: each is tried meanwhile, and the log says so."""

from __future__ import annotations

import logging

from kvbm_core.block import PROBE_KEY
from kvbm_core.leader.draft import Draft
from kvbm_core.leader.ground.breaker import Breaker
from kvbm_core.leader.ground.tier_state import TierState
from kvbm_core.log_limit import LogLimit, clock_words
from kvbm_core.plan import Probe
from kvbm_core.tier import Op, Reason

__all__ = ["LeftAlone"]

logger = logging.getLogger("kvbm_core")


class LeftAlone:
    """Has each tier's breaker learn of what ends, and the ranks try a tier that it opens for.

    Args:
        draft: Takes the probes.
    """

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._probed: set[int] = set()
        """Positions of the tiers that ranks try."""
        self._told: set[int] = set()
        """Of those of which a line says that they are left alone, and none since that they work."""
        self._lines = LogLimit(logger)

    def __repr__(self) -> str:
        return f"<LeftAlone {len(self._probed)} tiers are tried>"

    def judge(self, tier: TierState, kind: Op, worst: Reason, detail: str, now_s: float) -> None:
        """Take in how an operation of a kind ended: NONE, or the reason that it failed for."""
        breaker, since_s, was_left_alone = tier.breaker, tier.breaker.since_s, tier.breaker.is_left_alone
        if breaker.note(kind, worst, now_s):
            self._probe(tier)
            says = f" It says: {detail}." if detail else ""
            if self._lines.warning(
                (tier.name, kind, worst),
                "tier %s fails (%s: %s) and is left alone. It has failed since %s and is tried again "
                "at %s.%s",
                tier.name, kind.value, worst.value, clock_words(breaker.since_s or now_s, now_s),
                clock_words(breaker.until_s, now_s), says,
            ):  # fmt: skip
                self._told.add(tier.position)
        elif was_left_alone and not breaker.is_left_alone:
            self._say_works(tier, since_s, now_s)

    def end_probe(self, tier: TierState, detail: str, now_s: float) -> None:
        """Use a tier again that works on every rank; a detail says that a rank has logged it."""
        self._probed.discard(tier.position)
        breaker, since_s, was_left_alone = tier.breaker, tier.breaker.since_s, tier.breaker.is_left_alone
        breaker.close(now_s)
        if detail:
            self._told.discard(tier.position)
        if was_left_alone:
            self._say_works(tier, since_s, now_s)

    def _say_works(self, tier: TierState, since_s: float | None, now_s: float) -> None:
        # Else the line that it ends was left out.
        if tier.position in self._told and since_s is not None:
            logger.warning(
                "tier %s works again; it had failed since %s", tier.name, clock_words(since_s, now_s)
            )
        self._told.discard(tier.position)

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
