"""Tries a tier: opens it with its layers, writes objects, reads them back, and removes them.

An engine's objects are in no danger. A tier that keeps a directory is tried in a new folder within it, which
is removed; a shared one under a namespace of its own; one in memory is nobody else's. Of any other it is not
known what opening it with another namespace would delete, so it is not tried.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from kvbm_core.bare import Bare
from kvbm_core.block import make_namespace
from kvbm_core.config import StackConfig, TierEntry, convert, parse_size
from kvbm_core.errors import KvbmError, QueueFullError, TierError
from kvbm_core.layers import SEAL_BYTES
from kvbm_core.registry import Registry
from kvbm_core.remedies import try_writing
from kvbm_core.testing import MemoryDevice
from kvbm_core.tier import (
    Capabilities,
    Completion,
    Op,
    Outcome,
    Region,
    Tier,
    TierContext,
    Transfer,
    whole_pages,
)
from kvbm_core.worker.opening import open_tiers
from kvbm_core.worker.peers import Peers

__all__ = ["BareTrial", "NotTriedError", "Trial", "place_of", "try_bare", "try_tier", "why_not_tried"]

_TRIAL_BYTES: Final = 64 << 20
"""Are written and read, or one object if that is more."""
_MOST_OBJECTS: Final = 64
_FILE_URL: Final = "file://"
_POLL_S: Final = 0.0005
_KEY_BYTES: Final = 32
_PATIENCE_S: Final = 60.0
"""A tier that is slow shall be measured; one that hangs shall end."""


class NotTriedError(KvbmError):
    """A tier works as far as can be told, and cannot be tried. The message says why."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What was seen of a tier."""

    capabilities: Capabilities
    objects: int
    object_bytes: int
    store_s: float
    load_s: float


@dataclass(frozen=True, slots=True)
class BareTrial:
    """What was seen of a tier's bare medium, with as many objects as long as the tier's."""

    says: str
    store_s: float
    load_s: float


def place_of(settings: Any) -> Path | None:
    """Give the directory that a tier keeps its objects in, if it is one of this machine."""
    path, url = settings.get("path"), settings.get("url")
    if isinstance(url, str) and url.startswith(_FILE_URL):
        path = url.removeprefix(_FILE_URL)
    return Path(os.path.expanduser(path)).absolute() if isinstance(path, str) and path else None


def why_not_tried(entry: TierEntry, *, shared: bool) -> str:
    """Say why a tier cannot be tried without danger; empty if it can."""
    if place_of(entry.settings) or shared:
        return ""
    texts = [key for key, value in entry.settings.items() if isinstance(value, str) and key != "capacity"]
    if not texts:
        return ""
    return (
        f"not tried: {', '.join(texts)} may say where it keeps its objects, and opening it for a try could "
        "delete what is there"
    )


