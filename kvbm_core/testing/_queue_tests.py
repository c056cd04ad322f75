"""Tests of the queue, of `wake` and of calls that must not wait: a part of the suite."""

from __future__ import annotations

import functools
import threading
from typing import Final

import pytest

from kvbm_core.errors import QueueFullError
from kvbm_core.testing._rig import PATIENCE_S, Rig, key_of
from kvbm_core.testing._watch import Fastest, returns
from kvbm_core.tier import Op, Outcome

__all__ = ["QueueTests"]

CALL_S: Final = 1.0
"""`submit`, `poll` and `discard` return long before."""
CLOSE_S: Final = 10.0
"""As long as the core waits for `close`."""


class QueueTests:
    """A part of `TierSuite`."""

    # The queue.

    def test_as_many_transfers_as_the_queue_has_places_are_taken(self, rig: Rig) -> None:
        """All in one batch."""
        tier = rig.open()
        depth = tier.capabilities.queue_depth
        assert depth >= 1
        lookups = [rig.transfer(Op.LOOKUP, number) for number in range(depth)]
        tier.submit(lookups)
        rig.wait(tier, lookups)

    def test_a_batch_that_does_not_fit_the_queue_is_refused_whole(self, rig: Rig) -> None:
        """Nothing of it is started."""
        tier, memory = rig.open(), rig.memory(0)
        op = Op.LOAD if tier.capabilities.read_only else Op.STORE
        batch = [rig.transfer(op, number, memory) for number in range(tier.capabilities.queue_depth + 1)]
        with pytest.raises(QueueFullError):
            tier.submit(batch)
        assert {rig.lookup(tier, number) for number in range(len(batch))} == {Outcome.MISSING}
        assert list(tier.poll()) == []

    def test_a_place_is_taken_until_poll_has_returned_the_completion(self, rig: Rig) -> None:
        """Not only until the transfer has ended."""
        woken = threading.Event()
        tier = rig.open(wake=woken.set)
        full = [rig.transfer(Op.LOOKUP, number) for number in range(tier.capabilities.queue_depth)]
        tier.submit(full)
        assert woken.wait(PATIENCE_S), "no wake"
        with pytest.raises(QueueFullError):
            tier.submit([rig.transfer(Op.LOOKUP, 0)])
        rig.wait(tier, full)
        assert rig.lookup(tier, 0) is Outcome.MISSING

    def test_wake_is_called_when_there_is_something_to_poll(self, rig: Rig) -> None:
        """For every kind of transfer, also those that end at once."""
        woken = threading.Event()
        tier = rig.open(wake=woken.set)
        for op in (Op.LOOKUP, Op.LOAD) if tier.capabilities.read_only else (Op.STORE, Op.LOOKUP, Op.LOAD):
            woken.clear()
            transfer = rig.transfer(op, 1, None if op is Op.LOOKUP else rig.memory(1))
            tier.submit([transfer])
            assert woken.wait(PATIENCE_S), f"no wake for {op}"
            rig.wait(tier, [transfer])

    def test_wake_is_called_when_poll_has_something_and_without_a_lock(self, rig: Rig) -> None:
        """While a tier's thread is in `wake`, `poll` returns the completion and does not wait."""
        called, polled = threading.Event(), threading.Event()
        caller = threading.current_thread()
        held: list[str] = []

        def wake() -> None:
            called.set()
            if threading.current_thread() is not caller and not polled.wait(PATIENCE_S):
                held.append("`poll` waits for a lock that is held while `wake` is called")

        polled.set()
        tier = rig.open(wake=wake)
        op = Op.LOOKUP if tier.capabilities.read_only else Op.STORE
        for number in range(4):
            called.clear()
            polled.clear()
            transfer = rig.transfer(op, number, None if op is Op.LOOKUP else rig.memory(number))
            tier.submit([transfer])
            assert called.wait(PATIENCE_S), "no wake"
            got = list(tier.poll())
            polled.set()
            assert not held, held[0]
            assert [completion.ticket for completion in got] == [transfer.ticket], f"woken too early: {got}"

    # Time.

    def test_submit_poll_and_discard_do_not_wait(self, rig: Rig) -> None:
        """Not for the medium, nor for something to return. The fastest of several calls is what counts."""
        returns(lambda: _insist_on_speed(rig), PATIENCE_S)

    def test_close_returns(self, rig: Rig) -> None:
        """With transfers in flight, too. The core waits for ten seconds, and leaves the tier behind."""

        def use() -> None:
            fastest = Fastest()
            for _ in range(3):
                tier = rig.stocked(*range(4))
                tier.submit([rig.transfer(Op.LOAD, 0, rig.memory())])
                fastest.call("close", functools.partial(rig.close, tier))
                if not fastest.longer_than(CLOSE_S):
                    return
            raise AssertionError(f"`close` takes longer than {CLOSE_S} s every time")

        returns(use, PATIENCE_S)


def _insist_on_speed(rig: Rig) -> None:
    tier, fastest = rig.stocked(1), Fastest()
    read_only = tier.capabilities.read_only
    for turn in range(5):
        fastest.call("poll of an idle tier", tier.poll)
        numbers = [] if read_only else [10 + 2 * turn, 11 + 2 * turn]
        batch = [rig.transfer(Op.STORE, number, rig.memory(number)) for number in numbers]
        batch = [rig.transfer(Op.LOAD, 1, rig.memory()), *batch][: tier.capabilities.queue_depth]
        fastest.call("submit", functools.partial(tier.submit, batch))
        early = {completion.ticket for completion in fastest.call("poll", tier.poll)}
        rig.wait(tier, [transfer for transfer in batch if transfer.ticket not in early])
        if not read_only:
            fastest.call("discard", functools.partial(tier.discard, [key_of(number) for number in numbers]))
        if not fastest.longer_than(CALL_S):
            break
    slow = fastest.longer_than(CALL_S)
    assert not slow, f"{slow} took longer than {CALL_S} s each time: hand the work to a thread"
    rig.close(tier)
