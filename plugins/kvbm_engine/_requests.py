"""What is known of one of the engine's requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbm_core import Match
from kvbm_engine._keys import BlockKeys
from kvbm_engine._values import EngineRequest

__all__ = ["Finding", "RequestState"]


@dataclass(slots=True, eq=False)
class Finding:
    """What was found of one request's prompt in the tiers, and what shall be loaded of it."""

    match: Match | None = None
    """The last finding, remembered until blocks are given for it."""
    judged: Match | None = None
    """The finding that was last weighed against computing: a try of a slow tier is given once."""
    worth_blocks: int = 0
    """Leading blocks of it that shall be loaded."""
    from_host_pool: bool = False
    """True if all of these are in the host pool."""
    matched_step: int = 0
    """The step in whose planning it was matched last."""
    is_held: bool = False
    """True if the request waits because too many blocks are parked."""
    is_counted: bool = True
    """True if metrics have the finding. They count it once, however often the engine asks."""
    in_step: bool = False
    """True if it shall be loaded in the step that computes the rest."""

    def clear(self) -> None:
        """Forget what was found."""
        self.match = self.judged = None
        self.is_held = False


@dataclass(slots=True, eq=False)
class RequestState:
    """What is known of one request, until its last blocks are stored."""

    request: EngineRequest
    keys: BlockKeys
    blocks: list[int] = field(default_factory=list)
    """Device blocks, in order of the tokens."""
    computed_tokens: int = 0
    """Tokens whose KV is in `blocks`, as far as steps have reported. Those of steps under way come on top."""
    noted_blocks: int = 0
    """Complete once the steps under way have ended."""
    steps_under_way: int = 0
    """Those that complete blocks of it."""
    life: int = 0
    """Counts the times that it began anew, so that a step of before says nothing of its new blocks."""
    offered_blocks: int = 0
    """Blocks the planner was offered for storing."""
    finding: Finding = field(default_factory=Finding)
    may_load: bool = True
    """False after a load that failed: the request computes, so that it cannot fail in a circle."""
    may_store: bool = True
    """False while its blocks may hold KV from before a reset, or of a step that failed."""
    ended_s: float | None = None
    """When the request finished. None: it has not."""
    ended_step: int = 0
    """The last step that had been planned then."""

    def complete_blocks(self, block_tokens: int) -> int:
        """Count the leading blocks that may be stored, offered or not."""
        if not self.may_store:
            return 0
        # The last token's KV is not computed yet, and tokens a drafting model proposed are not in
        # the request before they are accepted.
        tokens = min(self.computed_tokens, self.request.num_tokens - 1)
        return min(tokens // block_tokens, len(self.blocks))

    def is_to_offer(self, block_tokens: int) -> bool:
        """Return True if blocks of it are to be offered, now or when steps have ended."""
        return self.may_store and bool(
            self.steps_under_way or self.complete_blocks(block_tokens) > self.offered_blocks
        )

    def begin_anew(self, blocks: list[int]) -> None:
        """Take other blocks, of which nothing is computed yet."""
        self.blocks, self.life = blocks, self.life + 1
        self.computed_tokens = self.noted_blocks = 0

    def forget(self, keys: BlockKeys) -> None:
        """Go on under other keys: nothing known of before is true of them."""
        self.keys, self.offered_blocks = keys, 0
        self.finding.clear()
        if self.blocks:
            self.may_store = False
            self.begin_anew(self.blocks)
