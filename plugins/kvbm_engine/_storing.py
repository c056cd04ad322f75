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

from collections.abc import Container

from kvbm_core import Plan, Planner
from kvbm_engine._ledger import Ledger
from kvbm_engine._requests import RequestState

__all__ = ["Storing"]


class Storing:
    """Offers blocks to the planner as soon as they may be stored.

    Args:
        ledger: The requests.
        planner: Is offered the blocks.
    """

    def __init__(self, ledger: Ledger, planner: Planner) -> None:
        self._ledger = ledger
        self._planner = planner
        self.blocks_final = True
        """True if every block offered since the last step was computed before the latest step that overwrites
        blocks."""
        self._written_step = 0
        """The latest step that overwrites blocks."""

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
        complete, offered = state.complete_blocks(self._ledger.block_tokens), state.offered_blocks
        if complete <= offered:
            return
        self.blocks_final &= final
        keys = state.keys.slice(offered, complete)
        self._planner.store(keys, state.blocks[offered:complete], state.keys, now_s)
        state.offered_blocks = complete

    def planned(self, plan: Plan) -> None:
        """Note that a step's plan was taken, and what it writes."""
        self.blocks_final = True
        if plan.overwrites or plan.loads:
            self._written_step = self._ledger.steps.number
