"""From a vLLM step to a neutral one: its KV groups in the order of ours, and what it writes beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvbm_engine import GroupBlocks, Schedule, Scheduled, State
from kvbm_vllm._groups import EngineGroups

__all__ = ["ScheduleReader"]


class ScheduleReader:
    """Reads what vLLM has scheduled.

    Args:
        groups: The KV groups of the model.
    """

    def __init__(self, groups: EngineGroups) -> None:
        self._numbers = groups.numbers
        self._others = [number for number in range(groups.total) if number not in groups.numbers]
        self._positions = {number: at for at, number in enumerate(groups.numbers)}
        self._in_order = groups.numbers == tuple(range(groups.total))

    def __repr__(self) -> str:
        return f"<ScheduleReader {len(self._numbers)} KV groups of {len(self._numbers) + len(self._others)}>"

    def tables(self, blocks: Sequence[Sequence[int]]) -> GroupBlocks:
        """Put vLLM's blocks of each KV group into our order: those that are stored, then all others."""
        if self._in_order:
            return blocks
        others = [[block for block in blocks[number] if block] for number in self._others]
        return [*(blocks[number] for number in self._numbers), *others]

    def schedule(self, output: Any) -> Schedule:
        """Translate a step."""
        counts, tables = output.num_scheduled_tokens, self.tables
        requests: list[Scheduled] = [
            (new.req_id, new.num_computed_tokens, counts[new.req_id], tables(new.block_ids), True)
            for new in output.scheduled_new_reqs
        ]
        cached = output.scheduled_cached_reqs
        resumed = cached.resumed_req_ids
        requests += [
            (name, computed, counts[name], tables(groups) if groups else (), name in resumed)
            for name, computed, groups in zip(
                cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
            )
        ]
        copies = getattr(output, "kv_cache_block_copies", None) or ()
        return Schedule(
            requests,
            output.total_num_scheduled_tokens,
            output.preempted_req_ids or (),
            self._states(output),
            [copy.dst_block_id for copy in copies],
        )

    def _states(self, output: Any) -> dict[str, list[State]]:
        """Give the recurrent states that vLLM hands over in this step, and in no other."""
        found = getattr(output, "kv_connector_block_state", None)
        offloads = getattr(found, "boundary_state_offloads", None)
        if not offloads:
            return {}
        return {
            name: [
                (self._positions[number], block, tokens)
                for number, block, tokens in states
                if number in self._positions
            ]
            for name, states in offloads.items()
        }
