"""What the suite's tests are written with: tiers of one backend, and transfers driven to their end."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import mmap
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.config import convert
from kvbm_core.registry import Registry
from kvbm_core.testing._watch import feed
from kvbm_core.tier import (
    PAGE_BYTES,
    Backend,
    Capabilities,
    Completion,
    Op,
    Outcome,
    Reason,
    Region,
    Tier,
    TierContext,
    Transfer,
)

__all__ = [
    "NAMESPACE",
    "PATIENCE_S",
    "Memory",
    "Rig",
    "check_words",
    "content_of",
    "key_of",
    "lengths",
    "resolve",
]

NAMESPACE: Final[Namespace] = b"suite-namespace!"
PATIENCE_S: Final = 60.0
"""A transfer that has not ended by then never will. No test measures time."""
_PAUSE_S: Final = 0.0002


def resolve(backend: str | Backend) -> Backend:
    """Find a backend by the name of its entry point, as the core does."""
    return Registry().backend(backend) if isinstance(backend, str) else backend


def key_of(number: int) -> BlockKey:
    """Make the key of a numbered object."""
    return hashlib.sha256(f"object {number}".encode()).digest()


def content_of(number: int, nbytes: int) -> bytes:
    """Make the bytes of a numbered object."""
    return random.Random(number).randbytes(nbytes)


def lengths(max_bytes: int) -> list[int]:
    """List lengths at which tiers make mistakes, all of them up to the longest; the longest first."""
    page = PAGE_BYTES
    some = [max_bytes, 333, 2 * page, page + 1, 1, page - 1, max_bytes - 1, page, 3 * page - 1]
    return list(dict.fromkeys(nbytes for nbytes in some if 0 < nbytes <= max_bytes))


class Memory:
    """A region on pages of its own, between pages that nobody may touch; behind it there are eight."""

    _BEFORE: Final = b"\xa5" * PAGE_BYTES
    _BEHIND: Final = b"\xa5" * (8 * PAGE_BYTES)
    _FRESH: Final = b"\x5a"

    def __init__(self, nbytes: int, content: bytes | None = None) -> None:
        owned_bytes = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        self._memory = mmap.mmap(-1, PAGE_BYTES + owned_bytes + len(self._BEHIND))
        self._memory[:PAGE_BYTES], self._memory[-len(self._BEHIND) :] = self._BEFORE, self._BEHIND
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + PAGE_BYTES
        self.region = Region(address, nbytes, owner=self._memory)
        self.write(content if content is not None else self._FRESH * nbytes)

    def write(self, content: bytes) -> None:
        """Set the region's bytes."""
        self.region.view()[:] = content

    def read(self) -> bytes:
        """Give the region's bytes."""
        return bytes(self.region.view())

    @property
    def sound(self) -> bool:
        """Whether the pages around are as they were."""
        return (
            self._memory[:PAGE_BYTES] == self._BEFORE and self._memory[-len(self._BEHIND) :] == self._BEHIND
        )

    def untouched_behind(self, nbytes: int) -> bool:
        """Say whether a new region is as it was behind the pages of an object of so many bytes."""
        rest = self.read()[-(-nbytes // PAGE_BYTES) * PAGE_BYTES :]
        return rest == self._FRESH * len(rest)


class Rig:
    """Opens tiers of one backend and drives transfers through them.

    Objects are numbered; each has its own key, bytes and length, see `length`.

    Args:
        backend: Its name, or itself.
        settings: Makes the mapping that an operator would write, for a folder of the test's own.
        folder: That folder.
        max_bytes: Length of the longest object, see `TierContext.max_bytes`.
        fill: See `TierSuite.fill`.
    """

    def __init__(
        self,
        backend: str | Backend,
        settings: Callable[[Path], Mapping[str, Any]],
        folder: Path,
        max_bytes: int,
        fill: Callable[[Path, Namespace, Mapping[BlockKey, bytes]], None] | None = None,
    ) -> None:
        self.backend = resolve(backend)
        self.name = backend
        self.folder = folder
        self.max_bytes = max_bytes
        self._settings = settings
        self._fill = fill
        self._lengths: dict[int, int] = {}
        self._tickets = itertools.count(1)
        self._open: list[Tier] = []

    def settings(self) -> Mapping[str, Any]:
        """Give the settings as an operator would write them."""
        return self._settings(self.folder)

    def config(self) -> Any:
        """Give the settings as the backend's own type."""
        return convert(self.settings(), self.backend.config_type, "settings")

    def another(self, *, folder: Path | None = None, max_bytes: int | None = None) -> Rig:
        """Give another, for tiers in another folder or of longer objects; what is not given is as here."""
        return Rig(self.name, self._settings, folder or self.folder, max_bytes or self.max_bytes, self._fill)

    # Objects.

    def length(self, number: int) -> int:
        """Give a numbered object's length in bytes: neighbours have different ones, if not set otherwise."""
        known = lengths(self.max_bytes)
        return self._lengths.get(number, known[number % len(known)])

    def set_length(self, nbytes: int, *numbers: int) -> None:
        """Give numbered objects another length."""
        self._lengths.update(dict.fromkeys(numbers, nbytes))

    def content(self, number: int) -> bytes:
        """Give a numbered object's bytes."""
        return content_of(number, self.length(number))

    def memory(self, number: int | None = None) -> Memory:
        """Make a region: with a numbered object's bytes and length, or a new one of `max_bytes`."""
        return Memory(self.max_bytes) if number is None else Memory(self.length(number), self.content(number))

    # Tiers.

    def open(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        namespace: Namespace = NAMESPACE,
        max_bytes: int | None = None,
        **more: Any,
    ) -> Tier:
        """Open a tier; it is closed when the test is over. `more`: other fields of the `TierContext`."""
        feed()
        nbytes = self.max_bytes if max_bytes is None else max_bytes
        context = TierContext(namespace, nbytes, rank, world_size, name="suite", **more)
        tier = self.backend.open(self.config(), context)
        self._open.append(tier)
        return tier

    def stocked(self, *numbers: int) -> Tier:
        """Open a tier that has numbered objects: stored, or filled in where it is `read_only`."""
        tier = self.open()
        if not tier.capabilities.read_only:
            self.must_store(tier, *numbers)
            return tier
        self.close(tier)
        assert self._fill is not None, "a suite of a read_only tier needs a method `fill`"
        self._fill(self.folder, NAMESPACE, {key_of(number): self.content(number) for number in numbers})
        return self.open()

    def capabilities(self) -> Capabilities:
        """Say what the backend's tiers can do, with these settings."""
        tier = self.open()
        capabilities = tier.capabilities
        self.close(tier)
        return capabilities

    def close(self, tier: Tier) -> None:
        """Close a tier before the test is over."""
        feed()
        self._open.remove(tier)
        tier.close()

    def close_all(self) -> None:
        """Close what is open."""
        while self._open:
            self._open.pop().close()

    # Patience.

    def patience(self, otherwise: str) -> Iterator[None]:
        """Give a turn after the other, for as long as a test waits for anything.

        Raises:
            AssertionError: If it has waited long enough. Says what is wrong then.
        """
        give_up_s = time.monotonic() + PATIENCE_S
        while True:
            yield
            assert time.monotonic() < give_up_s, otherwise
            time.sleep(_PAUSE_S)

    def elsewhere(self, use: Callable[[], None]) -> None:
        """Run a function in a thread of its own, and raise here what it raises."""
        with ThreadPoolExecutor(1, "suite") as pool:
            pool.submit(use).result()

    # Transfers.

    def transfer(self, op: Op, number: int, memory: Memory | None = None) -> Transfer:
        """Make a transfer of a numbered object."""
        return Transfer(next(self._tickets), op, key_of(number), memory.region if memory else None)

    def wait(self, tier: Tier, transfers: Sequence[Transfer]) -> dict[int, Completion]:
        """Poll until each of these has completed; give the completions by ticket.

        Raises:
            AssertionError: If one does not end, ends twice, or was never asked for.
        """
        done: dict[int, Completion] = {}
        give_up_s = time.monotonic() + PATIENCE_S
        expected = {transfer.ticket for transfer in transfers}
        feed()
        while len(done) < len(expected):
            for completion in tier.poll():
                assert completion.ticket in expected, f"{completion} was not asked for"
                assert completion.ticket not in done, f"ticket {completion.ticket} completed twice"
                done[completion.ticket] = completion
            assert time.monotonic() < give_up_s, f"{sorted(expected - set(done))} never completed"
            time.sleep(_PAUSE_S)
        for completion in done.values():
            check_words(completion)
        return done

    def run(self, tier: Tier, transfers: Sequence[Transfer]) -> dict[int, Completion]:
        """Submit and wait, no more at once than the queue takes."""
        done: dict[int, Completion] = {}
        depth = tier.capabilities.queue_depth
        for at in range(0, len(transfers), depth):
            batch = transfers[at : at + depth]
            tier.submit(batch)
            done |= self.wait(tier, batch)
        return done

    def store(self, tier: Tier, *numbers: int) -> list[Completion]:
        """Store numbered objects."""
        ends: list[Completion] = []
        depth = tier.capabilities.queue_depth
        for at in range(0, len(numbers), depth):
            batch = [
                self.transfer(Op.STORE, number, self.memory(number)) for number in numbers[at : at + depth]
            ]
            done = self.run(tier, batch)
            ends += [done[transfer.ticket] for transfer in batch]
        return ends

    def must_store(self, tier: Tier, *numbers: int) -> None:
        """Store numbered objects that there is room for."""
        for number, completion in zip(numbers, self.store(tier, *numbers), strict=True):
            assert completion.outcome is Outcome.DONE, (
                f"object {number} of {self.length(number)} bytes was not stored: {completion}"
            )

    def load(self, tier: Tier, number: int, nbytes: int | None = None) -> tuple[Completion, Memory]:
        """Load a numbered object into a new region; give the completion and the region.

        Args:
            tier: The tier.
            number: Of the object.
            nbytes: Length of the region, `max_bytes` if not given.
        """
        memory = Memory(self.max_bytes if nbytes is None else nbytes)
        transfer = self.transfer(Op.LOAD, number, memory)
        completion = self.run(tier, [transfer])[transfer.ticket]
        assert memory.sound, "bytes outside the region's pages were written"
        return completion, memory

    def lookup(self, tier: Tier, number: int) -> Outcome:
        """Look a numbered object up."""
        transfer = self.transfer(Op.LOOKUP, number)
        return self.run(tier, [transfer])[transfer.ticket].outcome

    def must_hold(self, tier: Tier, *numbers: int) -> None:
        """Insist that objects are found, with their lengths and bytes."""
        for number in numbers:
            completion, memory = self.load(tier, number)
            assert completion.outcome is Outcome.DONE, f"object {number} is not loaded: {completion}"
            self.must_be(number, memory, completion)

    def must_be(self, number: int, memory: Memory, completion: Completion) -> None:
        """Insist that a region was filled with a numbered object, and that the completion says its length."""
        nbytes = completion.nbytes or memory.region.nbytes
        said = f"object {number} has {self.length(number)} bytes, {completion} says {nbytes}"
        assert nbytes == self.length(number), said
        assert memory.read()[:nbytes] == self.content(number), f"object {number} has other bytes"

    def must_miss(self, tier: Tier, *numbers: int) -> None:
        """Insist that objects are not found, and that regions stay as they were."""
        for number in numbers:
            completion, memory = self.load(tier, number)
            assert completion.outcome is Outcome.MISSING, f"object {number} should be missing: {completion}"
            assert memory.untouched_behind(0), "a miss wrote to the region"


def check_words(completion: Completion) -> None:
    """Insist that outcome and reason agree."""
    if completion.outcome is Outcome.DONE:
        assert completion.reason is Reason.NONE, completion
    elif completion.outcome is Outcome.MISSING:
        assert completion.reason is Reason.MISSING, completion
    else:
        assert completion.reason not in (Reason.NONE, Reason.MISSING), completion
