"""What `kvbm check` finds of each tier, and of the stack."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from kvbm_cli.check._trial import NotTriedError, Trial, place_of, try_tier, why_not_tried
from kvbm_cli.size._answer import Sizes
from kvbm_core.config import StackConfig, TierEntry, parse_size, size_text
from kvbm_core.coordinator import Probeable
from kvbm_core.errors import KvbmError
from kvbm_core.localdir import free_bytes
from kvbm_core.registry import Registry
from kvbm_core.remedies import existing_folder
from kvbm_core.sharing import sharing_of
from kvbm_core.tier import Capabilities
from kvbm_core.worker.opening import check_stack

__all__ = ["CheckedCoordinator", "CheckedStack", "CheckedTier", "check_all"]

_TRAITS = ("durable", "addressable", "device_direct", "shared", "remote_lookup", "read_only")


class CheckedTier(msgspec.Struct, frozen=True, kw_only=True):
    """One tier, as it was found."""

    name: str
    backend: str
    plugin: str
    """Which distribution brings the backend."""
    codecs: list[str]
    policy: str
    place: str | None = None
    """The directory on this machine, if it keeps one."""
    capacity_bytes: int | None = None
    """As configured, over all ranks; null for a tier without one."""
    free_bytes: int | None = None
    """Of the file system, or of host memory; null where that is not known."""
    fits_tokens: int | None = None
    """That the capacity holds, of the prompts that were asked for."""
    traits: list[str] = []
    """What the tier said of itself when it was opened."""
    detail: str = ""
    """How it works on this machine."""
    tried_objects: int = 0
    tried_bytes: int = 0
    """Of each object."""
    store_bytes_per_s: float | None = None
    load_bytes_per_s: float | None = None
    """Of what was just written: a page cache may have it."""
    warnings: list[str] = []
    """What the tier's backend warned of meanwhile."""
    not_tried: str | None = None
    problem: str | None = None
    """What is wrong, and what to write or do instead."""


class CheckedCoordinator(msgspec.Struct, frozen=True, kw_only=True):
    """Where engines register, as it was found."""

    backend: str
    detail: str = ""
    """How it answered."""
    warnings: list[str] = []
    not_tried: str | None = None
    problem: str | None = None
    """What is wrong, and what to write or do instead."""


