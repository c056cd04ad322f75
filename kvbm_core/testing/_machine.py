"""Random programs of submits, polls, discards and restarts, compared with the memory tier."""

from __future__ import annotations

import itertools
from typing import Any, Final

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from kvbm_core.config import ByteSize
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing._rig import NAMESPACE, Memory, Rig, check_words, content_of, key_of
from kvbm_core.tier import Completion, Op, Outcome, TierContext, Transfer

__all__ = ["run_machine"]

_MOST_KEYS: Final = 12
_STEPS: Final = 40
_PHASES = tuple(Phase)
_SOME: Final = st.sets(st.integers(0, _MOST_KEYS - 1), min_size=1, max_size=6)


class _Machine(RuleBasedStateMachine):
    """Keys are few, so that they meet; never two transfers of one key at once, so that the end is certain."""

    rig: Rig
    numbers: Any

    def __init__(self) -> None:
        super().__init__()
        self.tier = self.rig.open()
        capacity = self.tier.capabilities.capacity_blocks
        self.keys = list(range(_MOST_KEYS if capacity is None else min(_MOST_KEYS, capacity)))
        # What earlier examples left in a durable tier is none of this one's.
        self.base = next(self.numbers) * _MOST_KEYS
        self.tier.discard(list(self.tier.inventory()))
        nbytes = self.rig.block_bytes
        config = MemoryConfig(capacity=ByteSize(nbytes * _MOST_KEYS))
        self.oracle = MemoryTier(config, TierContext(NAMESPACE, nbytes))
        self.restarted = False
        self.flying: dict[int, tuple[Transfer, int, Memory, Completion, bytes]] = {}

    def _idle(self, wanted: set[int]) -> list[int]:
        busy = {number for _, number, _, _, _ in self.flying.values()}
        room = self.tier.capabilities.queue_depth - len(self.flying)
        numbers = sorted({self.base + self.keys[w % len(self.keys)] for w in wanted} - busy)
        return numbers[: max(0, room)]

    @rule(wanted=_SOME, op=st.sampled_from(list(Op)), wait=st.booleans())
    def submit(self, wanted: set[int], op: Op, *, wait: bool) -> None:
        """Start transfers; the oracle says at once how each ends."""
        batch = []
        for number in self._idle(wanted):
            content = content_of(number, self.rig.block_bytes) if op is Op.STORE else None
            memory, mirror = Memory(self.rig.block_bytes, content), Memory(self.rig.block_bytes, content)
            transfer = self.rig.transfer(op, number, None if op is Op.LOOKUP else memory)
            reference = Transfer(transfer.ticket, op, transfer.key, mirror.region)
            self.oracle.submit([reference])
            [expected] = self.oracle.poll()
            self.flying[transfer.ticket] = (transfer, number, memory, expected, mirror.read())
            batch.append(transfer)
        self.tier.submit(batch)
        if wait:
            self.finish()

    @rule()
    def poll(self) -> None:
        """Take what has come."""
        self._compare(self.tier.poll())

    @rule()
    def finish(self) -> None:
        """Wait for everything."""
        transfers = [transfer for transfer, _, _, _, _ in self.flying.values()]
        self._compare(self.rig.wait(self.tier, transfers).values())

    @rule(wanted=_SOME)
    def discard(self, wanted: set[int]) -> None:
        """Forget blocks that have no transfer in flight."""
        keys = [key_of(number) for number in self._idle(wanted)]
        self.tier.discard(keys)
        self.oracle.discard(keys)

    @precondition(lambda self: self.tier.capabilities.durable and not self.restarted)
    @rule()
    def restart(self) -> None:
        """Close and open; a tier that lists its blocks lists these."""
        self.restarted = True  # Once a program is enough; opening a tier can take long.
        self.finish()
        self.rig.close(self.tier)
        self.tier = self.rig.open()
        if not self.tier.capabilities.remote_lookup:
            known = {key_of(self.base + key) for key in self.keys if self._known(self.base + key)}
            assert set(self.tier.inventory()) == known

    def _known(self, number: int) -> bool:
        self.oracle.submit([Transfer(0, Op.LOOKUP, key_of(number))])
        return self.oracle.poll()[0].outcome is Outcome.DONE

    def _compare(self, completions: Any) -> None:
        # What has come is no longer awaited, whatever is wrong with it.
        come = [(completion, self.flying.pop(completion.ticket, None)) for completion in completions]
        for completion, flight in come:
            check_words(completion)
            assert flight is not None, f"{completion} was not asked for, or came twice"
            transfer, number, memory, expected, content = flight
            what = f"{transfer.op.value} of block {number}"
            assert completion.outcome is expected.outcome, (
                f"{what}: {completion}, the memory tier: {expected}"
            )
            assert memory.read() == content, f"{what}: other bytes than the memory tier's"
            assert memory.sound, f"{what}: bytes outside the region's pages were written"

    def teardown(self) -> None:
        """Close the tier, which ends what is in flight."""
        self.rig.close(self.tier)


def run_machine(rig: Rig, programs: int) -> None:
    """Run so many random programs on the rig's backend.

    Raises:
        AssertionError: With the shortest program that fails, and what replays it.
    """
    made = type("Machine", (_Machine,), {"rig": rig, "numbers": itertools.count(1000)})
    run_state_machine_as_test(
        made,
        settings=settings(
            max_examples=programs,
            stateful_step_count=_STEPS,
            deadline=None,
            phases=_PHASES,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
