"""An engine without a model: the leader's session as an engine has it, and requests known by hashes alone.

    arrive ──► look ──► load ──► compute … compute ──► end

Each verb tells the session what an engine would tell it, so that matching, loading, storing, reading ahead
and models with several KV groups are what they are there. Time is the machine's.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from kvbm_core import BlockKey, Load, Plan, Planner, Reason, TierCounts
from kvbm_core.groups import KvGroup, Rule
from kvbm_core.leader.endings import Took
from kvbm_core.registry import Registry
from kvbm_engine import (
    BlockKeys,
    Ledger,
    Limits,
    Parked,
    Schedule,
    Scheduled,
    Session,
    State,
    Storing,
    sparse_stores,
)
from kvbm_metrics import Tally
from kvbm_replay._layout import Layout
from kvbm_replay._ranks import Ranks
from kvbm_replay.trace import Keys

__all__ = ["Prompt", "ReplayEngine"]

_NO_LIMIT: Final = 1 << 62
"""Of device blocks: what an engine without room did is in the recording."""
_HOLD_S: Final = 0.02
"""What a finished request has left is stored within it."""


class _Hits(Tally):
    """Counts what is found, and nothing that only metrics want."""

    def __init__(self, planner: Planner) -> None:
        super().__init__(planner, 0)
        self.asked_blocks = 0
        self.found: Counter[int] = Counter()
        """Blocks by the position of the tier that had them."""

    def matched(self, asked_tokens: int, asked_blocks: int, tiers: Sequence[int]) -> None:
        """Count one request's question."""
        self.asked_blocks += asked_blocks
        self.found.update(tiers)

    def planned(self, plan: Plan) -> None:
        """Nothing: no metric is read."""

    def ended(self, took: Iterable[Took], copied: Mapping[str, int]) -> None:
        """Nothing."""

    def loaded(self, load: Load, failures: Mapping[int, Reason]) -> None:
        """Nothing."""


class Prompt:
    """One request, as the session reads it.

    Args:
        name: Unlike any other's.
        numbers: Of the blocks of prompt and answer.
        tokens: Of the prompt.
        groups: The engine's KV groups.
        keys: Of numbered blocks.
    """

    __slots__ = (
        "all_token_ids", "keys", "left", "load_tokens", "looks", "num_computed_tokens", "num_tokens",
        "request_id", "trace_headers",
    )  # fmt: skip

    def __init__(
        self, name: str, numbers: Sequence[int], tokens: int, groups: Sequence[KvGroup], keys: Keys
    ) -> None:
        self.request_id = name
        self.all_token_ids: Sequence[int] = ()
        self.num_tokens = tokens
        self.num_computed_tokens = 0
        self.load_tokens = 0
        """That the last look found worth loading."""
        self.left = 0
        """Tokens to be computed before its first one comes out."""
        self.looks = 0
        """Times that it was looked up."""
        self.trace_headers: Mapping[str, str] | None = None
        self.keys = _NumberedKeys(self, groups, numbers, keys)

    def __repr__(self) -> str:
        return f"<Prompt {self.request_id}: {self.num_computed_tokens}/{self.num_tokens} tokens>"


class _NumberedKeys(BlockKeys):
    """The keys of one request's blocks, of which numbers are known in place of tokens."""

    __slots__ = ("_numbers", "_source", "blocks")

    def __init__(
        self, prompt: Prompt, groups: Sequence[KvGroup], numbers: Sequence[int], source: Keys
    ) -> None:
        super().__init__(prompt, groups, b"", lambda start, stop: {})
        self._numbers, self._source = numbers, source
        self.blocks = len(numbers)

    def digests(self, start: int, stop: int) -> list[BlockKey]:
        """Give those of numbered blocks."""
        return self._source.of(self._numbers[start:stop])


