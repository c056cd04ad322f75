"""What the suite's tests are written with: tiers of one backend, and transfers driven to their end."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import mmap
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.config import convert
from kvbm_core.registry import Registry
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

__all__ = ["NAMESPACE", "PATIENCE_S", "Memory", "Rig", "content_of", "key_of", "resolve"]

NAMESPACE: Final[Namespace] = b"suite-namespace!"
PATIENCE_S: Final = 60.0
"""A transfer that has not ended by then never will. No test measures time."""
_PAUSE_S: Final = 0.0002


def resolve(backend: str | Backend) -> Backend:
    """Find a backend by the name of its entry point, as the core does."""
    return Registry().backend(backend) if isinstance(backend, str) else backend


def key_of(number: int) -> BlockKey:
    """Make the key of a numbered block."""
    return hashlib.sha256(f"block {number}".encode()).digest()


def content_of(number: int, nbytes: int) -> bytes:
    """Make the bytes of a numbered block."""
    return random.Random(number).randbytes(nbytes)


class Memory:
    """A region on pages of its own, between two pages that nobody may touch."""

    _GUARD: Final = b"\xa5" * PAGE_BYTES

    def __init__(self, nbytes: int, content: bytes | None = None) -> None:
        owned_bytes = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        self._memory = mmap.mmap(-1, owned_bytes + 2 * PAGE_BYTES)
        self._memory[:PAGE_BYTES] = self._memory[-PAGE_BYTES:] = self._GUARD
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + PAGE_BYTES
        self.region = Region(address, nbytes, owner=self._memory)
        self.write(content if content is not None else b"\x5a" * nbytes)

    def write(self, content: bytes) -> None:
        """Set the region's bytes."""
        self.region.view()[:] = content

    def read(self) -> bytes:
        """Give the region's bytes."""
        return bytes(self.region.view())

    @property
    def sound(self) -> bool:
        """Whether the pages around are as they were."""
        return self._memory[:PAGE_BYTES] == self._GUARD == self._memory[-PAGE_BYTES:]


class Rig:
    """Opens tiers of one backend and drives transfers through them.

    Args:
        backend: Its name, or itself.
        settings: Makes the mapping that an operator would write, for a folder of the test's own.
        folder: That folder.
        block_bytes: Of every region.
    """

    def __init__(
        self,
        backend: str | Backend,
        settings: Callable[[Path], Mapping[str, Any]],
        folder: Path,
        block_bytes: int,
    ) -> None:
        self.backend = resolve(backend)
        self.name = backend
        self.folder = folder
        self.block_bytes = block_bytes
        self._settings = settings
        self._tickets = itertools.count(1)
        self._open: list[Tier] = []

    def settings(self) -> Mapping[str, Any]:
        """Give the settings as an operator would write them."""
        return self._settings(self.folder)

    def config(self) -> Any:
        """Give the settings as the backend's own type."""
        return convert(self.settings(), self.backend.config_type, "settings")

    def open(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        namespace: Namespace = NAMESPACE,
        block_bytes: int | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> Tier:
        """Open a tier; it is closed when the test is over."""
        nbytes = self.block_bytes if block_bytes is None else block_bytes
        tier = self.backend.open(self.config(), TierContext(namespace, nbytes, rank, world_size, wake))
        self._open.append(tier)
        return tier

    def capabilities(self) -> Capabilities:
        """Say what the backend's tiers can do, with these settings."""
        tier = self.open()
        capabilities = tier.capabilities
        self.close(tier)
        return capabilities

    def close(self, tier: Tier) -> None:
        """Close a tier before the test is over."""
        self._open.remove(tier)
        tier.close()

    def close_all(self) -> None:
        """Close what is open."""
        while self._open:
            self._open.pop().close()

    def transfer(self, op: Op, number: int, memory: Memory | None = None) -> Transfer:
        """Make a transfer of a numbered block."""
        return Transfer(next(self._tickets), op, key_of(number), memory.region if memory else None)

    def memory(self, number: int | None = None) -> Memory:
        """Make a region, with a numbered block's bytes in it."""
        content = None if number is None else content_of(number, self.block_bytes)
        return Memory(self.block_bytes, content)

    def wait(self, tier: Tier, transfers: Sequence[Transfer]) -> dict[int, Completion]:
        """Poll until each of these has completed; give the completions by ticket.

        Raises:
            AssertionError: If one does not end, ends twice, or was never asked for.
        """
        done: dict[int, Completion] = {}
        give_up_s = time.monotonic() + PATIENCE_S
        expected = {transfer.ticket for transfer in transfers}
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
        """Store numbered blocks."""
        transfers = [self.transfer(Op.STORE, number, self.memory(number)) for number in numbers]
        done = self.run(tier, transfers)
        return [done[transfer.ticket] for transfer in transfers]

    def must_store(self, tier: Tier, *numbers: int) -> None:
        """Store numbered blocks that there is room for."""
        for number, completion in zip(numbers, self.store(tier, *numbers), strict=True):
            assert completion.outcome is Outcome.DONE, f"block {number} was not stored: {completion}"

    def load(self, tier: Tier, number: int) -> tuple[Completion, bytes]:
        """Load a numbered block; give the completion and the region's bytes."""
        memory = self.memory()
        transfer = self.transfer(Op.LOAD, number, memory)
        completion = self.run(tier, [transfer])[transfer.ticket]
        assert memory.sound, "bytes outside the region's pages were written"
        return completion, memory.read()

    def lookup(self, tier: Tier, number: int) -> Outcome:
        """Look a numbered block up."""
        transfer = self.transfer(Op.LOOKUP, number)
        return self.run(tier, [transfer])[transfer.ticket].outcome

    def must_hold(self, tier: Tier, *numbers: int) -> None:
        """Insist that blocks are found, with their bytes."""
        for number in numbers:
            completion, data = self.load(tier, number)
            assert completion.outcome is Outcome.DONE, f"block {number} is not loaded: {completion}"
            assert data == content_of(number, self.block_bytes), f"block {number} has other bytes"

    def must_miss(self, tier: Tier, *numbers: int) -> None:
        """Insist that blocks are not found, and that regions stay as they were."""
        for number in numbers:
            completion, data = self.load(tier, number)
            assert completion.outcome is Outcome.MISSING, f"block {number} should be missing: {completion}"
            assert data == b"\x5a" * self.block_bytes, "a miss wrote to the region"


def check_words(completion: Completion) -> None:
    """Insist that outcome and reason agree."""
    if completion.outcome is Outcome.DONE:
        assert completion.reason is Reason.NONE, completion
    elif completion.outcome is Outcome.MISSING:
        assert completion.reason is Reason.MISSING, completion
    else:
        assert completion.reason not in (Reason.NONE, Reason.MISSING), completion
