"""Replays of one trace at several sizes and with several policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvbm_core.config import PartEntry
from kvbm_core.registry import Registry
from kvbm_replay._answer import LoadAnswer, MachineAnswer, RowNames, TraceAnswer, make_row
from kvbm_replay._driver import replay
from kvbm_replay._layout import Layout
from kvbm_replay._machine import Machine
from kvbm_replay._reference import belady_hits, lru_hits, reuse_hits
from kvbm_replay.trace import Keys, Trace

__all__ = ["Sweep", "run_sweep"]


@dataclass(frozen=True, slots=True)
class Sweep:
    """What shall be replayed."""

    stacks: Sequence[tuple[str, Layout]]
    """Each with what a table calls it."""
    machine: Machine
    varied: str | None = None
    """The tier whose size is varied. None: the first."""
    sizes: Sequence[int] = ()
    """Blocks that it holds. Empty: as configured."""
    policies: Sequence[str] = ()
    """Of every tier. Empty: as configured."""
    engine_blocks: int | None = None
    """Of the engine's own prefix cache. None: as recorded, or none."""
    paced: bool = False
    references: bool = True
    """True if LRU and Belady are computed, too."""

    def layouts(self) -> Iterator[tuple[str, str, Layout]]:
        """Give every stack in every size, with its name and that of its policies."""
        sizes: Sequence[int | None] = self.sizes or [None]
        for blocks in sizes:
            for stack, layout in self.stacks:
                at = layout.position(self.varied) if self.varied else 0
                sized = layout if blocks is None else layout.with_blocks(at, blocks)
                for policy in self.policies:
                    yield stack, policy, sized.with_policy(PartEntry(name=policy, settings={}))
                if not self.policies:
                    yield stack, _policy_names(sized), sized


def run_sweep(trace: Trace, sweep: Sweep) -> LoadAnswer:
    """Replay a trace through every stack of a sweep."""
    registry, keys, rows = Registry(), Keys(), []
    engine_blocks = sweep.engine_blocks or 0
    known: dict[int, tuple[float, float]] = {}
    for stack, policy, layout in sweep.layouts():
        outcome = replay(
            trace, layout, sweep.machine, registry=registry, keys=keys, engine_blocks=sweep.engine_blocks,
            paced=sweep.paced,
        )  # fmt: skip
        references: tuple[float | None, float | None] = (None, None)
        if sweep.references and trace.is_plain:
            total = trace.unique if layout.blocks is None else layout.blocks + engine_blocks
            if total not in known:
                known[total] = _references(trace, total)
            references = known[total]
        names = RowNames(stack, policy)
        rows.append(make_row(names, layout, engine_blocks, trace.block_tokens, outcome, references))
    tokens = sum(request.input_tokens for request in trace.requests)
    return LoadAnswer(
        trace=TraceAnswer.of(trace, reuse_hits(trace.requests)),
        machine=MachineAnswer.of(sweep.machine, [layout for _, layout in sweep.stacks], paced=sweep.paced),
        uncached_first_token_s=tokens / sweep.machine.prefill_tokens_per_s / len(trace.requests),
        rows=tuple(rows),
    )


def _references(trace: Trace, blocks: int) -> tuple[float, float]:
    accesses = max(1, trace.accesses)
    requests = trace.requests
    return lru_hits(requests, blocks) / accesses, belady_hits(requests, blocks) / accesses


def _policy_names(layout: Layout) -> str:
    names = [entry.policy.name if entry.policy else "lru" for entry in layout.config.tiers]
    return names[0] if len(set(names)) == 1 else ", ".join(names)
