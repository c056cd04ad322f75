"""How a rank's tiers are found, checked and opened, each behind its layers."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Final

import msgspec

from kvbm_core.block import make_namespace
from kvbm_core.codec import Codec, CodecConfig, CodecContext, CodecKind
from kvbm_core.config import ByteSize, StackConfig, TierEntry, convert, size_text
from kvbm_core.device import Device, Stageable
from kvbm_core.errors import BackendError, ConfigError, KvbmError, TierOpenError
from kvbm_core.layers import CodecChain, CodecTier, DeadlineTier, OrderShape, OrderTier, ReplicaTier, SealTier
from kvbm_core.namespace_facts import codec_facts
from kvbm_core.plan import TierStatus
from kvbm_core.registry import Registry
from kvbm_core.tier import Addressable, Backend, Capabilities, Tier, TierConfig, TierContext, host_pool_of
from kvbm_core.worker.peers import Peers

__all__ = ["OpenTier", "check_stack", "open_tiers"]

logger = logging.getLogger("kvbm_core")

_TRAITS: Final = ("durable", "addressable", "device_direct", "shared", "remote_lookup", "read_only")
"""What of `Capabilities` is true or false."""


@dataclasses.dataclass(frozen=True, slots=True)
class OpenTier:
    """A tier behind its layers."""

    name: str
    tier: Tier
    charges: tuple[int, ...]
    """For each KV group the bytes of the capacity that are reserved for an object: the most it can take."""
    block_bytes: tuple[int, ...]
    """For each KV group the bytes of a block."""

    def status(self) -> TierStatus:
        """Say what the tier can do and holds, as found at open."""
        capabilities = self.tier.capabilities
        inventory = [(key, capabilities.charge(nbytes)) for key, nbytes in self.tier.inventory()]
        return TierStatus(self.name, capabilities, inventory, self.charges, self.block_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class _Choice:
    """A tier as configured: its entry, its backend, and whose that is."""

    entry: TierEntry
    backend: Backend
    settings: TierConfig
    owner: str
    """Name and version of the distribution, for messages."""
    codecs: tuple[tuple[CodecKind, CodecConfig], ...] = ()
    """In the order in which they encode."""

    @contextmanager
    def named(self, operation: str) -> Iterator[None]:
        """Have each error say the tier, and one that is no `KvbmError` the distribution at fault."""
        try:
            yield
        except KvbmError as error:
            if f"tier {self.entry.name}" not in str(error):
                error.args = (f"tier {self.entry.name}: {error}",)
            # The backend knows its own name, and `check` is not told the tier's.
            error.tier = self.entry.name
            raise
        except Exception as error:
            raise TierOpenError(
                f"tier {self.entry.name}: backend {self.owner} failed in {operation}() with "
                f"{type(error).__name__}: {error}; it should raise a TierOpenError: tell its authors",
                operation=operation, tier=self.entry.name,
            ) from error  # fmt: skip

    def open(self, context: TierContext) -> Tier:
        """Open the tier and see that it is one."""
        with self.named("open"):
            tier: Any = self.backend.open(self.settings, context)
        if isinstance(tier, Tier):
            return tier
        lacks = [name for name in sorted(Tier.__abstractmethods__) if not hasattr(tier, name)]
        missing = f" and has no {', '.join(lacks)}" if tier is not None and lacks else ""
        raise self.fault(f"open() returned a {type(tier).__name__}, which is no kvbm_core.Tier{missing}")

    def fault(self, what: str) -> BackendError:
        """Make an error for what a backend does against the contract."""
        return BackendError(
            f"tier {self.entry.name}: backend {self.owner}: {what}; a mistake of the backend: tell its "
            "authors, or install another release",
            operation="open", tier=self.entry.name,
        )  # fmt: skip


def check_stack(
    config: StackConfig,
    registry: Registry | None = None,
    block_bytes: int | None = None,
    share: Fraction = Fraction(1),
    engines: int = 1,
) -> None:
    """Find mistakes before anything starts: loads every plug-in and has each backend look at its settings.

    Args:
        config: The stack.
        registry: Where backends are found; by default the installed ones.
        block_bytes: Of a block over all ranks, if that is known already.
        share: The part of the engine's ranks that are on this host, above 0, at most 1. A backend checks so
            much of the capacity.
        engines: That divide the capacity of a tier which is not shared, see `Peers`.

    Raises:
        ConfigError: For an unknown backend or a wrong setting.
        TierOpenError: For what the backend finds at the place itself.
    """
    registry = registry or Registry()
    if config.coordinator is not None:
        registry.coordinator(config.coordinator).close()
    choices = _choose(config, registry)
    registry.policies(config)
    _warn_of_order(choices)
    for choice in choices:
        entry, capacity = choice.entry, _capacity(choice)
        if block_bytes and capacity is not None and capacity < block_bytes * engines:
            each = f" for each of {engines} engines" if engines > 1 else ""
            raise TierOpenError(
                f"tier {entry.name}: capacity {entry.settings['capacity']!r} is smaller than one block of "
                f"{size_text(block_bytes, up=True)}{each}: write a larger capacity",
                operation="check", tier=entry.name,
            )  # fmt: skip
        with choice.named("check"):
            choice.backend.check(_on_this_host(choice, share))


def _on_this_host(choice: _Choice, share: Fraction) -> TierConfig:
    capacity = _capacity(choice)
    if share == 1 or capacity is None:
        return choice.settings
    return msgspec.structs.replace(choice.settings, capacity=ByteSize(capacity * share))


def open_tiers(
    config: StackConfig, context: TierContext, object_bytes: Sequence[int], peers: Peers,
    registry: Registry, device: Device,
) -> list[OpenTier]:  # fmt: skip
    """Open every tier of a rank, fastest first; if one cannot be, close those already open.

    Args:
        config: The stack.
        context: Of the rank; its `wake` is called when a tier has something to poll, and its `max_bytes` are
            those before any codec.
        object_bytes: For each KV group the length of its objects on this rank.
        peers: Who is beside the rank.
        registry: Where backends are found.
        device: The engine's blocks.

    Raises:
        ConfigError: For a mistake in the configuration, or of a backend.
        TierOpenError: If a tier cannot be opened.
    """
    opened: list[OpenTier] = []
    try:
        for choice in _choose(config, registry):
            may_be_host_pool = host_pool_of([each.tier.capabilities for each in opened]) < 0
            opened.append(
                _open(choice, context, object_bytes, peers, device, may_be_host_pool=may_be_host_pool)
            )
    except BaseException:
        for each in opened:
            each.tier.close()
        raise
    return opened


def _choose(config: StackConfig, registry: Registry) -> list[_Choice]:
    choices = []
    for position, entry in enumerate(config.tiers):
        backend = registry.backend(entry.backend)
        where = f"tiers[{position}] ({entry.name})"
        settings = convert(entry.settings, backend.config_type, where)
        codecs = tuple(
            (
                kind := registry.codec(part.name),
                convert(part.settings, kind.config_type, f"{where}: {part.name}"),
            )
            for part in entry.codecs
        )
        choices.append(_Choice(entry, backend, settings, registry.owner(entry.backend), codecs))
    places: dict[str, str] = {}
    for choice in choices:
        place, name = _place(choice.settings), choice.entry.name
        if place and places.setdefault(place, name) != name:
            raise ConfigError(
                f"tiers {places[place]!r} and {name!r} have the same path or URL, and would delete each "
                "other's blocks; give each a place of its own"
            )
    return choices


def _place(settings: TierConfig) -> str:
    """Give what two tiers must not have both: a directory by its real path, or a URL."""
    url = getattr(settings, "url", None)
    path = getattr(settings, "path", None)
    if isinstance(url, str) and url:
        if not url.startswith("file://"):
            return url.rstrip("/")
        path = url.removeprefix("file://")
    return os.path.realpath(os.path.expanduser(path)) if isinstance(path, str) and path else ""


def _capacity(choice: _Choice) -> int | None:
    capacity = getattr(choice.settings, "capacity", None)
    return capacity if isinstance(capacity, int) else None


def _warn_of_order(choices: Sequence[_Choice]) -> None:
    """Name tiers that are of no use where they stand."""
    for upper, lower in itertools.pairwise(choices):
        if upper.backend.shared and not lower.backend.shared:
            logger.warning(
                "tier %s is remote and stands above tier %s: tiers are asked from the first, and blocks "
                "come from the first that has them; write the fastest first, and remote ones at the end",
                upper.entry.name, lower.entry.name,
            )  # fmt: skip
    sized = [(choice.entry.name, size) for choice in choices if (size := _capacity(choice)) is not None]
    for (above, more), (below, less) in itertools.pairwise(sized):
        if less < more:
            logger.warning(
                "tier %s (capacity %s) is smaller than tier %s above it (%s): every block is written to "
                "both, so it has hardly any that the upper has not; write a larger capacity, or leave it out",
                below, size_text(less), above, size_text(more),
            )  # fmt: skip


def _open(
    choice: _Choice, context: TierContext, object_bytes: Sequence[int], peers: Peers, device: Device,
    *, may_be_host_pool: bool,
) -> OpenTier:  # fmt: skip
    """Open a tier and put its layers around it. The host pool gets none: its memory is used directly."""
    woken, name = threading.Event(), choice.entry.name
    codecs = _open_codecs(choice, context)
    rank, ranks, follows = peers.seat(context.rank, context.world_size, shared=choice.backend.shared)
    inside = dataclasses.replace(context, wake=woken.set, name=name, rank=rank, world_size=ranks)
    if codecs:
        inside = dataclasses.replace(
            inside, max_bytes=codecs.max_bytes(context.max_bytes),
            namespace=make_namespace({"namespace": context.namespace, "codecs": codecs.identities}),
            facts=context.facts and {**context.facts, "codecs": codec_facts(codecs.identities)},
        )  # fmt: skip
    tier = choice.open(inside)
    try:
        _check_capabilities(tier, choice)
        _check_capacity(tier.capabilities, choice.entry, inside)
        _check_codecs(tier.capabilities, choice, inside, may_be_host_pool=may_be_host_pool)
    except BaseException:
        tier.close()
        raise
    _announce(tier.capabilities, choice, inside)
    bare = tier.capabilities

    def charge(nbytes: int) -> int:
        return bare.charge(codecs.max_bytes(nbytes) if codecs and nbytes else nbytes)

    charges = tuple(map(charge, object_bytes))
    addressable, checked = tier.capabilities.addressable, choice.entry.checked
    if addressable and may_be_host_pool and not checked and not codecs:
        return OpenTier(name, tier, charges, device.traits.block_bytes)
    read = device.read if isinstance(device, Stageable) else None
    if codecs:
        tier = CodecTier(tier, codecs, context.max_bytes, woken.set, name)
    if checked or (checked is None and (codecs or not addressable)):
        tier = SealTier(tier, context.namespace, read, name)
    if shape := OrderShape.of(bare, context.max_bytes, charge):
        tier = OrderTier(tier, shape, woken.set, name)
    if follows:
        tier = ReplicaTier(tier, woken.set)
    tier = DeadlineTier(tier, woken, name, context.wake, stages=read is not None)
    return OpenTier(name, tier, charges, device.traits.block_bytes)


def _open_codecs(choice: _Choice, context: TierContext) -> CodecChain | None:
    """Open the codecs of a tier, as one."""
    codecs: list[tuple[str, Codec]] = []
    max_bytes = context.max_bytes
    for kind, settings in choice.codecs:
        with choice.named(f"codec {kind.name}: open"):
            codec: Any = kind.open(settings, CodecContext(context.namespace, max_bytes, choice.entry.name))
            if not isinstance(codec, Codec):
                raise choice.fault(f"codec {kind.name!r} is a {type(codec).__name__}; it must be a Codec")
            max_bytes = codec.max_bytes(max_bytes)
        codecs.append((kind.name, codec))
    return CodecChain(codecs, context.max_bytes) if codecs else None


def _check_codecs(
    capabilities: Capabilities, choice: _Choice, context: TierContext, *, may_be_host_pool: bool
) -> None:
    """Refuse codecs where they would do harm, or be of no use."""
    name = choice.entry.name
    has_slots = capabilities.charge(1) == capabilities.charge(context.max_bytes)
    if choice.codecs and capabilities.addressable and may_be_host_pool:
        raise ConfigError(
            f"tier {name}: codecs: this tier is the host pool, whose memory is used as it is: leave its "
            "codecs out, and write them on a tier below"
        )
    for kind, _ in choice.codecs:
        if kind.saves_room and has_slots:
            raise ConfigError(
                f"tier {name}: codecs: {kind.name!r} would save no room here: each object takes a slot of "
                f"{size_text(capabilities.unit_bytes)}, whatever its length. Leave it out, or write it on a "
                "tier that keeps lengths, like lmdb or remote"
            )
    if choice.codecs and capabilities.device_direct:
        logger.info("tier %s: its codecs work in host memory, so it does not read into the device's", name)


def _check_capabilities(tier: Tier, choice: _Choice) -> None:
    """Refuse what the core could not obey, or would believe wrongly."""
    with choice.named("capabilities"):
        found: Any = tier.capabilities
    if not isinstance(found, Capabilities):
        raise choice.fault(f"capabilities is a {type(found).__name__}; it must be kvbm_core.Capabilities")
    for part, least in (("queue_depth", 1), ("unit_bytes", 1), ("overhead_bytes", 0)):
        if not _is_count(getattr(found, part), least):
            raise choice.fault(
                f"capabilities.{part} is {getattr(found, part)!r}; it must be an int, {least} or more"
            )
    if found.capacity_bytes is not None and not _is_count(found.capacity_bytes, 0):
        raise choice.fault(
            f"capabilities.capacity_bytes is {found.capacity_bytes!r}; it must be None or an int, 0 or more"
        )
    for trait in _TRAITS:
        if not isinstance(getattr(found, trait), bool):
            raise choice.fault(f"capabilities.{trait} is {getattr(found, trait)!r}; it must be True or False")
    if not isinstance(found.detail, str):
        raise choice.fault(f"capabilities.detail is a {type(found.detail).__name__}; it must be a str")
    _check_traits(found, tier, choice)


def _check_traits(found: Capabilities, tier: Tier, choice: _Choice) -> None:
    """Refuse traits that contradict each other, the tier or its backend."""
    if found.remote_lookup and found.capacity_bytes is not None:
        raise choice.fault("capabilities: with remote_lookup capacity_bytes must be None")
    if found.addressable and not isinstance(tier, Addressable):
        raise choice.fault(
            f"capabilities.addressable is True, and {type(tier).__name__} is no kvbm_core.Addressable"
        )
    if found.shared != choice.backend.shared:
        raise choice.fault(
            f"capabilities.shared is {found.shared}, and the Backend's shared is {choice.backend.shared}; "
            "they must be alike, or a reset would delete what other engines stored"
        )


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _announce(capabilities: Capabilities, choice: _Choice, context: TierContext) -> None:
    capacity = capabilities.capacity_bytes
    room = "no limit" if capacity is None else size_text(capacity)
    detail = f"; {capabilities.detail}" if capabilities.detail else ""
    codecs = "".join(f"; codec {kind.name}" for kind, _ in choice.codecs)
    logger.info(
        "tier %s is open: %s for blocks of %d bytes%s%s",
        choice.entry.name, room, context.max_bytes, codecs, detail,
    )  # fmt: skip


def _check_capacity(capabilities: Capabilities, entry: TierEntry, context: TierContext) -> None:
    capacity = capabilities.capacity_bytes
    if capacity is not None and capacity < capabilities.charge(context.max_bytes):
        raise TierOpenError(
            f"tier {entry.name}: capacity {entry.settings.get('capacity')!r} holds no block; a block is "
            f"{size_text(context.max_bytes, up=True)} on each of {context.world_size} ranks: write a "
            "larger capacity",
            operation="open", tier=entry.name,
        )  # fmt: skip
