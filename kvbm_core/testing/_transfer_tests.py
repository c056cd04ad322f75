"""Tests of stores, loads and lookups: a part of the suite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvbm_core.block import BlockKey
from kvbm_core.testing._needs import filled, writable
from kvbm_core.testing._rig import Memory, Rig, key_of, lengths
from kvbm_core.tier import PAGE_BYTES, Op, Outcome, Reason

__all__ = ["TransferTests"]


class TransferTests:
    """A part of `TierSuite`."""

    # Storing and loading.

    @writable
    def test_a_stored_object_is_loaded_with_the_same_bytes(self, rig: Rig) -> None:
        """Every object has its own."""
        tier = rig.open()
        rig.must_store(tier, *range(12))
        rig.must_hold(tier, *reversed(range(12)))

    def test_objects_of_every_length_are_loaded_with_their_length(self, rig: Rig) -> None:
        """From one byte to the longest, around pages; into a region of the object's length, and a longer."""
        numbers = range(len(lengths(rig.max_bytes)))
        tier = rig.stocked(*numbers)
        for number in numbers:
            for nbytes in {rig.length(number), min(rig.length(number) + 1, rig.max_bytes), rig.max_bytes}:
                completion, memory = rig.load(tier, number, nbytes)
                assert completion.outcome is Outcome.DONE, (
                    f"{rig.length(number)} bytes are not loaded into {nbytes}: {completion}"
                )
                rig.must_be(number, memory, completion)

    def test_a_load_into_a_longer_region_fills_the_pages_of_the_object_alone(self, rig: Rig) -> None:
        """Behind them the region is as it was."""
        numbers = range(len(lengths(rig.max_bytes)))
        tier = rig.stocked(*numbers)
        for number in numbers:
            completion, memory = rig.load(tier, number)
            assert completion.outcome is Outcome.DONE, completion
            assert memory.untouched_behind(rig.length(number)), "bytes behind the object were written"

    def test_an_object_longer_than_the_region_completes_corrupt_and_stays(self, rig: Rig) -> None:
        """By one byte, by a page, by all but one; nothing is written behind the region's pages."""
        numbers = range(len(lengths(rig.max_bytes)))
        tier = rig.stocked(*numbers)
        for number in numbers:
            length = rig.length(number)
            for nbytes in sorted({length - 1, length - PAGE_BYTES, length // 2, 1} - {length}):
                if nbytes > 0:
                    completion, _ = rig.load(tier, number, nbytes)
                    assert (completion.outcome, completion.reason) == (Outcome.FAILED, Reason.CORRUPT), (
                        f"{length} bytes into a region of {nbytes}: {completion}"
                    )
        rig.must_hold(tier, *numbers)

    @writable
    def test_a_store_says_the_bytes_that_are_kept(self, rig: Rig) -> None:
        """`Completion.nbytes`, or 0 for all of them. Also of a key that is present."""
        tier = rig.open()
        for number in [*range(len(lengths(rig.max_bytes)))] * 2:
            [end] = rig.store(tier, number)
            assert end.outcome is Outcome.DONE, end
            assert end.nbytes in (0, rig.length(number)), (
                f"object {number} has {rig.length(number)} bytes: {end}"
            )

    @writable
    def test_each_ticket_completes_exactly_once(self, rig: Rig) -> None:
        """In any order, also when nothing is left to do."""
        tier = rig.open()
        rig.must_store(tier, *range(4))
        transfers = [
            rig.transfer(op, number, rig.memory(number)) for number in range(4) for op in (Op.LOAD, Op.STORE)
        ]
        transfers += [rig.transfer(Op.LOOKUP, number) for number in range(8)]
        transfers += [rig.transfer(Op.LOAD, number, rig.memory()) for number in range(20, 24)]
        rig.run(tier, transfers)
        for _ in range(50):
            assert list(tier.poll()) == []

    @writable
    def test_storing_a_present_key_completes_done_and_writes_nothing(self, rig: Rig) -> None:
        """Equal keys have equal bytes, so the second store has nothing to do."""
        tier = rig.open()
        rig.must_store(tier, 1)
        for content in (rig.memory(2), Memory(rig.length(1))):
            other = rig.transfer(Op.STORE, 1, content)
            assert rig.run(tier, [other])[other.ticket].outcome is Outcome.DONE
            rig.must_hold(tier, 1)

    @writable
    def test_a_second_store_of_a_key_completes_as_before_or_after_or_busy(self, rig: Rig) -> None:
        """Both in one batch."""
        tier = rig.open()
        twins = [rig.transfer(Op.STORE, 1, rig.memory(1)) for _ in range(2)]
        ends = [(c.outcome, c.reason) for c in rig.run(tier, twins).values()]
        assert (Outcome.DONE, Reason.NONE) in ends
        assert set(ends) <= {(Outcome.DONE, Reason.NONE), (Outcome.FAILED, Reason.BUSY)}
        rig.must_hold(tier, 1)

    @writable
    def test_a_load_beside_a_store_of_its_key_completes_as_before_or_after_or_busy(self, rig: Rig) -> None:
        """Never with half of the bytes."""
        tier = rig.open()
        for number in range(8):
            memory = rig.memory()
            store, load = (
                rig.transfer(Op.STORE, number, rig.memory(number)),
                rig.transfer(Op.LOAD, number, memory),
            )
            end = rig.run(tier, [store, load])[load.ticket]
            if end.outcome is Outcome.DONE:
                rig.must_be(number, memory, end)
            else:
                assert end.reason in (Reason.MISSING, Reason.BUSY)

    def test_loading_an_absent_key_completes_missing_and_leaves_the_region_as_it_was(self, rig: Rig) -> None:
        """Where nothing was stored, and beside what was."""
        rig.must_miss(rig.open(), 1)
        rig.close_all()
        rig.must_miss(rig.stocked(2), 1)

    def test_lookup_says_done_or_missing(self, rig: Rig) -> None:
        """A LOOKUP has no region. It may say the object's length, and no other."""
        tier = rig.stocked(1)
        lookup = rig.transfer(Op.LOOKUP, 1)
        end = rig.run(tier, [lookup])[lookup.ticket]
        assert end.outcome is Outcome.DONE
        assert end.nbytes in (0, rig.length(1))
        assert rig.lookup(tier, 2) is Outcome.MISSING

    @writable
    def test_nothing_outside_the_regions_pages_is_written(self, rig: Rig) -> None:
        """Neither by loads nor by stores."""
        tier = rig.open()
        numbers = range(len(lengths(rig.max_bytes)))
        memories = [rig.memory(number) for number in numbers]
        rig.run(tier, [rig.transfer(Op.STORE, at, memory) for at, memory in enumerate(memories)])
        rig.run(tier, [rig.transfer(Op.LOAD, at, memory) for at, memory in enumerate(memories)])
        assert all(memory.sound for memory in memories)

    @writable
    def test_a_store_reads_its_region_and_does_not_change_it(self, rig: Rig) -> None:
        """Other tiers may be reading the same region."""
        tier = rig.open()
        memories = [rig.memory(number) for number in range(4)]
        rig.run(tier, [rig.transfer(Op.STORE, at, memory) for at, memory in enumerate(memories)])
        assert [memory.read() for memory in memories] == [rig.content(number) for number in range(4)]

    @writable
    def test_a_region_is_not_used_after_its_completion(self, rig: Rig) -> None:
        """Stored bytes are the tier's own, and a loaded region stays as it was loaded."""
        tier = rig.open()
        memories = [rig.memory(number) for number in range(6)]
        rig.run(tier, [rig.transfer(Op.STORE, at, memory) for at, memory in enumerate(memories)])
        for memory in memories:
            memory.write(b"\x11" * memory.region.nbytes)
        rig.must_hold(tier, *range(6))
        rig.run(tier, [rig.transfer(Op.LOAD, at, memory) for at, memory in enumerate(memories)])
        for memory in memories:
            memory.write(b"\x22" * memory.region.nbytes)
        rig.must_hold(tier, *range(6))
        rig.close(tier)
        assert all(set(memory.read()) == {0x22} for memory in memories)

    @writable
    def test_keys_are_compared_whole(self, rig: Rig) -> None:
        """One bit anywhere makes another key; and any 32 bytes are one."""
        tier = rig.open()
        rig.must_store(tier, 1)
        near = [replace(rig.transfer(Op.LOOKUP, 1), key=_flipped(key_of(1), bit)) for bit in range(0, 256, 7)]
        taken = [end.ticket for end in rig.run(tier, near).values() if end.outcome is not Outcome.MISSING]
        assert not taken, f"{len(taken)} keys that differ in one bit are taken for the one that is stored"
        for key in (_flipped(key_of(1), 255), bytes(32), b"\xff" * 32, b"/../" * 8, b" \n" * 16):
            memory, into = rig.memory(2), rig.memory()
            store = replace(rig.transfer(Op.STORE, 2, memory), key=key)
            load = replace(rig.transfer(Op.LOAD, 2, into), key=key)
            assert rig.run(tier, [store])[store.ticket].outcome is Outcome.DONE, f"key {key!r}"
            rig.must_be(2, into, rig.run(tier, [load])[load.ticket])
            tier.discard([key])
            assert rig.run(tier, [load])[load.ticket].outcome is Outcome.MISSING, f"key {key!r}"
            rig.must_hold(tier, 1)

    @writable
    def test_any_bytes_are_an_object(self, rig: Rig) -> None:
        """Nothing but zeros, too; and equal bytes under two keys are two objects."""
        tier = rig.open()
        rig.set_length(rig.max_bytes, *range(6))
        for at, byte in enumerate((b"\0", b"\xff", b"\n")):
            memories = [Memory(rig.max_bytes, byte * rig.max_bytes) for _ in range(2)]
            twins = [rig.transfer(Op.STORE, 2 * at + twin, memory) for twin, memory in enumerate(memories)]
            rig.run(tier, twins)
            for forgotten in (2 * at + 1, 2 * at):
                for number in range(2 * at, forgotten + 1):
                    completion, memory = rig.load(tier, number)
                    assert completion.outcome is Outcome.DONE, f"object {number} of {byte!r}: {completion}"
                    assert memory.read() == byte * rig.max_bytes, f"object {number} is not all {byte!r}"
                tier.discard([key_of(forgotten)])

    def test_any_ticket_is_returned_as_it_was_given(self, rig: Rig) -> None:
        """Zero, one that needs 64 bits, and one that was used before."""
        tier = rig.open()
        for ticket in (0, 5, 5, 1 << 32, (1 << 32) + 5, (1 << 62) + 1, 0):
            lookup = replace(rig.transfer(Op.LOOKUP, 1), ticket=ticket)
            tier.submit([lookup])
            rig.wait(tier, [lookup])

    def test_batches_and_completions_are_the_callers_own(self, rig: Rig) -> None:
        """A list that was submitted may be used anew, and what `poll` gave stays as it is."""
        tier = rig.open()
        lookups = [rig.transfer(Op.LOOKUP, number) for number in range(tier.capabilities.queue_depth)]
        kept: list[tuple[Any, list[Any]]] = []
        expected = {transfer.ticket for transfer in lookups}
        batch = list(lookups)
        tier.submit(batch)
        batch.clear()
        for _ in rig.patience("not every lookup has completed"):
            got = tier.poll()
            kept.append((got, list(got)))
            expected -= {completion.ticket for completion in got}
            if not expected:
                break
        again = [rig.transfer(Op.LOOKUP, 1)]
        tier.submit(again)
        rig.wait(tier, again)
        assert all(list(got) == before for got, before in kept), "what poll gave has changed since"

    def test_all_calls_from_submit_on_may_come_from_another_thread(self, rig: Rig) -> None:
        """The core opens a tier in one thread and uses it in another, which closes it as well."""
        tier = rig.stocked(1, 2)
        rig.close(tier)
        tier = rig.open()
        list(tier.inventory())

        def use() -> None:
            if not tier.capabilities.read_only:
                rig.must_store(tier, 1, 2)
                tier.discard([key_of(2)])
            rig.must_hold(tier, 1)
            assert rig.lookup(tier, 3) is Outcome.MISSING
            rig.close(tier)

        rig.elsewhere(use)

    # Read-only.

    @filled
    def test_a_read_only_tier_serves_what_others_have_filled_in(self, rig: Rig) -> None:
        """And nothing else; where it lists its objects, these with their lengths."""
        numbers = range(len(lengths(rig.max_bytes)))
        tier = rig.stocked(*numbers)
        if not tier.capabilities.remote_lookup:
            assert dict(tier.inventory()) == {key_of(number): rig.length(number) for number in numbers}
        rig.must_hold(tier, *numbers)
        rig.must_miss(tier, len(numbers))


def _flipped(key: BlockKey, bit: int) -> BlockKey:
    return (int.from_bytes(key, "big") ^ (1 << bit)).to_bytes(32, "big")
