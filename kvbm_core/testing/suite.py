"""The conformance suite: what every tier must do, by its capabilities.

    from kvbm_core.testing.suite import TierSuite

    class TestShelf(TierSuite):
        backend = "shelf"

        def settings(self, folder):
            return {"path": str(folder), "capacity": "4MiB"}

Run it with pytest. Each test is named for the line of the contract that it proves. A test cannot be
overridden; one that a backend cannot pass is waived, with the reason, and must then fail:

    waivers = {"test_wake_is_called_when_there_is_something_to_poll": "the vendor's library has no callback"}
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest

from kvbm_core.errors import QueueFullError, TierError, TierOpenError, TransitionError
from kvbm_core.testing._child import KilledChild
from kvbm_core.testing._machine import run_machine
from kvbm_core.testing._rig import PATIENCE_S, Memory, Rig, content_of, key_of
from kvbm_core.tier import (
    CONTRACT_VERSION,
    PAGE_BYTES,
    Addressable,
    Backend,
    Capabilities,
    Op,
    Outcome,
    Reason,
    Tier,
)

__all__ = ["TierSuite", "needs"]

_MOST_BLOCKS: Final = 1024
"""Tests that fill a tier must end."""
_OTHER_NAMESPACE: Final = b"another-namespac"
_FREE: Final = frozenset({"backend", "settings", "waivers", "block_bytes", "programs"})
"""What a subclass may define, beside tests of its own."""


def needs(what: str, having: Callable[[Capabilities], bool]) -> Callable[[Any], Any]:
    """Have a test run only for tiers with a capability."""

    def mark(test: Any) -> Any:
        before, also = getattr(test, "needs", ("", lambda capabilities: True))
        text = f"{what}, and {before}" if before else what
        test.needs = (text, lambda capabilities: having(capabilities) and also(capabilities))
        return test

    return mark


durable = needs("durable", lambda c: c.durable)
listing = needs("durable, and lists its blocks", lambda c: c.durable and not c.remote_lookup)
fleeting = needs("forgetful (not durable)", lambda c: not c.durable)
bounded = needs("bounded", lambda c: c.capacity_blocks is not None)
shared = needs("shared", lambda c: c.shared)
asked = needs("asked by LOOKUP", lambda c: c.remote_lookup)
lending = needs("addressable", lambda c: c.addressable)
kept_apart = needs("durable or shared", lambda c: c.durable or c.shared)


class TierSuite:
    """Subclass it, name a backend, give settings for a small tier, and run pytest."""

    backend: ClassVar[str | Backend]
    """The name of an entry point, or a `Backend`."""
    waivers: ClassVar[Mapping[str, str]] = {}
    """Tests that this backend cannot pass, and why. Each must fail, else the waiver is out of date."""
    block_bytes: ClassVar[int] = 16 * 1024 + 96
    """Of every region; not a multiple of a page, as in service."""
    programs: ClassVar[int] = 60
    """Random programs that the last test runs. Each opens a tier: fewer where that takes long."""

    def settings(self, folder: Path) -> Mapping[str, Any]:
        """Give the settings as an operator would write them, for a tier of some dozen blocks.

        Args:
            folder: Of the test's own, empty at its start.
        """
        raise NotImplementedError("write a method `settings`")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _insist_on_the_whole_suite(cls)
        for name, reason in cls.waivers.items():
            if not name.startswith("test_") or name not in vars(TierSuite):
                raise TypeError(f"{cls.__name__} waives {name!r}, which is no test of the suite")
            if not reason.strip():
                raise TypeError(f"{cls.__name__} waives {name} without a reason")
            setattr(cls, name, _waived(vars(TierSuite)[name], reason))

    @pytest.fixture
    def rig(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
        """Give the test its tiers, and close them."""
        _insist_on_the_whole_suite(type(self))
        folders = [tmp_path / name for name in ("look", "tier")]
        for folder in folders:
            folder.mkdir()
        look, rig = (Rig(self.backend, self.settings, folder, self.block_bytes) for folder in folders)
        what, having = getattr(request.function, "needs", ("", lambda capabilities: True))
        try:
            if not having(look.capabilities()):
                if request.function.__name__ in self.waivers:
                    pytest.fail(f"waived, but not run for a tier that is not {what}: remove the waiver")
                pytest.skip(f"left out: the tier is not {what}")
            yield rig
        finally:
            rig.close_all()

    # The backend.

    def test_the_backend_is_what_the_core_expects(self, rig: Rig) -> None:
        """Its name is its entry point's, its contract ours, its tiers are tiers."""
        assert rig.backend.contract_version == CONTRACT_VERSION
        assert isinstance(self.backend, Backend) or rig.backend.name == self.backend
        tier = rig.open()
        assert isinstance(tier, Tier)
        assert isinstance(tier, Addressable) is tier.capabilities.addressable
        assert "\n" not in repr(tier)

    def test_check_accepts_what_can_be_opened_and_changes_nothing(self, rig: Rig) -> None:
        """See `Backend.check`."""
        before = _listing(rig.folder)
        rig.backend.check(rig.config())
        assert _listing(rig.folder) == before

    # Storing and loading.

    def test_a_stored_block_is_loaded_with_the_same_bytes(self, rig: Rig) -> None:
        """Every block has its own."""
        tier = rig.open()
        rig.must_store(tier, *range(8))
        rig.must_hold(tier, *reversed(range(8)))

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

    def test_storing_a_present_key_completes_done_and_writes_nothing(self, rig: Rig) -> None:
        """Equal keys have equal bytes, so the second store has nothing to do."""
        tier = rig.open()
        rig.must_store(tier, 1)
        other = rig.transfer(Op.STORE, 1, rig.memory(2))
        assert rig.run(tier, [other])[other.ticket].outcome is Outcome.DONE
        rig.must_hold(tier, 1)

    def test_a_second_store_of_a_key_completes_as_before_or_after_or_busy(self, rig: Rig) -> None:
        """Both in one batch."""
        tier = rig.open()
        twins = [rig.transfer(Op.STORE, 1, rig.memory(1)) for _ in range(2)]
        ends = [(c.outcome, c.reason) for c in rig.run(tier, twins).values()]
        assert (Outcome.DONE, Reason.NONE) in ends
        assert set(ends) <= {(Outcome.DONE, Reason.NONE), (Outcome.FAILED, Reason.BUSY)}
        rig.must_hold(tier, 1)

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
                assert memory.read() == content_of(number, rig.block_bytes)
            else:
                assert end.reason in (Reason.MISSING, Reason.BUSY)

    def test_loading_an_absent_key_completes_missing_and_leaves_the_region_as_it_was(self, rig: Rig) -> None:
        """Before anything was stored, and after."""
        tier = rig.open()
        rig.must_miss(tier, 1)
        rig.must_store(tier, 2)
        rig.must_miss(tier, 1)

    def test_lookup_says_done_or_missing(self, rig: Rig) -> None:
        """A LOOKUP has no region."""
        tier = rig.open()
        rig.must_store(tier, 1)
        assert rig.lookup(tier, 1) is Outcome.DONE
        assert rig.lookup(tier, 2) is Outcome.MISSING

    def test_nothing_outside_the_regions_pages_is_written(self, rig: Rig) -> None:
        """Neither by loads nor by stores."""
        tier = rig.open()
        memories = [rig.memory(number) for number in range(4)]
        rig.run(tier, [rig.transfer(Op.STORE, at, memory) for at, memory in enumerate(memories)])
        rig.run(tier, [rig.transfer(Op.LOAD, at, memory) for at, memory in enumerate(memories)])
        assert all(memory.sound for memory in memories)

    def test_a_store_reads_its_region_and_does_not_change_it(self, rig: Rig) -> None:
        """Other tiers may be reading the same region."""
        tier = rig.open()
        memory = rig.memory(1)
        rig.run(tier, [rig.transfer(Op.STORE, 1, memory)])
        assert memory.read() == content_of(1, rig.block_bytes)

    def test_a_region_is_not_used_after_its_completion(self, rig: Rig) -> None:
        """Stored bytes are the tier's own, and a loaded region stays as it was loaded."""
        tier = rig.open()
        memories = [rig.memory(number) for number in range(6)]
        rig.run(tier, [rig.transfer(Op.STORE, at, memory) for at, memory in enumerate(memories)])
        for memory in memories:
            memory.write(b"\x11" * rig.block_bytes)
        rig.must_hold(tier, *range(6))
        rig.run(tier, [rig.transfer(Op.LOAD, at, memory) for at, memory in enumerate(memories)])
        for memory in memories:
            memory.write(b"\x22" * rig.block_bytes)
        rig.must_hold(tier, *range(6))
        rig.close(tier)
        assert all(memory.read() == b"\x22" * rig.block_bytes for memory in memories)

    # Forgetting.

    def test_a_transfer_after_discard_does_not_see_the_block(self, rig: Rig) -> None:
        """Its neighbours stay."""
        tier = rig.open()
        rig.must_store(tier, 1, 2, 3)
        tier.discard([key_of(1), key_of(3)])
        assert rig.lookup(tier, 1) is Outcome.MISSING
        rig.must_miss(tier, 1, 3)
        rig.must_hold(tier, 2)

    def test_discarding_an_absent_key_is_ignored(self, rig: Rig) -> None:
        """Also one that was discarded before."""
        tier = rig.open()
        tier.discard([])
        tier.discard([key_of(1)])
        rig.must_store(tier, 1)
        tier.discard([key_of(2), key_of(1)])
        tier.discard([key_of(1)])
        rig.must_miss(tier, 1)

    def test_a_discarded_block_can_be_stored_again_at_once(self, rig: Rig) -> None:
        """Again and again."""
        tier = rig.open()
        for _ in range(20):
            rig.must_store(tier, 1)
            rig.must_hold(tier, 1)
            tier.discard([key_of(1)])
        rig.must_miss(tier, 1)

    # Room.

    @bounded
    def test_as_many_blocks_as_the_capacity_says_are_held_and_more_are_refused(self, rig: Rig) -> None:
        """A block too many ends FULL and costs no other block."""
        tier = rig.open()
        numbers = range(_capacity(tier))
        rig.must_store(tier, *numbers)
        for completion in rig.store(tier, len(numbers), len(numbers) + 1):
            assert (completion.outcome, completion.reason) == (Outcome.FAILED, Reason.FULL)
        rig.must_miss(tier, len(numbers))
        rig.must_hold(tier, *numbers)

    @bounded
    def test_the_room_of_a_discarded_block_is_free_for_a_later_store(self, rig: Rig) -> None:
        """Round after round, so that nothing leaks."""
        tier = rig.open()
        count = _capacity(tier)
        rig.must_store(tier, *range(count))
        for number in range(count, 3 * count):
            tier.discard([key_of(number - count)])
            rig.must_store(tier, number)
        rig.must_hold(tier, *range(2 * count, 3 * count))

    @bounded
    def test_the_capacity_is_for_all_ranks_together(self, rig: Rig) -> None:
        """A rank has its share of it."""
        whole = _capacity(rig.open())
        rig.close_all()
        share = rig.open(rank=1, world_size=2).capabilities.capacity_blocks
        assert share is not None
        assert 0 < share <= whole / 2

    @bounded
    def test_a_capacity_of_less_than_a_block_is_refused(self, rig: Rig) -> None:
        """By `open`, with the key in the message; or it says 0 blocks, and the core refuses."""
        refusal = ""
        try:
            blocks = rig.open(world_size=1 << 20).capabilities.capacity_blocks
        except TierOpenError as error:
            refusal, blocks = str(error), 0
        assert blocks == 0
        assert not refusal or "capacity" in refusal

    def test_ranks_do_not_see_each_others_blocks(self, rig: Rig) -> None:
        """Each keeps its own part of every block under the same key."""
        first, second = rig.open(rank=0, world_size=2), rig.open(rank=1, world_size=2)
        rig.must_store(first, 1)
        rig.must_miss(second, 1)

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
        batch = [
            rig.transfer(Op.STORE, number, memory) for number in range(tier.capabilities.queue_depth + 1)
        ]
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
        for op in (Op.STORE, Op.LOOKUP, Op.LOAD):
            woken.clear()
            transfer = rig.transfer(op, 1, None if op is Op.LOOKUP else rig.memory(1))
            tier.submit([transfer])
            assert woken.wait(PATIENCE_S), f"no wake for {op}"
            rig.wait(tier, [transfer])

    # From open to close.

    def test_close_ends_the_tiers_threads(self, rig: Rig) -> None:
        """And those it had for what was in flight."""
        before = set(threading.enumerate())
        tier = rig.open()
        rig.must_store(tier, *range(4))
        rig.close(tier)
        left = set(threading.enumerate()) - before
        for thread in left:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in left), f"left behind: {left}"

    def test_the_capabilities_are_the_same_from_open_to_close(self, rig: Rig) -> None:
        """And after it."""
        tier = rig.open()
        before = tier.capabilities
        rig.must_store(tier, 1)
        assert tier.capabilities == before
        rig.close(tier)
        assert tier.capabilities == before

    def test_a_new_tier_lists_nothing(self, rig: Rig) -> None:
        """And serves nothing."""
        tier = rig.open()
        assert list(tier.inventory()) == []
        rig.must_miss(tier, 1)

    def test_close_finishes_or_fails_what_is_in_flight_and_poll_returns_it(self, rig: Rig) -> None:
        """Each ticket still completes once."""
        tier = rig.open()
        count = min(tier.capabilities.queue_depth, 16)
        memories = [rig.memory(number) for number in range(count)]
        transfers = [rig.transfer(Op.STORE, at, memory) for at, memory in enumerate(memories)]
        tier.submit(transfers)
        rig.close(tier)
        done = [completion.ticket for _ in range(3) for completion in tier.poll()]
        assert sorted(done) == sorted(transfer.ticket for transfer in transfers)

    def test_close_may_be_called_twice(self, rig: Rig) -> None:
        """The second does nothing."""
        tier = rig.open()
        rig.must_store(tier, 1)
        tier.close()
        tier.close()
        assert list(tier.poll()) == []

    def test_submit_after_close_raises(self, rig: Rig) -> None:
        """`TierError`: nothing was started."""
        tier = rig.open()
        rig.close(tier)
        with pytest.raises(TierError):
            tier.submit([rig.transfer(Op.LOOKUP, 1)])

    # Over restarts.

    @fleeting
    def test_a_tier_that_is_not_durable_starts_empty(self, rig: Rig) -> None:
        """What it does not list it must not serve."""
        tier = rig.open()
        rig.must_store(tier, 1)
        rig.close(tier)
        tier = rig.open()
        assert list(tier.inventory()) == []
        rig.must_miss(tier, 1)

    @durable
    def test_what_was_stored_is_served_after_a_restart(self, rig: Rig) -> None:
        """And what was not is not."""
        tier = rig.open()
        rig.must_store(tier, *range(6))
        rig.close(tier)
        tier = rig.open()
        rig.must_hold(tier, *range(6))
        rig.must_miss(tier, 6)

    @durable
    def test_what_was_reported_stored_is_served_after_a_kill(self, rig: Rig) -> None:
        """`kill -9` in the midst of stores, in a process of its own."""
        tier = rig.open()
        limit = tier.capabilities.capacity_blocks
        rig.close(tier)
        after = 8 if limit is None else min(8, limit // 2)
        child = KilledChild(self.backend, rig.settings(), rig.block_bytes)
        stored = child.acknowledged(after)
        tier = rig.open()
        rig.must_hold(tier, *stored)
        # What was on its way may be there, whole, or not.
        completion, data = rig.load(tier, len(stored))
        assert completion.outcome is not Outcome.DONE or data == content_of(len(stored), rig.block_bytes)

    @listing
    def test_the_inventory_is_what_was_stored_and_not_discarded(self, rig: Rig) -> None:
        """Each key once."""
        tier = rig.open()
        for number in range(6):
            rig.must_store(tier, number)
        tier.discard([key_of(2), key_of(4)])
        rig.must_store(tier, 7)
        rig.close(tier)
        found = list(rig.open().inventory())
        assert sorted(found) == sorted(key_of(number) for number in (0, 1, 3, 5, 7))

    @listing
    @bounded
    def test_the_capacity_holds_over_restarts(self, rig: Rig) -> None:
        """A full tier is full again."""
        tier = rig.open()
        count = _capacity(tier)
        rig.must_store(tier, *range(count))
        rig.close(tier)
        tier = rig.open()
        assert tier.capabilities.capacity_blocks == count
        found = list(tier.inventory())
        assert len(found) == count
        assert rig.store(tier, count)[0].reason is Reason.FULL
        tier.discard(found[:1])
        rig.must_store(tier, count)

    @kept_apart
    def test_blocks_of_another_namespace_are_neither_listed_nor_served(self, rig: Rig) -> None:
        """Though the keys are the same."""
        tier = rig.open()
        rig.must_store(tier, 1)
        rig.close(tier)
        tier = rig.open(namespace=_OTHER_NAMESPACE)
        assert list(tier.inventory()) == []
        assert rig.lookup(tier, 1) is Outcome.MISSING
        rig.must_miss(tier, 1)

    @kept_apart
    def test_a_block_of_another_length_is_not_loaded(self, rig: Rig) -> None:
        """A torn or short block completes FAILED or MISSING, never DONE."""
        tier = rig.open()
        rig.must_store(tier, 1)
        rig.close(tier)
        for nbytes in (self.block_bytes + 4096, self.block_bytes - 4096, self.block_bytes + 1):
            tier = rig.open(block_bytes=nbytes)
            load = rig.transfer(Op.LOAD, 1, Memory(nbytes))
            assert rig.run(tier, [load])[load.ticket].outcome is not Outcome.DONE
            rig.close(tier)

    # Beside other engines.

    @shared
    def test_one_engine_finds_what_another_stores(self, rig: Rig) -> None:
        """While both are open."""
        first, second = rig.open(), rig.open()
        rig.must_store(first, 1)
        rig.must_hold(second, 1)
        assert rig.lookup(second, 1) is Outcome.DONE

    @shared
    def test_engines_that_store_the_same_blocks_at_once_do_no_harm(self, rig: Rig) -> None:
        """Each reads whole blocks at every moment."""
        tiers = [rig.open() for _ in range(2)]
        for number in range(8):
            stores = [rig.transfer(Op.STORE, number, rig.memory(number)) for _ in tiers]
            for tier, store in zip(tiers, stores, strict=True):
                tier.submit([store])
            for tier, store in zip(tiers, stores, strict=True):
                assert rig.wait(tier, [store])[store.ticket].outcome is Outcome.DONE
            for tier in tiers:
                rig.must_hold(tier, number)

    @asked
    def test_a_tier_that_is_asked_lists_nothing(self, rig: Rig) -> None:
        """And keeps its own bound."""
        tier = rig.open()
        rig.must_store(tier, 1)
        rig.close(tier)
        tier = rig.open()
        assert list(tier.inventory()) == []
        assert tier.capabilities.capacity_blocks is None
        assert rig.lookup(tier, 1) is Outcome.DONE

    # Lending.

    @lending
    def test_a_reserved_block_is_not_loadable_before_publish(self, rig: Rig) -> None:
        """Nor is it lent."""
        tier: Any = rig.open()
        region = tier.reserve(key_of(1))
        region.view()[:] = content_of(1, rig.block_bytes)
        assert tier.view(key_of(1)) is None
        assert rig.lookup(tier, 1) is Outcome.MISSING
        rig.must_miss(tier, 1)
        tier.publish(key_of(1))
        assert bytes(tier.view(key_of(1)).view()) == content_of(1, rig.block_bytes)
        rig.must_hold(tier, 1)

    @lending
    def test_reserve_gives_none_for_a_known_key_or_without_room(self, rig: Rig) -> None:
        """Known: reserved, published or stored."""
        tier: Any = rig.open()
        rig.must_store(tier, 0)
        assert tier.reserve(key_of(0)) is None
        for number in itertools.count(1):
            if tier.reserve(key_of(number)) is None:
                break
            assert tier.reserve(key_of(number)) is None
        assert number == _capacity(tier)

    @lending
    def test_abandoned_and_discarded_memory_is_free_again(self, rig: Rig) -> None:
        """An abandoned block was never there."""
        tier: Any = rig.open()
        for round_ in range(3 * _capacity(tier)):
            assert tier.reserve(key_of(round_)) is not None
            tier.abandon(key_of(round_))
            rig.must_miss(tier, round_)
            assert tier.reserve(key_of(round_)) is not None
            tier.publish(key_of(round_))
            tier.discard([key_of(round_)])
            assert tier.view(key_of(round_)) is None

    @lending
    def test_lent_regions_start_on_pages_and_own_them_whole(self, rig: Rig) -> None:
        """No two overlap, the padding included."""
        tier: Any = rig.open()
        regions = [tier.reserve(key_of(number)) for number in range(_capacity(tier))]
        owned_bytes = -(-rig.block_bytes // PAGE_BYTES) * PAGE_BYTES
        addresses = sorted(region.address for region in regions)
        assert all(address % PAGE_BYTES == 0 for address in addresses)
        assert {region.nbytes for region in regions} == {rig.block_bytes}
        assert all(high - low >= owned_bytes for low, high in itertools.pairwise(addresses))

    @lending
    def test_publish_and_abandon_refuse_a_key_that_is_not_reserved(self, rig: Rig) -> None:
        """It would be a bug of the core."""
        tier: Any = rig.open()
        for call in (tier.publish, tier.abandon):
            with pytest.raises(TransitionError):
                call(key_of(1))

    # All together.

    def test_any_sequence_of_calls_agrees_with_the_memory_tier(self, rig: Rig) -> None:
        """Random programs; hypothesis prints the shortest that fails."""
        run_machine(rig, self.programs)


def _insist_on_the_whole_suite(cls: type[TierSuite]) -> None:
    """Refuse a class in which a test of the suite was replaced or switched off."""
    wrong = []
    for name, member in vars(TierSuite).items():
        mine = inspect.getattr_static(cls, name)
        if not name.startswith("__") and name not in _FREE and getattr(mine, "waives", mine) is not member:
            wrong.append(name)
    if wrong:
        raise TypeError(f"{cls.__name__} overrides {wrong}: declare a waiver with its reason instead")
    marks = {mark.name for mark in getattr(cls, "pytestmark", ())}
    if marks & {"skip", "skipif", "xfail"}:
        raise TypeError(f"{cls.__name__} is marked {sorted(marks)}: declare a waiver for each test instead")


def _waived(test: Any, reason: str) -> Any:
    """Turn a test around: it must fail. What goes wrong before it, in its fixture, still counts."""

    @functools.wraps(test)
    def waived(self: TierSuite, rig: Rig) -> None:
        try:
            test(self, rig)
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - failing is what is expected
            pytest.xfail(f"waived: {reason} ({type(error).__name__})")
        pytest.fail(f"waived, but it passes: remove the waiver ({reason})")

    waived.waives = test  # type: ignore[attr-defined]
    return waived


def _capacity(tier: Tier) -> int:
    count = tier.capabilities.capacity_blocks
    assert count is not None
    assert 8 < count <= _MOST_BLOCKS, (
        f"the suite fills the tier: give it settings for 9 to {_MOST_BLOCKS} blocks, not {count}"
    )
    return count


def _listing(folder: Path) -> list[tuple[str, int]]:
    # Not the times of folders: whoever tries whether he may write there changes them.
    found = ((path, path.stat()) for path in folder.rglob("*"))
    return sorted((str(path), 0 if path.is_dir() else status.st_mtime_ns) for path, status in found)
