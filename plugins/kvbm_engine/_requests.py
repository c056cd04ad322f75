"""What is known of one of the engine's requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kvbm_core import Match
from kvbm_core.groups import KvGroup
from kvbm_core.leader.finding.boundaries import Part
from kvbm_core.leader.finding.group_matches import GroupMatch
from kvbm_engine._keys import BlockKeys
from kvbm_engine._values import EngineRequest

__all__ = ["NEVER", "Finding", "RequestState", "Tables"]

Tables = list[list[int]]
"""By KV group a request's device blocks in order of the tokens. In a group of which not all blocks are kept,
0 stands for a block that is not there, or not for this request any more. Of states it has only those that the
engine has handed over."""


NEVER: Final = 1 << 62
"""A step that will not come."""


@dataclass(slots=True, eq=False)
class Finding:
    """What was found of one request's prompt in the tiers, and what shall be loaded of it."""

    match: Match | GroupMatch | None = None
    """The last finding, remembered until blocks are given for it."""
    judged: Match | GroupMatch | None = None
    """The finding that was last weighed against computing: a try of a slow tier is given once."""
    start: int = 0
    """Tokens that the engine had when it was found."""
    stop: int = 0
    """Tokens behind which nothing was looked for."""
    worth_tokens: int = 0
    """Tokens after `start` that shall be loaded."""
    parts: list[Part] = field(default_factory=list)
    """Their blocks, by KV group."""
    worth_blocks: int = 0
    """How many these are."""
    from_host_pool: bool = False
    """True if all of these are in the host pool."""
    matched_step: int = 0
    """The step in whose planning it was matched last."""
    idle_step: int = NEVER
    """The step since which it is promised to an engine that does nothing else and has given no blocks."""
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
        self.idle_step = NEVER


@dataclass(slots=True, eq=False, weakref_slot=True)
class RequestState:
    """What is known of one request, until its last blocks are stored."""

    request: EngineRequest
    keys: BlockKeys
    blocks: Tables
    offered: list[int]
    """By group the leading blocks that the planner was offered for storing, or that nobody wants."""
    prompt_tokens: int
    """That the request came with."""
    computed_tokens: int = 0
    """Tokens whose KV is in `blocks`, as far as steps have reported. Those of steps under way come on top."""
    noted_units: int = 0
    """Complete once the steps under way have ended, see `StepsUnderWay`."""
    steps_under_way: int = 0
    """Those that complete blocks of it."""
    life: int = 0
    """Counts the times that it began anew, so that a step of before says nothing of its new blocks."""
    junctions: list[int] = field(default_factory=list)
    """Tokens at which other prompts are known to have left this one, see `Storing`."""
    finding: Finding = field(default_factory=Finding)
    may_load: bool = True
    """False after a load that failed: the request computes, so that it cannot fail in a circle."""
    may_store: bool = True
    """False while its blocks may hold KV from before a reset, or of a step that failed."""
    ended_s: float | None = None
    """When the request finished. None: it has not."""
    ended_step: int = 0
    """The last step that had been planned then."""
    no_store: bool = False
    """True if nothing that it computes shall be stored."""
    loads_all: bool = False
    """True if all is loaded that is found of it, however fast the engine computes."""
    owes_end: bool = False
    """True if the end of the request is a boundary whose blocks are to be offered."""

    @property
    def has_ended(self) -> bool:
        """True if the request has finished, and no step under way completes blocks of it."""
        return self.ended_s is not None and not self.steps_under_way

    def complete_tokens(self) -> int:
        """Count the leading tokens whose KV may be stored."""
        # The last token's KV is not computed yet, and tokens a drafting model proposed are not in
        # the request before they are accepted.
        return min(self.computed_tokens, self.request.num_tokens - 1) if self.may_store else 0

    def complete_blocks(self, group: int, block_tokens: int) -> int:
        """Count the leading blocks of a group that may be stored, offered or not."""
        return min(self.complete_tokens() // block_tokens, len(self.blocks[group]))

    def is_to_offer(self, groups: Sequence[KvGroup]) -> bool:
        """Return True if blocks of it are to be offered, now or when steps have ended."""
        return (
            self.may_store
            and not self.no_store
            and bool(
                self.steps_under_way
                or self.owes_end
                or any(
                    self.complete_blocks(at, group.block_tokens) > self.offered[at]
                    for at, group in enumerate(groups)
                )
            )
        )

    def begin_anew(self, blocks: Tables) -> None:
        """Take other blocks, of which nothing is computed yet."""
        self.blocks, self.life = blocks, self.life + 1
        self.computed_tokens = self.noted_units = 0

    def forget(self, keys: BlockKeys) -> None:
        """Go on under other keys: nothing known of before is true of them."""
        keys.wish = self.keys.wish
        self.keys, self.offered = keys, [0] * len(self.offered)
        self.finding.clear()
        if any(self.blocks):
            self.may_store = False
            self.begin_anew(self.blocks)
