"""What is loaded of a prompt, and when: found in the tiers, weighed against computing, and given its turn."""

from __future__ import annotations

from kvbm_core import Match, Planner
from kvbm_engine._ledger import Ledger
from kvbm_engine._requests import Finding, RequestState
from kvbm_engine._values import EngineRequest
from kvbm_metrics import Tally

__all__ = ["Matching"]


class Matching:
    """Finds what can be loaded of each request, and plans its load.

    Args:
        ledger: The requests.
        planner: Knows where blocks are.
        tally: Counts what is found.
        max_load_blocks: Device blocks that may be parked at once.
        joins: True if a step can wait for the load of its blocks, on every rank.
    """

    def __init__(
        self, ledger: Ledger, planner: Planner, tally: Tally, max_load_blocks: int, *, joins: bool
    ) -> None:
        self._ledger = ledger
        self._planner = planner
        self._tally = tally
        self._max_load_blocks = max_load_blocks
        self.joins = joins
        self._load_blocks: set[int] = set()
        """Device blocks of the loads planned since the last step."""

    def __repr__(self) -> str:
        return f"<Matching {self._ledger.parked!r}, at most {self._max_load_blocks}>"

    def match(
        self, request: EngineRequest, computed_tokens: int, now_s: float, *, reads_cache: bool
    ) -> tuple[int | None, bool]:
        """Say how many tokens after `computed_tokens` can be loaded, see `Session.match`."""
        ledger = self._ledger
        if ledger.look_at(request, computed_tokens):
            return None, False
        state = ledger.state(request)
        if state is None:
            return 0, False
        size, finding = ledger.block_tokens, state.finding
        finding.is_counted, finding.matched_step = True, ledger.steps.number
        start, inside = divmod(computed_tokens, size)
        # At least one token must be computed, so that there is something to sample from.
        stop = (request.num_tokens - 1) // size
        if not state.may_load or inside or stop <= start or not reads_cache:
            return 0, False
        if finding.is_held and self._waits_for_room(state, start, stop):
            return None, False
        finding.is_held = False
        match = self._planner.find(state.keys, start, stop, now_s, finding.match)
        finding.match = match
        if match.lookups:  # A remote tier must be asked; the answer comes by its deadline.
            return None, False
        if match is not finding.judged:
            self._judge(finding, match, now_s)
        finding.is_counted = False
        if not finding.worth_blocks:
            return 0, False
        finding.is_held = self._exceeds_room(finding.worth_blocks)
        if finding.is_held:
            return None, False
        finding.in_step = finding.from_host_pool and self.does_nothing_else()
        return finding.worth_blocks * size, not finding.in_step

    def count(self, finding: Finding) -> None:
        """Have metrics count a request's finding, once, however often it was asked for before."""
        match = finding.match
        if match is None or finding.is_counted:
            return
        self._tally.matched(match.stop - match.start, match.tiers)
        self._planner.decline(match.tiers[finding.worth_blocks :])
        finding.is_counted = True

    def load(self, state: RequestState, start: int, count: int, now_s: float) -> None:
        """Plan to load `count` blocks of a request from `start` on; the engine was promised them."""
        finding, name = state.finding, state.request.request_id
        keys = state.keys.slice(start, start + count)
        tiers = finding.match.tiers[:count] if finding.match else []
        if len(tiers) < count or finding.matched_step != self._ledger.steps.number:
            # Since then blocks may have gone, or all may have been reset. Those that are not there fail.
            tiers = self._planner.match(keys, now_s)
            tiers += [0] * (count - len(tiers))
            finding.in_step = False
        if not finding.in_step:
            self._ledger.parked.add(name, len(state.blocks), loading_blocks=count)
        blocks = state.blocks[start : start + count]
        self._load_blocks.update(blocks)
        self._planner.cost_model.tried(tiers, now_s)
        self._planner.load(name, keys, blocks, tiers, in_step=finding.in_step)

    def take_load_blocks(self) -> set[int]:
        """Give the device blocks of the loads planned since the last call."""
        taken, self._load_blocks = self._load_blocks, set()
        return taken

    def does_nothing_else(self) -> bool:
        """Return True if the step that computes the rest of a prompt can wait for a load, on the device.

        That saves the request two or three steps of the engine, and the engine prepares its computation
        while the bytes come. Whatever else is in the step waits, too: so only where there is nothing else.
        """
        ledger = self._ledger
        return self.joins and not (ledger.others or ledger.steps or ledger.parked)

    def _exceeds_room(self, blocks: int) -> bool:
        """Return True if too many blocks would be parked with those of one more load.

        What does not run cannot be preempted: with all blocks parked nobody could go on.
        """
        parked = self._ledger.parked
        return bool(parked.blocks) and bool(parked.in_need or parked.blocks + blocks > self._max_load_blocks)

    def _waits_for_room(self, state: RequestState, start: int, stop: int) -> bool:
        """Return True for a request that still waits because too many blocks are parked.

        All that wait are asked for in each step. Whether the tiers still have all that was found is looked up
        when there is room; here only whether they have anything of it. If not, it need not wait.
        """
        finding = state.finding
        match = finding.match
        if match is None or match.stop != stop:
            return False
        ahead = start - match.start
        if not 0 <= ahead < finding.worth_blocks or not self._exceeds_room(finding.worth_blocks - ahead):
            return False
        return self._planner.is_ready(state.keys[start], match.tiers[ahead])

    def _judge(self, finding: Finding, match: Match, now_s: float) -> None:
        """Choose how much of a finding is worth loading, once: the engine asks until it has room for it."""
        last, finding.judged = finding.judged, match
        if last is None or (last.start, last.tiers) != (match.start, match.tiers):
            finding.worth_blocks = self._planner.cost_model.blocks_to_load(match.tiers, now_s)
        host_pool = self._planner.host_pool
        finding.from_host_pool = all(tier == host_pool for tier in match.tiers[: finding.worth_blocks])
