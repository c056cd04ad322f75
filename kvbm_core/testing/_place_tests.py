"""Tests of settings, places, namespaces and restarts: a part of the suite."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from kvbm_core.config import convert
from kvbm_core.errors import ConfigError, TierOpenError
from kvbm_core.testing._child import KilledChild
from kvbm_core.testing._needs import bounded, durable, filled, kept_apart, needs, shared, writable
from kvbm_core.testing._rig import NAMESPACE, PATIENCE_S, Rig, key_of
from kvbm_core.testing._room import count_of
from kvbm_core.testing._watch import handles
from kvbm_core.tier import PAGE_BYTES, Op, Outcome, TierConfig

__all__ = ["PlaceTests"]

_MOST_KEYS: Final = 10
_FACTS: Final[dict[str, Any]] = {
    "model": "größer/als ASCII \u2603",
    "layers": list(range(200)),
    "nested": {"dtype": "bfloat16", "none": None, "share": 0.5},
    "long": "x" * 50_000,
}


class PlaceTests:
    """A part of `TierSuite`."""

    # Settings.

    def test_the_settings_are_of_a_type_that_refuses_unknown_keys(self, rig: Rig) -> None:
        """A `TierConfig` of at most ten keys: a key that is misspelled is found before an engine starts."""
        made = rig.backend.config_type
        assert issubclass(made, TierConfig)
        assert len(msgspec.structs.fields(made)) <= _MOST_KEYS
        with pytest.raises(ConfigError):
            convert({**rig.settings(), "capasity": 1}, made, "settings")

    def test_the_backend_and_its_tiers_say_the_same(self, rig: Rig) -> None:
        """Whether they are shared; in one line each how they work."""
        tier = rig.open()
        assert rig.backend.shared is tier.capabilities.shared, (
            "`Backend.shared` and `Capabilities.shared` differ"
        )
        assert "\n" not in tier.capabilities.detail
        assert rig.backend.contract_version >= 1

    def test_repr_is_one_line_at_any_time(self, rig: Rig) -> None:
        """With transfers in flight, and when the tier is closed."""
        tier = rig.stocked(1)
        shown = [repr(tier)]
        lookup = rig.transfer(Op.LOOKUP, 1)
        tier.submit([lookup])
        shown.append(repr(tier))
        rig.wait(tier, [lookup])
        rig.close(tier)
        shown.append(repr(tier))
        assert not [text for text in shown if "\n" in text or not text]

    @needs("bounded by a key `capacity`", lambda c: c.capacity_bytes is not None and not c.read_only)
    def test_the_share_that_blocks_take_has_room_for_them(self, rig: Rig) -> None:
        """`Backend.share_bytes`: a tier of that capacity holds at least so many objects of that length."""
        if "capacity" not in rig.settings():
            pytest.skip("left out: the settings have no key `capacity`")
        for blocks, nbytes in ((12, rig.max_bytes), (12, 4 * PAGE_BYTES), (100, 700)):
            share_bytes = rig.backend.share_bytes(blocks, nbytes)
            settings = {**rig.settings(), "capacity": share_bytes}
            other = Rig(rig.name, functools.partial(_said, settings), rig.folder, nbytes)
            tier = other.open()
            other.set_length(nbytes, *range(blocks))
            for number, completion in enumerate(other.store(tier, *range(blocks))):
                assert completion.outcome is Outcome.DONE, (
                    f"share_bytes({blocks}, {nbytes}) says {share_bytes} bytes, and object {number} was not "
                    f"stored: {completion}; give Backend a share_bytes that counts what lies beside objects"
                )
            tier.discard([key_of(number) for number in range(blocks)])
            other.close(tier)

    @bounded
    def test_the_shares_of_all_ranks_are_no_more_than_the_capacity(self, rig: Rig) -> None:
        """However they are numbered."""
        tier = rig.open()
        whole = tier.capabilities.capacity_bytes or 0
        charge = tier.capabilities.charge(rig.max_bytes)
        rig.close(tier)
        shares = []
        for rank in range(2):
            tier = rig.open(rank=rank, world_size=2)
            shares.append(tier.capabilities.capacity_bytes or 0)
            rig.close(tier)
        assert sum(shares) <= whole + charge, f"{shares} are {sum(shares)} of {whole} bytes"

    # Places.

    @writable
    def test_tiers_in_two_places_have_nothing_in_common(self, rig: Rig) -> None:
        """Both are open in one process: no table is shared by all tiers of a kind."""
        folder = rig.folder.with_name("elsewhere")
        folder.mkdir()
        other = rig.another(folder=folder)
        first, second = rig.open(), other.open()
        try:
            rig.must_store(first, 1, 2)
            other.must_miss(second, 1)
            assert other.lookup(second, 2) is Outcome.MISSING
            other.must_store(second, 2, 3)
            rig.must_miss(first, 3)
            second.discard([key_of(2)])
            rig.must_hold(first, 1, 2)
            other.close(second)
            rig.must_hold(first, 1, 2)
        finally:
            other.close_all()

    @kept_apart
    def test_namespaces_are_compared_whole(self, rig: Rig) -> None:
        """One bit anywhere makes another, and any 16 bytes are one."""
        rig.close(rig.stocked(1))
        near = [NAMESPACE[:at] + bytes([NAMESPACE[at] ^ 1]) + NAMESPACE[at + 1 :] for at in (15, 0)]
        for namespace in (*near, bytes(16), b"/../" * 4, b"\xff" * 16):
            tier = rig.open(namespace=namespace)
            assert list(tier.inventory()) == [], f"namespace {namespace!r}"
            rig.must_miss(tier, 1)
            rig.close(tier)

    @writable
    @durable
    def test_what_strangers_put_beside_the_files_is_left_out(self, rig: Rig) -> None:
        """Files and folders of other names, and an empty file with the name of a key."""
        rig.close(rig.stocked(1, 2))
        for folder in [rig.folder, *(path for path in rig.folder.rglob("*") if path.is_dir())]:
            (folder / "lost+found").mkdir(exist_ok=True)
            (folder / "README").write_bytes(b"a stranger's")
            (folder / key_of(3).hex()).touch()
            (folder / (key_of(4).hex() + ".tmp")).write_bytes(b"half")
        tier = rig.open()
        listed = list(tier.inventory())
        assert tier.capabilities.remote_lookup or sorted(listed) == sorted(
            (key_of(number), rig.length(number)) for number in (1, 2)
        )
        rig.must_hold(tier, 1, 2)
        completion, _ = rig.load(tier, 3)
        assert completion.outcome is not Outcome.DONE, f"an empty file is no object: {completion}"
        rig.must_store(tier, 5)
        rig.must_hold(tier, 5)

    @writable
    @durable
    def test_any_facts_are_taken(self, rig: Rig) -> None:
        """Of any kind and length: they are for people, and nothing depends on them."""
        for number, facts in enumerate((_FACTS, {"model": "another"})):
            tier = rig.open(facts=facts)
            rig.must_store(tier, number)
            rig.must_hold(tier, *range(number + 1))
            rig.close(tier)

    def test_a_refused_open_leaves_nothing_behind(self, rig: Rig) -> None:
        """Neither files nor threads nor a lock: it may be tried again for hours."""
        counts = []
        for _ in range(4):
            try:
                tier = rig.open(world_size=1 << 20)
            except TierOpenError:
                counts.append(handles())
            else:  # It has room for any number of ranks.
                rig.close(tier)
                return
        give_up_s = time.monotonic() + PATIENCE_S
        while handles() >= counts[0] + 3:  # What it left to others ends soon.
            assert time.monotonic() < give_up_s, f"files and threads, one attempt after the other: {counts}"
            time.sleep(0.01)
        rig.close(rig.open())

    @filled
    def test_a_read_only_tier_changes_nothing(self, rig: Rig) -> None:
        """Of what others have put there, not even what it cannot use."""
        numbers = range(6)
        rig.close(rig.stocked(*numbers))
        before = {path: path.read_bytes() for path in rig.folder.rglob("*") if path.is_file()}
        tier = rig.open()
        rig.must_hold(tier, *numbers)
        rig.load(tier, 0, 300)
        rig.must_miss(tier, 20)
        rig.close(tier)
        assert {path: path.read_bytes() for path in rig.folder.rglob("*") if path.is_file()} == before

    # Over restarts.

    @writable
    @durable
    def test_what_is_stored_between_restarts_adds_up(self, rig: Rig) -> None:
        """Each finds what all before it have stored."""
        for turn in range(2):
            tier = rig.open()
            list(tier.inventory())
            rig.must_hold(tier, *range(3 * turn))
            rig.must_store(tier, *range(3 * turn, 3 * turn + 3))
            rig.close(tier)
        rig.must_hold(rig.open(), *range(6))

    @bounded
    @durable
    def test_storing_what_was_there_before_a_restart_takes_no_room(self, rig: Rig) -> None:
        """It is DONE, with the bytes that are kept."""
        tier = rig.open()
        count = count_of(rig, tier)
        rig.set_length(rig.max_bytes, *range(count))
        rig.must_store(tier, *range(count - 1))
        rig.close(tier)
        tier = rig.open()
        list(tier.inventory())
        for end in rig.store(tier, *range(count - 1)):
            assert end.outcome is Outcome.DONE, end
            assert end.nbytes in (0, rig.max_bytes), end
        rig.must_store(tier, count - 1)
        rig.must_hold(tier, *range(count))

    @writable
    @durable
    def test_after_a_kill_amid_discards_every_object_has_its_own_bytes(self, rig: Rig) -> None:
        """The room of what was discarded had others in it: whatever is there again is whole, or is not."""
        child = KilledChild(rig.name, rig.settings(), rig.max_bytes)
        stored = child.acknowledged(24, batch=2, keep=3)
        tier = rig.open()
        list(tier.inventory())
        for number in stored:
            completion, memory = rig.load(tier, number)
            if completion.outcome is Outcome.DONE:
                rig.must_be(number, memory, completion)
        # The last that it said are discarded by nobody.
        rig.must_hold(tier, *stored[-2:])

    # Beside other engines.

    @writable
    @shared
    def test_what_another_engine_discards_is_missing_and_can_be_stored_again(self, rig: Rig) -> None:
        """Though this one has seen it: a load that finds nothing is a miss and no error."""
        first, second = rig.open(), rig.open()
        rig.must_store(first, 1)
        rig.must_hold(second, 1)
        assert rig.lookup(second, 1) is Outcome.DONE
        first.discard([key_of(1)])
        for _ in rig.patience("an object that is discarded is still loaded"):
            completion, memory = rig.load(second, 1)
            if completion.outcome is Outcome.DONE:
                rig.must_be(1, memory, completion)
                continue
            assert completion.outcome is Outcome.MISSING, completion
            assert memory.untouched_behind(0), "a miss wrote to the region"
            break
        rig.must_store(second, 1)
        rig.close(second)
        rig.must_hold(rig.open(), 1)


def _said(settings: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    return settings
