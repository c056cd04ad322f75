"""One rank: its tiers, each behind its layers, the transfer engine, and the thread that drives it."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import Final

from kvbm_core.block import Namespace
from kvbm_core.config import StackConfig, TierEntry, convert
from kvbm_core.device import Device, Pinnable, Stageable
from kvbm_core.errors import TierOpenError
from kvbm_core.layers import FOOTER_BYTES, CheckedTier, DeadlineTier, ReplicaTier
from kvbm_core.plan import Plan, Report, TierStatus
from kvbm_core.registry import Registry
from kvbm_core.tier import Backend, Capabilities, Tier, TierConfig, TierContext, host_pool_of
from kvbm_core.worker.jobs import Jobs
from kvbm_core.worker.staging import Staging
from kvbm_core.worker.transfer_engine import TransferEngine

__all__ = ["Worker", "check_stack"]

logger = logging.getLogger("kvbm_core")

_LAST_POLL_S: Final = 10.0
"""How long a poll under way is waited for, at the end or when the transfer engine has failed."""


def check_stack(
    config: StackConfig, registry: Registry | None = None, block_bytes: int | None = None
) -> None:
    """Find mistakes before anything starts: loads every backend and has it look at its settings.

    Args:
        config: The stack.
        registry: Where backends are found; by default the installed ones.
        block_bytes: Of a block over all ranks, if that is known already.

    Raises:
        ConfigError: For an unknown backend or a wrong setting.
        TierOpenError: For what the backend finds at the place itself.
    """
    registry = registry or Registry()
    if config.coordinator is not None:
        registry.coordinator(config.coordinator).close()
    for entry, backend, settings in _resolve(config, registry):
        capacity = getattr(settings, "capacity", None)
        if block_bytes and isinstance(capacity, int) and capacity < block_bytes:
            raise TierOpenError(
                f"tier {entry.name}: capacity {entry.settings['capacity']!r} is smaller than one block of "
                f"{block_bytes:,} bytes: write a larger capacity",
                operation="check", tier=entry.name,
            )  # fmt: skip
        backend.check(settings)


class Worker:
    """Moves one rank's blocks, as planned, in a thread of its own.

    Args:
        config: The stack.
        device: The engine's blocks; closed with the worker.
        namespace: 16 bytes, see `kvbm_core.block`.
        rank: Of this worker.
        world_size: Workers the engine has.
        replicas: Neighbouring ranks that hold the same bytes; divides `world_size`.
        registry: Where backends are found; by default the installed ones.

    Raises:
        ConfigError: For a mistake in the configuration.
        TierOpenError: If a tier cannot be opened; those already open are closed again.
    """

    def __init__(
        self,
        config: StackConfig,
        device: Device,
        namespace: Namespace,
        *,
        rank: int = 0,
        world_size: int = 1,
        replicas: int = 1,
        registry: Registry | None = None,
    ) -> None:
        self._event = threading.Event()
        self._progress = threading.Event()
        context = TierContext(
            namespace, device.traits.block_bytes + FOOTER_BYTES, rank, world_size, self._event.set,
            device.pin if isinstance(device, Pinnable) else None, device.traits.cpus,
        )  # fmt: skip
        self._block_bytes = context.block_bytes
        self._names = [entry.name for entry in config.tiers]
        self._tiers = _open_tiers(config, context, replicas, registry or Registry(), device)
        jobs = Jobs(
            store_deadline_s=config.store_deadline_s, load_deadline_s=config.load_deadline_s,
            lookup_deadline_s=config.lookup_deadline_s,
        )  # fmt: skip
        staging = _staging(config, self._tiers, context)
        self._engine = TransferEngine(self._tiers, device, staging, jobs)
        self._status: list[TierStatus] | None = None
        self._closing = False
        self._polling = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kvbm-transfer", daemon=True)

    def __repr__(self) -> str:
        return f"<Worker {', '.join(self._names)}; {self._engine!r}>"

    def status(self) -> list[TierStatus]:
        """Say what each tier can do and holds, fastest first. As found at open, also when asked later."""
        if self._status is None:
            self._status = [
                TierStatus(name, tier.capabilities, list(tier.inventory()), self._block_bytes)
                for name, tier in zip(self._names, self._tiers, strict=True)
            ]
        return self._status

    def submit(self, plan: Plan) -> None:
        """Start a plan, see `TransferEngine.submit`. Waits only for a gather that is not asynchronous.

        Raises:
            Exception: If a load `in_step` cannot be started.
        """
        self.status()
        if self._thread.ident is None and not self._closing:
            self._thread.start()
        try:
            self._engine.submit(plan)
        except Exception:
            self._fail()  # A bug of ours must not end the engine, nor be answered with a wrong token.
            if any(load.in_step for load in plan.loads):
                raise
        if self._engine.active:
            self._event.set()

    def reports(self) -> list[Report]:
        """Take what has ended since the last call."""
        self._progress.clear()
        return self._engine.take_reports()

    def wait(self, timeout_s: float) -> bool:
        """Wait until `reports` may have something. False if it took too long, or nothing is under way."""
        return self._progress.wait(timeout_s if self._engine.active else 0)

    def close(self) -> None:
        """Finish or fail what is under way and close the tiers. May be called twice."""
        if self._closing:
            return
        self._closing = True
        self._event.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_LAST_POLL_S)
        if not self._thread.is_alive():  # Else it may hold the transfer engine's lock.
            self._engine.fail_all()
        self._progress.set()
        self._engine.close()

    def _run(self) -> None:
        while not self._closing:
            self._event.wait(self._engine.pause_s)
            self._event.clear()
            try:
                with self._polling:
                    self._engine.poll()
            except Exception:  # noqa: BLE001 - as in `submit`.
                self._fail()
            if self._engine.has_reports:
                self._progress.set()

    def _fail(self) -> None:
        logger.exception("the transfer engine failed; nothing is stored or loaded from here on")
        # Not beside a poll: what that starts would be written after it was said to have failed.
        alone = self._polling.acquire(timeout=_LAST_POLL_S)
        self._engine.fail_all()
        if alone:
            self._polling.release()
        self._progress.set()


def _resolve(config: StackConfig, registry: Registry) -> list[tuple[TierEntry, Backend, TierConfig]]:
    resolved = []
    for position, entry in enumerate(config.tiers):
        backend = registry.backend(entry.backend)
        where = f"tiers[{position}] ({entry.name})"
        resolved.append((entry, backend, convert(entry.settings, backend.config_type, where)))
    return resolved


def _open_tiers(
    config: StackConfig, context: TierContext, replicas: int, registry: Registry, device: Device
) -> list[Tier]:
    tiers: list[Tier] = []
    try:
        for entry, backend, settings in _resolve(config, registry):
            woken = threading.Event()
            opened = _open(backend, settings, dataclasses.replace(context, wake=woken.set), replicas)
            is_first = host_pool_of([tier.capabilities for tier in tiers]) < 0
            tiers.append(_layered(opened, entry, context, woken, device, may_be_host_pool=is_first))
    except BaseException:
        for tier in tiers:
            tier.close()
        raise
    return tiers


def _open(backend: Backend, settings: TierConfig, context: TierContext, replicas: int) -> Tier:
    """Open a tier. In a shared one ranks that hold the same bytes meet, and the first of them writes."""
    if replicas == 1 or not backend.shared:
        return backend.open(settings, context)
    shard, place = divmod(context.rank, replicas)
    shards = context.world_size // replicas
    tier = backend.open(settings, dataclasses.replace(context, rank=shard, world_size=shards))
    return ReplicaTier(tier, context.wake) if place else tier


def _layered(
    tier: Tier, entry: TierEntry, context: TierContext, woken: threading.Event, device: Device,
    *, may_be_host_pool: bool,
) -> Tier:  # fmt: skip
    """Put its layers around a tier. The host pool gets none: its memory is used directly."""
    try:
        _check_capacity(tier.capabilities, entry, context)
    except TierOpenError:
        tier.close()
        raise
    _announce(tier.capabilities, entry, context)
    addressable = tier.capabilities.addressable
    if addressable and may_be_host_pool and not entry.checked:
        return tier
    read = device.read if isinstance(device, Stageable) else None
    if entry.checked or (entry.checked is None and not addressable):
        tier = CheckedTier(tier, context.namespace, read)
    return DeadlineTier(tier, woken, entry.name, context.wake, stages=read is not None)


def _announce(capabilities: Capabilities, entry: TierEntry, context: TierContext) -> None:
    room = "no limit" if capabilities.capacity_blocks is None else f"{capabilities.capacity_blocks:,} blocks"
    detail = f"; {capabilities.detail}" if capabilities.detail else ""
    logger.info("tier %s is open: %s of %d bytes%s", entry.name, room, context.block_bytes, detail)


def _check_capacity(capabilities: Capabilities, entry: TierEntry, context: TierContext) -> None:
    if capabilities.capacity_blocks is not None and capabilities.capacity_blocks < 1:
        raise TierOpenError(
            f"tier {entry.name}: capacity {entry.settings.get('capacity')!r} holds no block; a block is "
            f"{context.block_bytes:,} bytes on each of {context.world_size} ranks: write a larger capacity",
            operation="open", tier=entry.name,
        )  # fmt: skip


def _staging(config: StackConfig, tiers: Sequence[Tier], context: TierContext) -> Staging | None:
    """Make the memory for blocks that pass through no host pool; only a little where there is one."""
    has_host_pool = host_pool_of([tier.capabilities for tier in tiers]) >= 0
    if has_host_pool and len(tiers) == 1:
        return None
    nbytes = int(config.staging) // context.world_size
    if has_host_pool:
        nbytes = min(nbytes, 64 * context.block_bytes)
    return Staging(nbytes, context.block_bytes, context.pin)
