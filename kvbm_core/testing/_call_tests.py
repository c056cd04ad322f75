"""Tests of calls, transfers, regions and the queue: a part of the suite."""

from __future__ import annotations

import ctypes
import gc
import mmap
import threading
import time
import weakref
from dataclasses import replace
from typing import Any, Final

from kvbm_core.testing._needs import bounded, lending, needs, writable
from kvbm_core.testing._rig import PATIENCE_S, Memory, Rig, key_of, lengths
from kvbm_core.testing._room import count_of
from kvbm_core.tier import PAGE_BYTES, Op, Outcome, Reason, Region, Transfer

__all__ = ["CallTests"]

_FEW: Final = 16
"""Transfers that a tier's threads may still have in their hands, the last of each."""
_MANY_KEYS: Final = 1100
"""More than the places of one SQL statement in many libraries."""


class _Owner:
    """Keeps memory, and can be watched."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory


class CallTests:
    """A part of `TierSuite`."""

    # Transfers.

    @writable
    def test_the_head_of_a_prompt_names_no_object(self, rig: Rig) -> None:
        """`Transfer.head` is a hint: with another, or none, it is the same object."""
        tier = rig.open()
        for at, head in enumerate((key_of(90), None, key_of(91))):
            store = replace(rig.transfer(Op.STORE, at, rig.memory(at)), head=head)
            assert rig.run(tier, [store])[store.ticket].outcome is Outcome.DONE
            for other in (None, key_of(90), key_of(91)):
                memory = rig.memory()
                load = replace(rig.transfer(Op.LOAD, at, memory), head=other)
                completion = rig.run(tier, [load])[load.ticket]
                assert completion.outcome is Outcome.DONE, f"stored with head {head!r}, loaded with {other!r}"
                rig.must_be(at, memory, completion)

    def test_a_deadline_is_on_the_clock_of_monotonic(self, rig: Rig) -> None:
        """One that is minutes away ends nothing; one that is over ends DONE, or FAILED with DEADLINE."""
        tier = rig.stocked(1)
        for deadline_s in (time.monotonic() + 10 * PATIENCE_S, time.monotonic() - 1, 0.0):
            memory = rig.memory()
            load = replace(rig.transfer(Op.LOAD, 1, memory), deadline_s=deadline_s)
            completion = rig.run(tier, [load])[load.ticket]
            if completion.outcome is Outcome.DONE:
                rig.must_be(1, memory, completion)
            else:
                assert completion.reason is Reason.DEADLINE, completion
                assert deadline_s < time.monotonic(), f"{completion}, ten minutes too early"
        rig.must_hold(tier, 1)

    def test_loads_of_one_key_at_once_are_each_filled(self, rig: Rig) -> None:
        """Several prompts begin alike."""
        tier = rig.stocked(1, 2)
        memories = [rig.memory() for _ in range(min(6, tier.capabilities.queue_depth))]
        loads = [rig.transfer(Op.LOAD, 1 + at % 2, memory) for at, memory in enumerate(memories)]
        ends = rig.run(tier, loads)
        for at, (load, memory) in enumerate(zip(loads, memories, strict=True)):
            assert ends[load.ticket].outcome is Outcome.DONE, ends[load.ticket]
            rig.must_be(1 + at % 2, memory, ends[load.ticket])

    @writable
    def test_asking_for_an_object_changes_nothing(self, rig: Rig) -> None:
        """What was asked for in vain is still absent, and can be stored."""
        tier = rig.open()
        for number in range(6):
            assert rig.lookup(tier, number) is Outcome.MISSING
            rig.must_miss(tier, number)
            assert rig.lookup(tier, number) is Outcome.MISSING
        rig.must_store(tier, *range(6))
        for number in range(6):
            assert rig.lookup(tier, number) is Outcome.DONE
        rig.must_hold(tier, *range(6))

    def test_a_batch_may_be_empty_and_is_not_changed(self, rig: Rig) -> None:
        """It may be any sequence: a list, a tuple."""
        tier = rig.stocked(1)
        tier.submit([])
        assert list(tier.poll()) == []
        lookups = [rig.transfer(Op.LOOKUP, number) for number in (3, 1, 2)]
        for batch in (lookups, tuple(lookups)):
            tier.submit(batch)
            assert list(batch) == lookups, "the caller's batch was changed"
            rig.wait(tier, lookups)
            assert list(batch) == lookups, "the caller's batch was changed"

    # Regions.

    @writable
    def test_a_region_may_lie_anywhere_in_its_owners_memory(self, rig: Rig) -> None:
        """`Region.owner` is there to be kept, and not to be looked at."""
        tier = rig.open()
        numbers = range(6)
        step_bytes = -(-rig.max_bytes // PAGE_BYTES) * PAGE_BYTES
        pages = mmap.mmap(-1, len(numbers) * step_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        whole = Region(address, len(pages), owner=pages)
        parts = [whole.part(at * step_bytes, rig.length(at)) for at in numbers]
        for number, part in zip(numbers, parts, strict=True):
            part.view()[:] = rig.content(number)
        stores = [
            Transfer(1 + at, Op.STORE, key_of(at), part) for at, part in zip(numbers, parts, strict=True)
        ]
        assert {end.outcome for end in rig.run(tier, stores).values()} == {Outcome.DONE}
        rig.must_hold(tier, *numbers)
        for part in parts:
            part.view()[:] = bytes(part.nbytes)
        rig.run(tier, [replace(store, op=Op.LOAD) for store in reversed(stores)])
        for number, part in zip(numbers, parts, strict=True):
            assert bytes(part.view()) == rig.content(number), f"object {number} was loaded to another place"

    @writable
    def test_memory_is_let_go_of_after_the_completion(self, rig: Rig) -> None:
        """`Region.owner` of what has ended is kept by nobody, but for the last few."""
        tier = rig.open()
        alive: list[weakref.ref[_Owner]] = []
        for number in range(4 * _FEW):
            memory = rig.memory(number % 8)
            owner = _Owner(memory)
            alive.append(weakref.ref(owner))
            region = replace(memory.region, owner=owner)
            op = Op.STORE if number < 8 else Op.LOAD
            transfer = replace(rig.transfer(op, number % 8), region=region)
            del memory, owner, region
            rig.run(tier, [transfer])
            del transfer
        for _ in rig.patience("the memory of transfers that have ended is kept"):
            gc.collect()
            if sum(owner() is not None for owner in alive) <= _FEW:
                break

    @writable
    def test_no_region_is_used_after_close(self, rig: Rig) -> None:
        """Nor by a thread that is still at work: what was not finished has FAILED."""
        before = set(threading.enumerate())
        tier = rig.stocked(*range(8))
        memories = [rig.memory() for _ in range(min(8, tier.capabilities.queue_depth))]
        tier.submit([rig.transfer(Op.LOAD, at, memory) for at, memory in enumerate(memories)])
        workers = set(threading.enumerate()) - before
        rig.close(tier)
        tier.poll()
        for memory in memories:
            memory.write(b"\x33" * memory.region.nbytes)
        for worker in workers:
            worker.join(PATIENCE_S)
        assert all(set(memory.read()) == {0x33} for memory in memories), "written to after `close`"

    @needs(
        "able to store objects of 128 KiB",
        lambda c: not c.read_only and (c.capacity_bytes or 1 << 40) >= 3 << 17,
    )
    def test_long_objects_are_kept_whole(self, rig: Rig) -> None:
        """Longer than 16 bits can count."""
        longest = 2 * 65536 + 96
        wide = Rig(rig.name, lambda _: rig.settings(), rig.folder, longest)
        tier = rig.open(max_bytes=longest)
        for number, nbytes in enumerate((longest, 65536, 65537)):
            wide.set_length(nbytes, number)
            wide.must_store(tier, number)
            wide.must_hold(tier, number)
            tier.discard([key_of(number)])

    # The queue.

    def test_a_full_queue_of_loads_is_served(self, rig: Rig) -> None:
        """As many as the queue has places, at once."""
        tier = rig.stocked(*range(4))
        memories = [rig.memory() for _ in range(tier.capabilities.queue_depth)]
        loads = [rig.transfer(Op.LOAD, at % 4, memory) for at, memory in enumerate(memories)]
        tier.submit(loads)
        ends = rig.wait(tier, loads)
        for at, (load, memory) in enumerate(zip(loads, memories, strict=True)):
            assert ends[load.ticket].outcome is Outcome.DONE, ends[load.ticket]
            if at % 7 == 0:
                rig.must_be(at % 4, memory, ends[load.ticket])

    def test_a_place_is_free_again_however_a_transfer_ended(self, rig: Rig) -> None:
        """Whether it found its object, or none, or one that is too long."""
        tier = rig.stocked(0)
        depth = tier.capabilities.queue_depth
        for number, nbytes in ((0, rig.max_bytes), (1, 300), (0, 300)):
            loads = [rig.transfer(Op.LOAD, number, Memory(nbytes)) for _ in range(2 * depth)]
            rig.run(tier, loads)
            lookups = [rig.transfer(Op.LOOKUP, 0) for _ in range(depth)]
            tier.submit(lookups)
            rig.wait(tier, lookups)

    def test_every_completion_is_announced_by_a_wake(self, rig: Rig) -> None:
        """Whoever polls after each `wake` and never else misses nothing: `poll` takes all that there is."""
        woken = threading.Event()
        tier = rig.open(wake=woken.set)
        for _ in range(3):
            lookups = [
                rig.transfer(Op.LOOKUP, number) for number in range(min(8, tier.capabilities.queue_depth))
            ]
            left = {lookup.ticket for lookup in lookups}
            tier.submit(lookups)
            while left:
                assert woken.wait(PATIENCE_S), f"no wake for {len(left)} more completions"
                woken.clear()
                left -= {completion.ticket for completion in tier.poll()}
            woken.clear()

    # Room.

    @bounded
    def test_storing_a_present_key_takes_no_room_and_needs_none(self, rig: Rig) -> None:
        """Also where the tier is full."""
        tier = rig.open()
        count = count_of(rig, tier)
        rig.set_length(rig.max_bytes, *range(count + 1))
        rig.must_store(tier, *range(count))
        for _ in range(2):
            rig.must_store(tier, *range(count))
        tier.discard([key_of(0)])
        rig.must_store(tier, count)
        rig.must_hold(tier, *range(1, count + 1))

    @bounded
    def test_an_object_that_was_refused_can_be_stored_when_there_is_room(self, rig: Rig) -> None:
        """A store that ended FULL leaves nothing behind, neither an entry nor a part."""
        tier = rig.open()
        count = count_of(rig, tier)
        rig.set_length(rig.max_bytes, *range(count + 2))
        rig.must_store(tier, *range(count))
        assert {end.reason for end in rig.store(tier, count, count + 1)} == {Reason.FULL}
        tier.discard([key_of(0), key_of(1)])
        rig.must_miss(tier, count, count + 1)
        rig.must_store(tier, count + 1, count)
        rig.must_hold(tier, *range(2, count + 2))

    @needs("writable, and not shared", lambda c: not c.read_only and not c.shared)
    def test_many_objects_are_discarded_at_once(self, rig: Rig) -> None:
        """More than a thousand keys in one call, most of them absent."""
        tier = rig.open()
        rig.must_store(tier, *range(9))
        tier.discard(tuple(key_of(number) for number in range(2, _MANY_KEYS)))
        rig.must_hold(tier, 0, 1)
        rig.must_miss(tier, *range(2, 9))

    # Lending.

    @lending
    def test_lent_memory_stays_where_it_is(self, rig: Rig) -> None:
        """Until its object is discarded, whatever happens to others."""
        tier: Any = rig.open()
        numbers = range(len(lengths(rig.max_bytes)))
        rig.must_store(tier, *numbers)
        lent = {number: tier.view(key_of(number)) for number in numbers[1::2]}
        tier.discard([key_of(number) for number in numbers[::2]])
        rig.must_store(tier, *range(20, 26))
        for number, region in lent.items():
            assert tier.view(key_of(number)).address == region.address, f"object {number} has moved"
            assert bytes(region.view()) == rig.content(number), f"object {number} has other bytes"

    @lending
    def test_a_store_of_a_reserved_key_is_busy_and_the_reservation_stays(self, rig: Rig) -> None:
        """Two would write the same object."""
        tier: Any = rig.open()
        region = tier.reserve(key_of(1), rig.length(1))
        [end] = rig.store(tier, 1)
        assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.BUSY), end
        region.view()[:] = rig.content(1)
        tier.publish(key_of(1))
        rig.must_hold(tier, 1)
