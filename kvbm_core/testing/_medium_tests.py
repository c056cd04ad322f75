"""Tests of a medium that fails: a part of the suite."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from kvbm_core.errors import TierError, TierOpenError
from kvbm_core.testing._broken_files import broken_files, cut_files
from kvbm_core.testing._needs import bounded, durable, kept_apart, writable
from kvbm_core.testing._rig import PATIENCE_S, Memory, Rig, key_of
from kvbm_core.testing._room import count_of
from kvbm_core.testing._watch import returns
from kvbm_core.tier import Completion, Op, Outcome, Reason, Tier, Transfer

__all__ = ["MediumTests"]

_OLD: Final = range(4)
"""Objects that are there before the medium fails."""
_ROUNDS: Final = 5
_MOST_LINES: Final = 20
_NOTHING: Final = "left out: the medium does not fail; write a method `broken_medium`"
_REFUSED: Final = Completion(0, Outcome.FAILED, Reason.ERROR, "`submit` raised TierError")


@dataclass(frozen=True, slots=True)
class _End:
    """How a transfer ended."""

    number: int
    transfer: Transfer
    memory: Memory | None
    said: Completion = _REFUSED

    def __str__(self) -> str:
        return f"{self.transfer.op.value} of object {self.number}: {self.said}"


class MediumTests:
    """A part of `TierSuite`."""

    def broken_medium(self, folder: Path) -> AbstractContextManager[None]:
        """Have the medium of open tiers fail as long as the context lasts. By default the files in `folder`.

        Override it where the tier keeps its objects elsewhere: a server that answers with an error.

        Args:
            folder: As in `settings`.
        """
        return broken_files(folder)

    # A medium that fails.

    @writable
    @kept_apart
    def test_an_error_of_the_medium_is_a_failure_and_no_miss(self, rig: Rig) -> None:
        """Of what is there: DONE with its bytes, or FAILED for a reason. A miss would be forgotten by all."""
        for end in self._troubles(rig):
            if end.transfer.op is not Op.STORE:
                assert end.said.outcome is not Outcome.MISSING, f"{end}, though it is stored"
                assert end.said.reason is not Reason.FULL, f"{end}, which says nothing of a medium"

    @writable
    @kept_apart
    def test_each_ticket_completes_once_while_the_medium_fails(self, rig: Rig) -> None:
        """As at any time."""
        with self._stocked(rig) as tier:
            with self.broken_medium(rig.folder):
                for round_ in range(_ROUNDS):
                    self._trouble(rig, tier, round_)
                    for _ in range(20):
                        assert list(tier.poll()) == []
            assert list(tier.poll()) == []

    @writable
    @kept_apart
    def test_a_failure_says_why_in_one_line(self, rig: Rig) -> None:
        """`Completion.detail`, where the reason is ERROR: it is all that an operator sees."""
        for end in self._troubles(rig):
            if end.said.reason is Reason.ERROR:
                assert end.said.detail.strip(), f"{end} does not say why"
                assert "\n" not in end.said.detail, f"{end} says it in several lines"

    @writable
    @kept_apart
    def test_a_tier_works_again_when_its_medium_does(self, rig: Rig) -> None:
        """By itself, after many failures: what was there is there, and more is stored."""
        with self._stocked(rig) as tier:
            with self.broken_medium(rig.folder):
                for round_ in range(_ROUNDS):
                    self._trouble(rig, tier, round_)
            number = itertools.count(1000)
            for _ in rig.patience("it stores nothing though its medium is well again"):
                new = next(number)
                if rig.store(tier, new)[0].outcome is Outcome.DONE:
                    break
            rig.must_hold(tier, *_OLD, new)

    @writable
    @kept_apart
    def test_a_store_that_failed_is_not_served_and_one_that_is_done_is(self, rig: Rig) -> None:
        """Also after a restart."""
        with self._stocked(rig) as tier:
            with self.broken_medium(rig.folder):
                ends = [end for round_ in range(3) for end in self._trouble(rig, tier, round_)]
            self._wait_until_well(rig, tier)
            stored = {end.number: end.said for end in ends if end.transfer.op is Op.STORE}
            for _ in range(2):
                for number, said in stored.items():
                    completion, memory = rig.load(tier, number)
                    if completion.outcome is Outcome.DONE:
                        rig.must_be(number, memory, completion)
                    assert said.outcome is not Outcome.DONE or completion.outcome is Outcome.DONE, (
                        f"a store ended {said}, and a load {completion}"
                    )
                    if said.outcome is Outcome.FAILED:
                        assert completion.outcome is not Outcome.FAILED, f"half of it is kept: {completion}"
                rig.close(tier)
                tier = rig.open()

    @writable
    @kept_apart
    def test_a_store_that_is_cut_short_leaves_no_half(self, rig: Rig) -> None:
        """The medium takes the first bytes of each file, and then no more."""
        tier = rig.open()
        numbers = range(6)
        rig.set_length(rig.max_bytes, *numbers)
        with cut_files(rig.max_bytes // 2):
            ends = rig.store(tier, *numbers)
        for _ in range(2):
            for number, end in zip(numbers, ends, strict=True):
                completion, memory = rig.load(tier, number)
                if completion.outcome is Outcome.DONE:
                    rig.must_be(number, memory, completion)
                assert end.outcome is not Outcome.DONE or completion.outcome is Outcome.DONE, (
                    f"a store ended {end}, and a load {completion}"
                )
            rig.close(tier)
            tier = rig.open()
            listed = dict(tier.inventory())
            assert all(nbytes == rig.max_bytes for nbytes in listed.values()), "a half is listed"

    @bounded
    @durable
    def test_a_store_that_failed_takes_no_room(self, rig: Rig) -> None:
        """When the medium is well again, as many objects as ever fit."""
        tier = rig.open()
        count = count_of(rig, tier)
        rig.set_length(rig.max_bytes, *range(count), *range(1000, 1000 + 2 * count))
        with cut_files(rig.max_bytes // 2):
            failed = [number for number in range(1000, 1000 + count) if _failed(rig, tier, number)]
        with self.broken_medium(rig.folder):
            failed += [
                number for number in range(1000 + count, 1000 + 2 * count) if _failed(rig, tier, number)
            ]
        if not failed:
            pytest.skip(_NOTHING)
        self._wait_until_well(rig, tier)
        tier.discard([key_of(number) for number in range(1000, 1000 + 2 * count)])
        rig.must_store(tier, *range(count))
        rig.must_hold(tier, *range(count))

    @writable
    @kept_apart
    def test_a_tier_whose_medium_fails_can_be_closed(self, rig: Rig) -> None:
        """In time, with transfers in flight; they complete. What was there before is served afterwards."""
        with self._stocked(rig) as tier:

            def use() -> None:
                with self.broken_medium(rig.folder):
                    batch = [end.transfer for end in _batch(rig, 0)][: tier.capabilities.queue_depth]
                    started = batch if _submit(tier, batch) else []
                    rig.close(tier)
                    came = [completion.ticket for _ in range(3) for completion in tier.poll()]
                    assert sorted(came) == sorted(transfer.ticket for transfer in started)

            returns(use, PATIENCE_S)
            rig.must_hold(rig.open(), *_OLD)

    @writable
    @kept_apart
    def test_a_medium_that_fails_is_said_in_a_few_lines(self, rig: Rig) -> None:
        """And not once for each transfer: see `kvbm_core.log_limit.LogLimit`."""
        lines = _Lines()
        with self._stocked(rig) as tier:
            logging.getLogger().addHandler(lines)
            try:
                with self.broken_medium(rig.folder):
                    for round_ in range(3 * _ROUNDS):
                        self._trouble(rig, tier, round_)
            finally:
                logging.getLogger().removeHandler(lines)
        assert lines.count <= _MOST_LINES, f"{lines.count} lines, the last of them: {lines.last}"

    @kept_apart
    def test_a_place_that_cannot_be_used_is_refused_with_a_tier_open_error(self, rig: Rig) -> None:
        """By `check` and by `open`; or the tier is open, and says FAILED."""
        with self.broken_medium(rig.folder):
            for use in (self._check, self._open):
                try:
                    use(rig)
                except TierOpenError as refused:
                    said = str(refused).strip()
                else:
                    said = "it waits for its medium"
                assert said, "it does not say why"
        rig.close(rig.open())

    @writable
    @durable
    def test_files_that_were_cut_cost_objects_and_nothing_else(self, rig: Rig) -> None:
        """Each file has lost its second half when the tier is opened; then each is empty.

        A short object is left to the seal. None has bytes that were never stored.
        """
        numbers = range(9)
        for share in (2, 1 << 40):
            rig.close(rig.stocked(*numbers))
            for path in _files(rig.folder):
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size // share)
            try:
                tier = rig.open()
            except TierOpenError:  # The place is refused as it is.
                shutil.rmtree(rig.folder)
                rig.folder.mkdir()
                continue
            list(tier.inventory())
            for number in numbers:
                completion, memory = rig.load(tier, number)
                if completion.outcome is Outcome.DONE:
                    nbytes = completion.nbytes or rig.max_bytes
                    assert memory.read()[:nbytes] == rig.content(number)[:nbytes], (
                        f"object {number} of {rig.length(number)} bytes: {completion}, with other bytes"
                    )
            self._wait_until_well(rig, tier)
            rig.close(tier)

    # What these are written with.

    def _check(self, rig: Rig) -> None:
        rig.backend.check(rig.config())

    def _open(self, rig: Rig) -> None:
        rig.close(rig.open())

    @contextmanager
    def _stocked(self, rig: Rig) -> Iterator[Tier]:
        """Give an open tier that has some objects."""
        rig.close(rig.stocked(*_OLD))
        tier = rig.open()
        list(tier.inventory())
        rig.must_hold(tier, *_OLD)
        yield tier

    def _troubles(self, rig: Rig) -> list[_End]:
        with self._stocked(rig) as tier, self.broken_medium(rig.folder):
            return [end for round_ in range(2) for end in self._trouble(rig, tier, round_)]

    def _trouble(self, rig: Rig, tier: Tier, round_: int) -> list[_End]:
        """Use a tier whose medium fails; give how each transfer ended. Something must have failed."""
        batch = _batch(rig, round_)
        done: dict[int, Completion] = {}
        for at in range(0, len(batch), tier.capabilities.queue_depth):
            part = [each.transfer for each in batch[at : at + tier.capabilities.queue_depth]]
            if _submit(tier, part):
                done |= rig.wait(tier, part)
        ends = [replace(each, said=done.get(each.transfer.ticket, _REFUSED)) for each in batch]
        for end in ends:
            if end.said.outcome is Outcome.DONE and end.memory and end.transfer.op is Op.LOAD:
                rig.must_be(end.number, end.memory, end.said)
        if all(end.said.outcome is Outcome.DONE for end in ends):
            pytest.skip(_NOTHING)
        return ends

    def _wait_until_well(self, rig: Rig, tier: Tier) -> None:
        numbers = itertools.count(5000)
        for _ in rig.patience("it stores nothing though its medium is well again"):
            number = next(numbers)
            if rig.store(tier, number)[0].outcome is Outcome.DONE:
                tier.discard([key_of(number)])
                return


class _Lines(logging.Handler):
    """Counts what an operator would see."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        self.last = record.getMessage()


def _batch(rig: Rig, round_: int) -> list[_End]:
    """Make transfers of all kinds: of what is there, and stores of what is not."""
    batch = []
    for number in _OLD:
        memory = rig.memory()
        batch.append(_End(number, rig.transfer(Op.LOAD, number, memory), memory))
        batch.append(_End(number, rig.transfer(Op.LOOKUP, number), None))
        new = 100 + round_ * len(_OLD) + number
        memory = rig.memory(new)
        batch.append(_End(new, rig.transfer(Op.STORE, new, memory), memory))
    return batch


def _submit(tier: Tier, transfers: list[Transfer]) -> bool:
    """Submit; False if the tier says that it cannot start anything."""
    try:
        tier.submit(transfers)
    except TierError:
        return False
    return True


def _failed(rig: Rig, tier: Tier, number: int) -> bool:
    """Store an object, and say whether that failed for another reason than room."""
    store = rig.transfer(Op.STORE, number, rig.memory(number))
    return not _submit(tier, [store]) or rig.wait(tier, [store])[store.ticket].reason not in (
        Reason.NONE,
        Reason.FULL,
    )


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