class CheckedStack(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm check --json` writes."""

    source: str
    block_bytes: int
    """Of a block on one rank, that was written."""
    ranks: int
    tiers: list[CheckedTier]
    coordinator: CheckedCoordinator | None
    """Null: none is configured."""
    warnings: list[str]
    """What is of no use where it stands."""
    problems: list[str]
    """Of the stack as a whole; those of a tier stand there."""
    notes: list[str]


def check_all(
    config: StackConfig, source: str, block_bytes: int, ranks: int, sizes: Sizes | None, *, try_tiers: bool
) -> CheckedStack:
    """Check every tier, each by itself, and then the stack."""
    tiers = [
        _check(config, at, entry, block_bytes, sizes, try_tiers=try_tiers)
        for at, entry in enumerate(config.tiers)
    ]
    problems: list[str] = []
    with _warnings() as warnings:
        try:
            check_stack(msgspec.structs.replace(config, coordinator=None))
            sharing_of(config)
        except KvbmError as error:
            if not any(tier.problem for tier in tiers):
                problems.append(str(error))
    warnings += [line for tier in tiers for line in _too_slow(config, tier)]
    return CheckedStack(
        source=source,
        block_bytes=block_bytes,
        ranks=ranks,
        tiers=tiers,
        coordinator=_check_coordinator(config, try_it=try_tiers),
        warnings=warnings,
        problems=problems,
        notes=list(sizes.notes) if sizes else [],
    )


def _check_coordinator(config: StackConfig, *, try_it: bool) -> CheckedCoordinator | None:
    """Try the coordinator as an engine would use it. An engine that it refuses does not start."""
    if config.coordinator is None:
        return None
    found = CheckedCoordinator(backend=str(config.coordinator.get("backend")))
    with _warnings() as said:
        try:
            made = Registry().coordinator(config.coordinator)
            try:
                if not try_it or not isinstance(made, Probeable):
                    reason = "it cannot be tried without an engine" if try_it else "not asked for"
                    return msgspec.structs.replace(found, not_tried=reason)
                return msgspec.structs.replace(found, detail=made.probe(), warnings=said)
            finally:
                made.close()
        except KvbmError as error:
            return msgspec.structs.replace(found, problem=str(error), warnings=said)


def _check(
    config: StackConfig, at: int, entry: TierEntry, block_bytes: int, sizes: Sizes | None, *, try_tiers: bool
) -> CheckedTier:
    place, registry = place_of(entry.settings), Registry()
    found = CheckedTier(
        name=entry.name,
        backend=entry.backend,
        plugin=registry.owner(entry.backend).partition(" of ")[2],
        codecs=[codec.name for codec in entry.codecs],
        policy=entry.policy.name if entry.policy else "lru",
        place=str(place) if place else None,
        capacity_bytes=_capacity(entry),
        free_bytes=_free(place, entry),
    )
    with _warnings() as said:
        try:
            check_stack(msgspec.structs.replace(config, tiers=(entry,), coordinator=None))
            reason = why_not_tried(entry, shared=registry.backend(entry.backend).shared)
            if reason or not try_tiers:
                return msgspec.structs.replace(found, not_tried=reason or "not asked for")
            trial = try_tier(config, entry, block_bytes)
        except NotTriedError as error:
            return msgspec.structs.replace(found, not_tried=str(error))
        except KvbmError as error:
            # It stood alone when it was checked.
            problem = str(error).replace("tiers[0]", f"tiers[{at}]", 1)
            return msgspec.structs.replace(found, problem=problem, warnings=said)
    return _seen(msgspec.structs.replace(found, warnings=said), trial, sizes)


def _seen(found: CheckedTier, trial: Trial, sizes: Sizes | None) -> CheckedTier:
    """Put down what was seen of a tier."""
    nbytes = trial.objects * trial.object_bytes
    return msgspec.structs.replace(
        found,
        traits=[trait for trait in _TRAITS if getattr(trial.capabilities, trait)],
        detail=trial.capabilities.detail,
        tried_objects=trial.objects,
        tried_bytes=trial.object_bytes,
        store_bytes_per_s=nbytes / max(trial.store_s, 1e-9),
        load_bytes_per_s=nbytes / max(trial.load_s, 1e-9),
        fits_tokens=_fits(found, trial.capabilities, sizes) if sizes else None,
    )


def _fits(found: CheckedTier, capabilities: Capabilities, sizes: Sizes) -> int | None:
    """Count the tokens of prompts that a tier holds, each object rounded up as the tier does."""
    if found.capacity_bytes is None:
        return None
    prompt_bytes = sizes.ranks * sum(
        group.prompt_blocks * capabilities.charge(group.rank_block_bytes + sizes.seal_bytes)
        for group in sizes.groups
    )
    return found.capacity_bytes * sizes.prompt_tokens // prompt_bytes if prompt_bytes else None


def _too_slow(config: StackConfig, tier: CheckedTier) -> Iterator[str]:
    """Say what an engine would give up at its deadlines."""
    nbytes = tier.tried_objects * tier.tried_bytes
    for verb, rate, key in (
        ("storing", tier.store_bytes_per_s, "store_deadline_s"),
        ("loading", tier.load_bytes_per_s, "load_deadline_s"),
    ):
        if rate and nbytes / rate > getattr(config, key):
            yield (
                f"tier {tier.name}: {verb} {size_text(nbytes)} took {nbytes / rate:.1f} s, longer than {key} "
                f"({getattr(config, key):g} s): an engine gives up what takes longer, and computes it. Write "
                "a longer one, or a faster place"
            )


def _capacity(entry: TierEntry) -> int | None:
    try:
        return int(parse_size(entry.settings["capacity"])) if "capacity" in entry.settings else None
    except KvbmError:
        return None  # The tier's problem says so.


def _free(place: Path | None, entry: TierEntry) -> int | None:
    """Say how much there is where a tier keeps its objects."""
    if place:
        with suppress(OSError):  # The tier's problem says so.
            return free_bytes(existing_folder(place))
        return None
    if entry.settings.keys() != {"capacity"}:
        return None
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Give what the core and backends warn of meanwhile, in place of the log."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    # With a handler at the root nothing goes to the handler of last resort, which writes between the lines.
    root, collector = logging.getLogger(), Collector(logging.WARNING)
    root.addHandler(collector)
    try:
        yield lines
    finally:
        root.removeHandler(collector)
