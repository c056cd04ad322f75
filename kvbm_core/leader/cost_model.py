"""Whether loading beats computing: what was measured of both, and what follows for a prefix.

    prefix      │ b0 b1 b2 b3 │ b4 b5 b6 b7 │ b8 ...      found in: host │ disk │ disk
    computing   ├──────────────────────────────► n blocks take n * block_tokens * seconds a token
    loading     ├────► host        ├─────────────► disk    tiers load side by side; the slowest counts

The leading blocks are loaded that save the most time; if none save any, nothing is. Pure: times come in
as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["TRIAL_EVERY_S", "CostModel"]

_MEMORY: Final = 0.7
"""What earlier measurements count for, when a new one comes."""
_MIN_TOKENS: Final = 512
"""Steps with fewer say more of the engine's fixed cost than of computing."""
_MIN_BLOCKS: Final = 8
"""Likewise of loads. Fewer that took longer than computing `_MIN_TOKENS` were slow beyond doubt."""
_SOME_TOKENS: Final = 32
"""Steps with fewer say nothing at all."""
_TRIAL_BLOCKS: Final = 16
"""Loaded of a prefix, at most, from a tier that nothing is known of, once it is known how fast the engine
computes."""
_TRIAL_FRACTION: Final = 0.05
"""Of a prompt's computing time: what a new try of a tier that was found slow may cost, at most."""
TRIAL_EVERY_S: Final = 30.0
"""A tier that was found slow is tried again so long after the last try, at the soonest."""
_TRIAL_SHARE: Final = 0.01
"""Of the time since a slow tier was last tried or measured: what a try of one block may cost."""


@dataclass(slots=True)
class _Speed:
    """A moving average of what one unit takes. Long measurements weigh more than short ones."""

    took_s: float = 0.0
    units: float = 0.0
    ended_s: float = float("-inf")
    """When the last one ended. What waited for it before it began itself was not slow."""

    def note(self, units: float, seconds: float, now_s: float) -> None:
        self.took_s = _MEMORY * self.took_s + self.own_seconds(seconds, now_s)
        self.units = _MEMORY * self.units + units
        self.ended_s = now_s

    def own_seconds(self, seconds: float, now_s: float) -> float:
        """Give the time of what ends now that was not spent waiting for the one before."""
        return now_s - max(now_s - seconds, self.ended_s)

    @property
    def seconds(self) -> float | None:
        """For one unit; None: not known."""
        return self.took_s / self.units if self.units else None


