"""Random programs of submits, polls, discards and restarts, compared with the memory tier."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Final

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from kvbm_core.config import ByteSize
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing._rig import NAMESPACE, Memory, Rig, check_words, content_of, key_of, lengths
from kvbm_core.tier import Completion, Op, Outcome, TierContext, Transfer

__all__ = ["run_machine", "settings_of"]

_MOST_KEYS: Final = 12
_STEPS: Final = 40
_PHASES = tuple(Phase)
_SOME: Final = st.sets(st.integers(0, _MOST_KEYS - 1), min_size=1, max_size=6)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A transfer under way, and how it must end."""

    transfer: Transfer
    number: int
    memory: Memory
    expected: Completion
    content: bytes
    """Of the region afterwards."""


class _Machine(RuleBasedStateMachine):
    """Keys are few, so that they meet; never two transfers of one key at once, so that the end is certain."""

    rig: Rig
    numbers: Any

    def __init__(self) -> None:
        super().__init__()
        self.tier = self.rig.open()
        longest = self.rig.max_bytes
        capacity_bytes = self.tier.capabilities.capacity_bytes
        room = (
            _MOST_KEYS if capacity_bytes is None else capacity_bytes // self.tier.capabilities.charge(longest)
        )
        self.keys = list(range(min(_MOST_KEYS, room)))
        # What earlier examples left in a durable tier is none of this one's.
        self.base = next(self.numbers) * _MOST_KEYS
        self.tier.discard([key for key, _ in self.tier.inventory()])
        config = MemoryConfig(capacity=ByteSize(longest * _MOST_KEYS))
        self.oracle = MemoryTier(config, TierContext(NAMESPACE, longest))
        self.restarted = False
        self.flying: dict[int, _Flight] = {}

    def _idle(self, wanted: set[int]) -> list[int]:
        busy = {flight.number for flight in self.flying.values()}
        room = self.tier.capabilities.queue_depth - len(self.flying)
        numbers = sorted({self.base + self.keys[w % len(self.keys)] for w in wanted} - busy)
        return numbers[: max(0, room)]

    @rule(wanted=_SOME, op=st.sampled_from(list(Op)), size=st.integers(0, _MOST_KEYS), wait=st.booleans())
    def submit(self, wanted: set[int], op: Op, size: int, *, wait: bool) -> None:
        """Start transfers with regions of several lengths; the oracle says at once how each ends."""
        batch = []
        known = lengths(self.rig.max_bytes)
        for number in self._idle(wanted):
            # Most loads have room for the longest object.
            nbytes = known[0 if op is Op.LOAD and size % 3 else (number + size) % len(known)]
            content = content_of(number, nbytes) if op is Op.STORE else None
            memory, mirror = Memory(nbytes, content), Memory(nbytes, content)
            transfer = self.rig.transfer(op, number, None if op is Op.LOOKUP else memory)
            reference = Transfer(transfer.ticket, op, transfer.key, mirror.region)
            self.oracle.submit([reference])
            [expected] = self.oracle.poll()
            self.flying[transfer.ticket] = _Flight(transfer, number, memory, expected, mirror.read())
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
        transfers = [flight.transfer for flight in self.flying.values()]
        self._compare(self.rig.wait(self.tier, transfers).values())

    @rule(wanted=_SOME)
    def discard(self, wanted: set[int]) -> None:
        """Forget objects that have no transfer in flight."""
        keys = [key_of(number) for number in self._idle(wanted)]
        self.tier.discard(keys)
        self.oracle.discard(keys)

    @precondition(lambda self: self.tier.capabilities.durable and not self.restarted)
    @rule()
    def restart(self) -> None:
        """Close and open; a tier that lists its objects lists these."""
        self.restarted = True  # Once a program is enough; opening a tier can take long.
        self.finish()
        self.rig.close(self.tier)
        self.tier = self.rig.open()
        if not self.tier.capabilities.remote_lookup:
            known = {key_of(self.base + key): self._length(self.base + key) for key in self.keys}
            assert dict(self.tier.inventory()) == {key: nbytes for key, nbytes in known.items() if nbytes}

    def _length(self, number: int) -> int:
        """Give the length of an object as the oracle has it, 0 if it has none."""
        self.oracle.submit([Transfer(0, Op.LOOKUP, key_of(number))])
        return self.oracle.poll()[0].nbytes

    def _compare(self, completions: Any) -> None:
        # What has come is no longer awaited, whatever is wrong with it.
        come = [(completion, self.flying.pop(completion.ticket, None)) for completion in completions]
        for completion, flight in come:
            check_words(completion)
            assert flight is not None, f"{completion} was not asked for, or came twice"
            _compare(completion, flight)

    def teardown(self) -> None:
        """Close the tier, which ends what is in flight."""
        self.rig.close(self.tier)


def _compare(completion: Completion, flight: _Flight) -> None:
    """Insist that a transfer ended as in the oracle."""
    transfer, expected, memory = flight.transfer, flight.expected, flight.memory
    what = f"{transfer.op.value} of object {flight.number}"
    assert completion.outcome is expected.outcome, f"{what}: {completion}, the memory tier: {expected}"
    assert memory.sound, f"{what}: bytes outside the region's pages were written"
    if completion.outcome is Outcome.FAILED:
        assert completion.reason is expected.reason, f"{what}: {completion}, the memory tier: {expected}"
        return  # The region holds anything.
    nbytes = memory.region.nbytes
    if completion.outcome is Outcome.DONE:
        whole = nbytes if transfer.op is Op.LOAD else expected.nbytes
        assert (completion.nbytes or whole) == expected.nbytes, (
            f"{what}: {completion}, not {expected.nbytes} bytes"
        )
        if transfer.op is Op.LOAD:
            nbytes = expected.nbytes
            assert memory.untouched_behind(nbytes), f"{what}: bytes behind the object were written"
    assert memory.read()[:nbytes] == flight.content[:nbytes], f"{what}: other bytes than the memory tier's"


def settings_of(programs: int, steps: int = 50) -> settings:
    """Give hypothesis's settings for so many random programs of so many steps, however slow the machine."""
    return settings(
        max_examples=programs,
        stateful_step_count=steps,
        deadline=None,
        phases=_PHASES,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def run_machine(rig: Rig, programs: int) -> None:
    """Run so many random programs on the rig's backend.

    Raises:
        AssertionError: With the shortest program that fails, and what replays it.
    """
    made = type("Machine", (_Machine,), {"rig": rig, "numbers": itertools.count(1000)})
    run_state_machine_as_test(made, settings=settings_of(programs, _STEPS))
