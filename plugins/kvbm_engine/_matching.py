"""What is loaded of a prompt, and when: found in the tiers, weighed against computing, and given its turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from kvbm_core import Planner
from kvbm_core.leader.finding.boundaries import Part
from kvbm_core.leader.finding.group_matches import GroupMatch
from kvbm_engine._ledger import Admission, Ledger
from kvbm_engine._requests import NEVER, RequestState, Tables
from kvbm_engine._search import make_search
from kvbm_engine._values import EngineRequest
from kvbm_metrics import Tally

__all__ = ["Matching"]


_IDLE_STEPS: Final = 16
"""Steps that a request waits for blocks of an engine that does nothing else, before it is computed."""


class _Target(NamedTuple):
    """Device blocks of one KV group that are to be filled."""

    group: int
    first: int
    """The place of the first one in the request's table."""
    blocks: list[int]


class Matching:
    """Finds what can be loaded of each request, and plans its load.

    Args:
        ledger: The requests.
        planner: Knows where blocks are.
        tally: Counts what is found.
        max_load_blocks: Device blocks that may be parked at once.
        joins: True if a step can wait for the load of its blocks, on every rank. With several KV groups none
            does: an engine may prepare a state for the step before the load has begun.
    """

    def __init__(
        self, ledger: Ledger, planner: Planner, tally: Tally, max_load_blocks: int, *, joins: bool
    ) -> None:
        self._ledger = ledger
        self._planner = planner
        self._tally = tally
        self._search = make_search(planner, ledger.groups, is_plain=ledger.is_plain)
        self._max_load_blocks = max_load_blocks
        self.joins = joins and ledger.is_plain
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
        start, finding = computed_tokens, state.finding
        finding.is_counted, finding.matched_step = True, ledger.steps.number
        # At least one token must be computed, so that there is something to sample from.
        stop = (request.num_tokens - 1) // ledger.alignment * ledger.alignment
        if not state.may_load or start % ledger.alignment or stop <= start or not reads_cache:
            return 0, False
        if finding.is_held and self._waits_for_room(state, start, stop):
            return None, False
        finding.is_held = False
        if finding.idle_step + _IDLE_STEPS < ledger.steps.number and ledger.is_idle:
            # Nobody else has blocks, and the engine has given none for a load: it never will.
            return 0, False
        match = finding.match = self._search.find(state, start, stop, now_s)
        finding.start, finding.stop = start, stop
        if match.lookups:  # A remote tier must be asked; the answer comes by its deadline.
            return None, False
        if match is not finding.judged:
            self._judge(state, now_s)
        finding.is_counted = False
        if not finding.worth_tokens:
            return 0, False
        finding.is_held = self._exceeds_room(finding.worth_blocks)
        if finding.is_held:
            return None, False
        finding.in_step = finding.from_host_pool and self.does_nothing_else()
        finding.idle_step = min(finding.idle_step, ledger.steps.number) if ledger.is_idle else NEVER
        return finding.worth_tokens, not finding.in_step

    def count(self, state: RequestState) -> None:
        """Have metrics count a request's finding, once, however often it was asked for before."""
        finding = state.finding
        if finding.match is None or finding.is_counted:
            return
        counted = self._search.count(state)
        self._tally.matched(counted.asked_tokens, counted.asked_blocks, counted.tiers)
        self._planner.decline(counted.declined)
        finding.is_counted = True

    def load(self, state: RequestState, admission: Admission, tokens: int, now_s: float) -> None:
        """Plan to load so many tokens of a request; the engine was promised them.

        The engine's tables say which blocks: it reads every block that it has given, and no other.
        """
        finding, start = state.finding, admission.had_tokens
        is_fresh = finding.matched_step == self._ledger.steps.number and finding.start == start
        known = {part.group: part for part in finding.parts} if is_fresh and finding.match else {}
        parts = [*self._needed(admission.tables, start, start + tokens)]
        if not all(_covers(known.get(part.group), part) for part in parts):
            # Since then blocks may have gone, or all may have been reset. Those that are not there fail.
            known = {part.group: self._find_again(state, part, now_s) for part in parts}
            finding.in_step = False
        if not finding.in_step:
            count = sum(len(part.blocks) for part in parts)
            self._ledger.parked.add(
                state.request.request_id, self._held(admission.tables), loading_blocks=count
            )
        for part in parts:
            self._load(state, part, known[part.group].tiers[: len(part.blocks)], now_s)

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

    def _needed(self, tables: Tables, start: int, stop: int) -> Iterator[_Target]:
        """List the blocks that the engine has given for these tokens, by group."""
        for at, (group, table) in enumerate(zip(self._ledger.groups, tables, strict=True)):
            first, last = start // group.block_tokens, stop // group.block_tokens
            if at in self._ledger.sparse:
                given = last
                while given > first and table[given - 1]:
                    given -= 1
                first = given
            if first < last:
                yield _Target(at, first, table[first:last])

    def _find_again(self, state: RequestState, target: _Target, now_s: float) -> Part:
        keys = state.keys.slice(target.first, target.first + len(target.blocks), target.group)
        tiers = self._planner.match(keys, now_s)
        return Part(target.group, target.first, tiers + [0] * (len(keys) - len(tiers)))

    def _load(self, state: RequestState, target: _Target, tiers: list[int], now_s: float) -> None:
        group, first, blocks = target
        keys = state.keys.slice(first, first + len(blocks), group)
        self._load_blocks.update(blocks)
        self._planner.cost_model.tried(tiers, now_s)
        self._planner.load(
            state.request.request_id, keys, blocks, tiers,
            in_step=state.finding.in_step, group=group, head=state.keys.at(0, group),
            # What the host pool keeps of one group must not push out another.
            prefix=() if self._ledger.is_plain else state.keys,
        )  # fmt: skip

    def _held(self, tables: Tables) -> int:
        """Count the device blocks of a request."""
        nulls = sum(tables[at].count(0) for at in self._ledger.sparse)
        return sum(map(len, tables)) - nulls

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
        if finding.match is None or finding.stop != stop:
            return False
        ahead = start - finding.start
        if not 0 <= ahead < finding.worth_tokens:
            return False
        group, first, tiers = finding.parts[0]
        at = start // self._ledger.groups[group].block_tokens
        if at < first:
            at = first
        if not self._exceeds_room(finding.worth_blocks - (at - first)):
            return False
        return self._planner.is_ready(state.keys.at(at, group), tiers[at - first])

    def _judge(self, state: RequestState, now_s: float) -> None:
        """Choose how much of a finding is worth loading, once: the engine asks until it has room for it."""
        finding, host_pool = state.finding, self._planner.host_pool
        finding.worth_tokens, finding.parts = self._search.weigh(state, now_s)
        finding.worth_blocks = sum(len(part.tiers) for part in finding.parts)
        finding.judged = finding.match
        finding.from_host_pool = all(tier == host_pool for part in finding.parts for tier in part.tiers)
        match = finding.match
        if isinstance(match, GroupMatch) and match.boundaries.reach > match.start + finding.worth_tokens:
            # Others have stored so far, and gone on otherwise: whoever follows will want to begin here.
            state.junctions = [*{*state.junctions, match.boundaries.reach}]


def _covers(known: Part | None, target: _Target) -> bool:
    """Return True if a finding says where each of the blocks is."""
    return known is not None and known.first == target.first and len(known.tiers) >= len(target.blocks)