class ReplayEngine:
    """One engine over a stack that is not opened.

    Args:
        layout: The stack.
        ranks: Carry plans out.
        registry: Where policies are found.
        groups: The engine's KV groups.
        block_tokens: Tokens between two digests of a prefix.
    """

    def __init__(
        self, layout: Layout, ranks: Ranks, registry: Registry, groups: Sequence[KvGroup], block_tokens: int
    ) -> None:
        config = layout.config
        self.groups, self._ranks, self._block_tokens = groups, ranks, block_tokens
        sizes = layout.group_bytes
        self.planner = Planner(
            [layout.statuses()],
            max_store_blocks=config.max_store_blocks,
            groups=groups,
            policies=registry.policies(config),
            block_tokens=groups[sizes.index(max(sizes))].block_tokens if config.only_faster else 0,
            movements=[entry.movement for entry in config.tiers],
        )
        self._hits = _Hits(self.planner)
        ledger = Ledger(_keys_of, groups, Parked(_NO_LIMIT, one_queue=False))
        storing = Storing(ledger, self.planner, sparse_stores(config, groups))
        limits = Limits(0.0, 0.0, config.prefetch_fraction, config.load_deadline_s)
        self._session = Session(
            ledger, self.planner, self._hits, _NO_LIMIT, joins=False, storing=storing, limits=limits
        )
        self._states = [at for at, group in enumerate(groups) if group.coverage.rule is Rule.STATE]
        self._device_blocks = itertools.count(1)
        self._names = itertools.count()
        self._has_several = len(layout.tiers) > 1
        self.now_s = 0.0

    def __repr__(self) -> str:
        return f"<ReplayEngine at {self.now_s:.3f} s: {self._session!r}>"

    @property
    def asked_blocks(self) -> int:
        """Blocks that tiers were asked for, of all KV groups."""
        return self._hits.asked_blocks

    @property
    def found(self) -> Mapping[int, int]:
        """Blocks found, by the position of the tier."""
        return self._hits.found

    @property
    def counts(self) -> Mapping[str, TierCounts]:
        """What has happened so far, by the tier's name."""
        return self.planner.counts

    def prompt(self, numbers: Sequence[int], tokens: int, keys: Keys) -> Prompt:
        """Make a request."""
        return Prompt(str(next(self._names)), numbers, tokens, self.groups, keys)

    def arrive(self, prompt: Prompt) -> None:
        """Have a request wait: what it needs may be read ahead, from the next step on."""
        self._session.arrived(prompt, self.now_s)

    def turn(self, prompt: Prompt, engine_tokens: int) -> None:
        """Look a request up for which there is no room yet, see `look`."""
        self._session.match(prompt, engine_tokens, self.now_s, reads_cache=True)

    def look(self, prompt: Prompt, engine_tokens: int) -> int:
        """Look a request up and give it blocks.

        Args:
            prompt: The request.
            engine_tokens: Its leading tokens that the engine's own cache has.

        Returns:
            The tokens after these that are loaded. The load begins with the next step.
        """
        prompt.num_computed_tokens = engine_tokens
        tokens, _ = self._session.match(prompt, engine_tokens, self.now_s, reads_cache=True)
        while tokens is None:  # A tier is asked, or brings what the request waits for.
            self._step(_NOTHING)
            self.wait(self._ranks.next_s())
            tokens, _ = self._session.match(prompt, engine_tokens, self.now_s, reads_cache=True)
        tables = self._tables(prompt, engine_tokens + tokens)
        self._session.allocated(prompt, tables, tokens, self.now_s)
        prompt.load_tokens = tokens
        prompt.num_computed_tokens = engine_tokens + tokens
        return tokens

    def load(self, prompt: Prompt) -> float:
        """Wait until what was found of a request is loaded; give the seconds that it takes alone."""
        if not prompt.load_tokens:
            return 0.0
        prompt.load_tokens = 0
        self.run()
        load_s, end_s = self._ranks.loading(prompt.request_id)
        self.wait(end_s)
        return load_s

    def compute(self, prompts: Sequence[tuple[Prompt, int]], new_tokens: int, seconds: float) -> None:
        """Compute requests in one step, and have what is complete then be offered in the next.

        Args:
            prompts: Each with the tokens that it has computed after the step.
            new_tokens: That the step computes, of all.
            seconds: That this takes.
        """
        scheduled: list[Scheduled] = []
        states: dict[str, list[State]] = {}
        for prompt, tokens in prompts:
            had, name = prompt.num_computed_tokens, prompt.request_id
            prompt.num_computed_tokens = tokens
            prompt.num_tokens = max(prompt.num_tokens, tokens + 1)
            scheduled.append((name, had, tokens - had, (), False))
            if self._states:
                states[name] = [
                    (at, next(self._device_blocks), self._whole(at, tokens)) for at in self._states
                ]
        self._step(Schedule(scheduled, new_tokens, states=states), seconds)

    def end(self, prompt: Prompt, *, with_last: bool = False) -> None:
        """Forget a request, and offer what it has left.

        Args:
            prompt: The request.
            with_last: True if it ended before what it computed last was offered.
        """
        if not with_last:
            self.run()
        self._session.finished(prompt.request_id, self.now_s)
        if self._session.ledger.has_ended:
            self.wait(self.now_s + _HOLD_S)
            self.run()

    def wait(self, until_s: float) -> None:
        """Let time pass, and have the leader learn of each operation when it has ended."""
        for end_s, reports in self._ranks.ended(until_s):
            self.now_s = max(self.now_s, end_s)
            self._session.outcomes(reports, 0, {}, self.now_s)
            self.run()
        if until_s < _NO_LIMIT:
            self.now_s = max(self.now_s, until_s)

    def run(self) -> None:
        """Carry out what is planned, and what follows from that."""
        # One tier has nothing that follows: nothing is copied from one to another.
        while self._step(_NOTHING) and self._has_several and self.planner.busy(self.now_s):
            pass

    def _step(self, schedule: Schedule, seconds: float = 0.0) -> bool:
        """Make one step of the engine, and give True if there was anything to carry out."""
        step = self._session.step(schedule, self.now_s)
        reports = self._ranks.submit(step.plan, self.now_s)
        if seconds:
            self.wait(self.now_s + seconds)
        # A step that computes may be under way: with the outcome of a later one it would count as failed.
        self._session.outcomes(reports, step.number if step.computes else 0, {}, self.now_s)
        return bool(step.plan)

    def _tables(self, prompt: Prompt, boundary: int) -> list[list[int]]:
        """Give a request device blocks in each KV group, but for what a boundary has behind a window."""
        tables = []
        for group in self.groups:
            count = prompt.keys.blocks * self._block_tokens // group.block_tokens
            table = list(itertools.islice(self._device_blocks, count))
            first = min(count, group.first_block(boundary)) if boundary else 0
            table[:first] = [0] * first
            tables.append(table)
        return tables

    def _whole(self, group: int, tokens: int) -> int:
        """Round tokens down to a whole number of a group's blocks."""
        size = self.groups[group].block_tokens
        return tokens // size * size


_NOTHING: Final = Schedule([], 0)


def _keys_of(request: object) -> BlockKeys:
    """Give the keys that a request came with."""
    assert isinstance(request, Prompt)
    return request.keys