class CostModel:
    """Chooses how much of a prefix is loaded.

    Args:
        tiers: How many tiers there are.
        block_tokens: Tokens a block; 0 if nobody says how fast the engine computes. Then all is loaded.
        trusted: A tier that needs no try: the host pool. -1 for none.
    """

    def __init__(self, tiers: int, block_tokens: int = 0, trusted: int = -1) -> None:
        self._block_tokens = block_tokens
        self._trusted = trusted
        self._computing = _Speed()
        self._short_steps = _Speed()
        """They take longer a token than long ones, so what is slower than these is slow."""
        self._loading = [_Speed() for _ in range(tiers)]
        self._tried_s = [-TRIAL_EVERY_S] * tiers

    def __repr__(self) -> str:
        speeds = ["?" if s.seconds is None else f"{s.seconds * 1e3:.3g}" for s in self._loading]
        computing = self._block_seconds()
        engine = "?" if computing is None else f"{computing * 1e3:.3g}"
        return f"<CostModel ms a block: computed {engine}, loaded {', '.join(speeds)}>"

    def computed(self, tokens: int, seconds: float, now_s: float) -> None:
        """Take in that a step of the engine that computed so many tokens has ended, after this time.

        Tokens are 0 for a step that something else delayed.
        """
        if tokens >= _MIN_TOKENS:
            self._computing.note(tokens, seconds, now_s)
        elif tokens >= _SOME_TOKENS:
            self._short_steps.note(tokens, seconds, now_s)
        self._computing.ended_s = self._short_steps.ended_s = now_s

    def loaded(
        self, tier: int, blocks: float, seconds: float, now_s: float, *, in_part: bool = False
    ) -> None:
        """Take in that blocks have been loaded, this time after the plan's arrival.

        The time is all that passed until the last was where the engine reads it: the medium, codecs, seals.
        Blocks of several KV groups are counted in blocks of the largest. A load `in_part`, of which some
        blocks failed, or of a few blocks can show that a tier is slow; that one is fast, only a try of a slow
        one.
        """
        speed, computing = self._loading[tier], self._block_seconds()
        if blocks >= _MIN_BLOCKS and not in_part:
            speed.note(blocks, seconds, now_s)
        elif computing is not None:
            own_s, most = speed.own_seconds(seconds, now_s), max(blocks, _MIN_TOKENS / self._block_tokens)
            if self.is_slow(tier) and not in_part:
                # A try: it says what the next may cost, and if the tier is still slow.
                self._loading[tier] = _Speed()
                self._loading[tier].note(blocks, own_s, now_s)
            elif own_s >= most * computing:
                speed.note(most, seconds, now_s)

    def is_slow(self, tier: int) -> bool:
        """Say whether a block from this tier takes longer than computing it."""
        computing, loading = self._block_seconds(), self._loading[tier].seconds
        return computing is not None and loading is not None and loading >= computing

    def block_seconds(self, tier: int) -> tuple[float, float]:
        """Give what a block of the largest KV group takes: from this tier, and computed. NaN: not known."""
        loading, computing = self._loading[tier].seconds, self._block_seconds()
        return (
            math.nan if loading is None else loading,
            math.nan if computing is None else computing,
        )

    def should_skip(self, tier: int, now_s: float, blocks: float = math.inf) -> bool:
        """Say whether a tier need not be asked for so many blocks: it is slow, and no try is due."""
        computing = self._block_seconds()
        if computing is None or not self.is_slow(tier):
            return False
        return self._blocks_to_try(tier, _TRIAL_FRACTION * computing * blocks, now_s) < 1

    def blocks_to_load(self, tiers: Sequence[int], now_s: float) -> int:
        """Count the leading blocks that shall be loaded.

        Args:
            tiers: For each block of a prefix the tier it would come from.
            now_s: The time, in seconds, on any clock that does not go back.
        """
        computing = self._block_seconds()
        if computing is None or not tiers:
            return len(tiers)
        taken, counts = dict.fromkeys(tiers, 0.0), dict.fromkeys(tiers, 0)
        budget_s = _TRIAL_FRACTION * computing * len(tiers)
        costs = {tier: self._cost(tier, budget_s, now_s) for tier in taken}
        best, most_s, slowest_s = 0, 0.0, 0.0
        for at, tier in enumerate(tiers, 1):
            seconds, most_blocks = costs[tier]
            counts[tier] += 1
            if counts[tier] > most_blocks:
                break
            taken[tier] = spent_s = taken[tier] + seconds
            # Written out, because thousands of blocks are asked for.
            slowest_s = spent_s if spent_s > slowest_s else slowest_s
            if (saved_s := at * computing - slowest_s) > most_s:
                best, most_s = at, saved_s
        return best

    def best_boundary(self, options: Sequence[tuple[int, Mapping[int, float]]], now_s: float) -> int:
        """Choose one of several boundaries of a prefix.

        Args:
            options: For each boundary, the longest first, the tokens that it saves, and by tier the blocks
                that it loads, counted in blocks of the largest KV group.
            now_s: The time, as in `blocks_to_load`.

        Returns:
            Its position among the options; -1 if computing is expected to be faster than each.
        """
        computing = self._token_seconds()
        if computing is None or not self._block_tokens or not options:
            return 0 if options else -1
        budget_s = _TRIAL_FRACTION * computing * options[0][0]
        best, most_s = -1, 0.0
        for at, (tokens, blocks) in enumerate(options):
            slowest_s = 0.0
            for tier, count in blocks.items():
                seconds, most_blocks = self._cost(tier, budget_s, now_s)
                slowest_s = max(slowest_s, count * seconds if count <= most_blocks else math.inf)
            if (saved_s := tokens * computing - slowest_s) > most_s:
                best, most_s = at, saved_s
        return best

    def tried(self, tiers: Sequence[int], now_s: float) -> None:
        """Take in that blocks are loaded from these tiers: the try of a slow one is used up for a while."""
        for tier in filter(self.is_slow, dict.fromkeys(tiers)):
            self._tried_s[tier] = now_s

    def _token_seconds(self) -> float | None:
        seconds = self._computing.seconds
        return self._short_steps.seconds if seconds is None else seconds

    def _block_seconds(self) -> float | None:
        seconds = self._token_seconds()
        return None if seconds is None or not self._block_tokens else seconds * self._block_tokens

    def _cost(self, tier: int, budget_s: float, now_s: float) -> tuple[float, float]:
        """Say what a block of a tier takes, in seconds, and how many may be loaded.

        A try is bounded, and free as far as the choice goes: of a tier that nothing is known of, or of one
        that was slow when it was last asked.
        """
        seconds = self._loading[tier].seconds
        if seconds is None:
            is_first = tier == self._trusted or self._computing.seconds is None
            return 0.0, math.inf if is_first else _TRIAL_BLOCKS
        most_blocks = self._blocks_to_try(tier, budget_s, now_s) if self.is_slow(tier) else 0.0
        return (0.0, most_blocks) if most_blocks >= 1 else (seconds, math.inf)

    def _blocks_to_try(self, tier: int, budget_s: float, now_s: float) -> float:
        """Say how many blocks a try of a slow tier may load now; below 1 if none is due."""
        seconds = self._loading[tier].seconds
        if seconds is None or now_s - self._tried_s[tier] < TRIAL_EVERY_S:
            return 0.0
        since_s = now_s - max(self._tried_s[tier], self._loading[tier].ended_s)
        return max(budget_s / seconds, 1.0 if seconds <= _TRIAL_SHARE * since_s else 0.0)