def try_tier(
    config: StackConfig,
    entry: TierEntry,
    block_bytes: int,
    objects: int | None = None,
    depth: int | None = None,
) -> Trial:
    """Try one tier of a stack.

    Args:
        config: Its stack, for deadlines.
        entry: The tier.
        block_bytes: Of the blocks that are written.
        objects: How many are written; None: as many as show a speed within a moment.
        depth: Of them on their way at once at most; None: as many as the tier takes.

    Raises:
        KvbmError: It cannot be opened, or does not do what a tier must; the message says what to change.
    """
    with _aside(entry) as (moved, folder):
        count = objects or max(1, min(_MOST_OBJECTS, _TRIAL_BYTES // block_bytes))
        alone = msgspec.structs.replace(
            config, tiers=(_smaller(moved, 2 * count * (block_bytes + SEAL_BYTES)),)
        )
        namespace = make_namespace({"kvbm": "check", "pid": os.getpid(), "time": time.time_ns()})
        context = TierContext(namespace, block_bytes + SEAL_BYTES)
        device = MemoryDevice(1, block_bytes)
        [opened] = open_tiers(alone, context, [block_bytes + SEAL_BYTES], Peers(), Registry(), device)
        try:
            trial = _try(opened.tier, config, entry, count, block_bytes, depth)
        finally:
            opened.tier.close()
    detail = trial.capabilities.detail.replace(folder, str(place_of(entry.settings))) if folder else ""
    seen = dataclasses.replace(trial.capabilities, detail=detail or trial.capabilities.detail)
    return dataclasses.replace(trial, capabilities=seen)


def try_bare(entry: TierEntry, trial: Trial, depth: int | None) -> BareTrial | None:
    """Do with a tier's bare medium what a trial did with the tier. None if the backend gives none.

    Raises:
        KvbmError: The medium cannot be used so.
    """
    backend = Registry().backend(entry.backend)
    if backend.bare is None:
        return None
    nbytes = trial.object_bytes + SEAL_BYTES
    contents, targets = ([_buffer(nbytes) for _ in range(trial.objects)] for _ in range(2))
    for content in contents:
        content[:] = os.urandom(len(content))
    at_once = min(depth or trial.objects, trial.capabilities.queue_depth)
    with _aside(entry) as (moved, _):
        smaller = _smaller(moved, 2 * trial.objects * nbytes)
        config = convert(smaller.settings, backend.config_type, f"tier {entry.name}")
        bare: Bare = backend.bare(config, nbytes, trial.objects, at_once)
        try:
            store_s, load_s = _timed(bare.store, contents), _timed(bare.load, targets)
        finally:
            bare.close()
    if any(content[:nbytes] != target[:nbytes] for content, target in zip(contents, targets, strict=True)):
        raise TierError(f"tier {entry.name}: its bare medium gave other bytes than were written")
    return BareTrial(bare.says, store_s, load_s)


def _timed(move: Callable[[list[memoryview]], None], buffers: list[memoryview]) -> float:
    started_s = time.monotonic()
    move(buffers)
    return time.monotonic() - started_s


@contextmanager
def _aside(entry: TierEntry) -> Iterator[tuple[TierEntry, str]]:
    """Give the tier with a folder of its own in place of the directory of its objects."""
    if (place := place_of(entry.settings)) is None:
        yield entry, ""
        return
    key = "path" if "path" in entry.settings else "url"
    folder = tempfile.mkdtemp(prefix=".kvbm-check-", dir=try_writing(place, entry.name, key))
    try:
        value = folder if key == "path" else _FILE_URL + folder
        yield msgspec.structs.replace(entry, settings={**entry.settings, key: value}), folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _smaller(entry: TierEntry, nbytes: int) -> TierEntry:
    """Give the tier with no more capacity than a try needs: some media are written whole at open."""
    if "capacity" not in entry.settings:
        return entry
    capacity = min(parse_size(entry.settings["capacity"], "capacity"), max(nbytes, _TRIAL_BYTES))
    return msgspec.structs.replace(entry, settings={**entry.settings, "capacity": capacity})


def _try(
    tier: Tier, config: StackConfig, entry: TierEntry, count: int, block_bytes: int, depth: int | None
) -> Trial:
    capabilities = tier.capabilities
    if capabilities.read_only:
        raise NotTriedError("not tried: it is read-only, others fill it")
    if capabilities.capacity_bytes is not None:
        count = min(count, capabilities.capacity_bytes // capabilities.charge(block_bytes + SEAL_BYTES))
    depth = min(depth or count, capabilities.queue_depth)
    keys = [os.urandom(_KEY_BYTES) for _ in range(count)]
    regions = [_region(block_bytes + SEAL_BYTES) for _ in keys]
    for key, region in zip(keys, regions, strict=True):
        # Half of it repeats the key, so that a codec that compresses is not made to look useless.
        half = region.view()[: block_bytes // 2]
        half[:] = (key * (1 + len(half) // _KEY_BYTES))[: len(half)]
        region.view()[len(half) : block_bytes] = os.urandom(block_bytes - len(half))
    written = [_digest(region, block_bytes) for region in regions]
    store_s = _run(
        tier, entry.name, Op.STORE, keys, regions, max(_PATIENCE_S, config.store_deadline_s), depth
    )
    for region in regions:
        region.view()[:] = bytes(region.nbytes)
    load_s = _run(tier, entry.name, Op.LOAD, keys, regions, max(_PATIENCE_S, config.load_deadline_s), depth)
    if [_digest(region, block_bytes) for region in regions] != written:
        raise TierError(f"tier {entry.name}: other bytes were read than were written", tier=entry.name)
    tier.discard(keys)
    return Trial(capabilities, count, block_bytes, store_s, load_s)


def _digest(region: Region, nbytes: int) -> bytes:
    return hashlib.blake2b(region.view()[:nbytes], digest_size=16).digest()


def _run(
    tier: Tier,
    name: str,
    op: Op,
    keys: Sequence[bytes],
    regions: Sequence[Region],
    deadline_s: float,
    depth: int,
) -> float:
    """Do one operation with every object, and give the seconds it took.

    Raises:
        TierError: It did not end well for one of them. The tier's own layer answers at the deadline.
    """
    started_s = time.monotonic()
    waiting = [
        Transfer(at, op, key, region, started_s + deadline_s)
        for at, (key, region) in enumerate(zip(keys, regions, strict=True))
    ]
    ended = 0
    while ended < len(keys):
        on_their_way = len(keys) - len(waiting) - ended
        batch = waiting[: depth - on_their_way]
        with contextlib.suppress(QueueFullError):
            tier.submit(batch)
            del waiting[: len(batch)]
        done = tier.poll()
        for each in done:
            _refuse(each, op, name)
        ended += len(done)
        if not done:
            time.sleep(_POLL_S)
    return time.monotonic() - started_s


def _refuse(end: Completion, op: Op, name: str) -> None:
    if end.outcome is not Outcome.DONE:
        detail = f": {end.detail}" if end.detail else ""
        raise TierError(f"tier {name}: {op.value} ended {end.reason.value}{detail}", tier=name)


def _buffer(nbytes: int) -> memoryview:
    """Make a buffer of whole pages, whose memory is there."""
    memory = mmap.mmap(-1, whole_pages(1, nbytes))
    memory.write(bytes(len(memory)))
    return memoryview(memory)


def _region(nbytes: int) -> Region:
    memory = mmap.mmap(-1, nbytes)
    return Region(ctypes.addressof(ctypes.c_char.from_buffer(memory)), nbytes, owner=memory)
