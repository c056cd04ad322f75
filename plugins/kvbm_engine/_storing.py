"""When a block is stored: its tokens are final, and a step has reported its KV as computed.

    step k     schedules tokens up to n          (their KV will be written)
    outcome k  says that it has been computed    (a step that failed has none)
    step k+1   plans blocks below n // block     (each rank gathers *before* anything of k+1 is computed)

Therefore the engine may give the blocks away in step k+1, to a finished or preempted request's successor,
and nothing has to be held back or waited for. What a finished request has left waits a little, until its
blocks are given away at the latest: the next request often comes at once, and what storing costs the
interpreter would delay its first kernels; a moment later the accelerator has work to do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Container, Sequence

from kvbm_core import BlockKey, Origin, Plan, Planner
from kvbm_core.groups import Rule
from kvbm_engine._ledger import Ledger
from kvbm_engine._requests import RequestState
from kvbm_engine._spans import Spans
from kvbm_engine._sparse import SparseStores, prompt_ends
from kvbm_engine._values import EngineRequest

__all__ = ["Storing"]


class Storing:
    """Offers blocks to the planner as soon as they may be stored.

    Args:
        ledger: The requests.
        planner: Is offered the blocks.
        stores: Chooses blocks of the KV groups of which a prefix does not need all.
        junction: Says at how many tokens others have left a request's prompt, as far as the engine knows.
        spans: Is told whose blocks are stored.
    """

    def __init__(
        self,
        ledger: Ledger,
        planner: Planner,
        stores: SparseStores,
        junction: Callable[[EngineRequest], int] = lambda _: 0,
        spans: Spans | None = None,
    ) -> None:
        self._ledger = ledger
        self._planner = planner
        self._stores = stores
        self._junction = junction
        self._spans = spans
        self.blocks_final = True
        """True if every block offered since the last step was computed before the latest step that overwrites
        blocks."""
        self._written_step = 0
        """The latest step that overwrites blocks."""
        self.on_offer: Callable[[str, int, float], None] | None = None
        """Is told what was offered: the request's name, its leading tokens, and the time."""

    def __repr__(self) -> str:
        return f"<Storing: step {self._written_step} overwrote blocks last>"

    def offer_confirmed(self, now_s: float) -> None:
        """Offer what became certain."""
        for state in self._ledger.take_confirmed():
            self.offer(state, now_s)

    def offer_due(self, now_s: float, written: Container[int]) -> None:
        """Offer what finished requests have left, if it has waited long enough or may be overwritten now."""
        for state in self._ledger.take_due(now_s, written):
            self.offer(state, now_s, final=state.ended_step < self._written_step)

    def offer(self, state: RequestState, now_s: float, *, final: bool = False) -> None:
        """Offer the blocks that are complete now and were not offered before."""
        if state.no_store:
            return
        ended = state.owes_end and state.has_ended
        for at, group in enumerate(self._ledger.groups):
            complete, offered = state.complete_blocks(at, group.block_tokens), state.offered[at]
            if at in self._ledger.drafts:
                # The last token is not certain, neither where the request was aborted.
                certain = (state.complete_tokens() - 1) // group.block_tokens
                complete = max(offered, min(complete - (not state.has_ended), certain))
            if complete <= offered and not ended:
                continue
            state.offered[at] = max(complete, offered)
            if at in self._ledger.sparse:
                places = self._places(state, at, offered, complete, ended=ended)
                first = places[0] if places else 0
                run = state.keys.slice(first, places[-1] + 1, at) if places else []
                keys = [run[place - first] for place in places]
                self._offer(state, at, places, keys, now_s, final=final)
            else:
                keys = state.keys.slice(offered, complete, at)
                self._offer(state, at, range(offered, complete), keys, now_s, final=final)
        state.owes_end &= not ended
        if self.on_offer:
            self.on_offer(state.request.request_id, state.complete_tokens(), now_s)

    def _offer(
        self, state: RequestState, at: int, places: Sequence[int], keys: Sequence[BlockKey], now_s: float,
        *, final: bool,
    ) -> None:  # fmt: skip
        """Offer blocks of a KV group; those of the prompt and those that were generated, each for itself."""
        prompt_blocks = state.prompt_tokens // self._ledger.groups[at].block_tokens
        cut = bisect_left(places, prompt_blocks)
        for part in (slice(cut), slice(cut, None)):
            if some := places[part]:
                self.blocks_final &= final
                blocks = [state.blocks[at][place] for place in some]
                origin = Origin(some[0], prompt_blocks)
                ops = self._planner.store(keys[part], blocks, state.keys, now_s, at, origin)
                if self._spans:
                    self._spans.offered(ops, state.request)

    def _places(self, state: RequestState, at: int, offered: int, complete: int, *, ended: bool) -> list[int]:
        """Choose blocks of a group of which a prefix does not need all: those that some boundary needs."""
        group, table = self._ledger.groups[at], state.blocks[at]
        if group.coverage.rule is Rule.STATE:
            return [place for place in range(offered, complete) if table[place]]
        alignment = self._ledger.alignment
        marks = [*prompt_ends(state.prompt_tokens, alignment), *state.junctions]
        marks.append(self._junction(state.request))
        first = offered
        if ended:
            marks.append(state.complete_tokens() // alignment * alignment)
            first = min(offered, group.first_block(marks[-1]))
        places = self._stores.wanted(group, first, complete, marks, alignment)
        return [place for place in places if table[place]]

    def planned(self, plan: Plan) -> None:
        """Note that a step's plan was taken, and what it writes."""
        self.blocks_final = True
        if plan.overwrites or plan.loads:
            self._written_step = self._ledger.steps.number
