"""One rank: its tiers, each behind its layers, the transfer engine, and the thread that drives it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvbm_core.block import Namespace
from kvbm_core.config import StackConfig
from kvbm_core.device import Device, Pinnable
from kvbm_core.layers import SEAL_BYTES
from kvbm_core.plan import Plan, Report, TierStatus
from kvbm_core.registry import Registry
from kvbm_core.staging import Staging
from kvbm_core.tier import TierContext, host_pool_of
from kvbm_core.worker.jobs import Jobs
from kvbm_core.worker.opening import OpenTier, open_tiers
from kvbm_core.worker.peers import Peers
from kvbm_core.worker.transfer_engine import TransferEngine

__all__ = ["Worker"]

logger = logging.getLogger("kvbm_core")

_LAST_POLL_S: Final = 10.0
"""How long a poll under way is waited for, at the end or when the transfer engine has failed."""


class Worker:
    """Moves one rank's blocks, as planned, in a thread of its own.

    Args:
        config: The stack.
        device: The engine's blocks; closed with the worker.
        namespace: 16 bytes, see `kvbm_core.block`.
        rank: Of this worker.
        world_size: Workers the engine has.
        peers: The ranks and engines that it divides tiers with. None: nobody.
        registry: Where backends are found; by default the installed ones.
        facts: What the namespace is made of, see `TierContext.facts`.

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
        peers: Peers | None = None,
        registry: Registry | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._event = threading.Event()
        self._progress = threading.Event()
        object_bytes = [nbytes + SEAL_BYTES if nbytes else 0 for nbytes in device.traits.block_bytes]
        context = TierContext(
            namespace, max(object_bytes), rank, world_size, self._event.set,
            device.pin if isinstance(device, Pinnable) else None, device.traits.cpus,
            facts=facts or {},
        )  # fmt: skip
        self._tiers = open_tiers(
            config, context, object_bytes, peers or Peers(), registry or Registry(), device
        )
        jobs = Jobs(
            object_bytes, store_deadline_s=config.store_deadline_s, load_deadline_s=config.load_deadline_s,
            lookup_deadline_s=config.lookup_deadline_s,
        )  # fmt: skip
        staging = _staging(config, self._tiers, context)
        self._engine = TransferEngine(self._tiers, device, staging, jobs)
        self._status: list[TierStatus] | None = None
        self._closing = False
        self._polling = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kvbm-transfer", daemon=True)
        self._has_driver = False

    def __repr__(self) -> str:
        return f"<Worker {', '.join(tier.name for tier in self._tiers)}; {self._engine!r}>"

    def status(self) -> list[TierStatus]:
        """Say what each tier can do and holds, fastest first. As found at open, also when asked later."""
        if self._status is None:
            self._status = [opened.status() for opened in self._tiers]
        return self._status

    def submit(self, plan: Plan) -> None:
        """Start a plan, see `TransferEngine.submit`. Waits only for a gather that is not asynchronous.

        Raises:
            Exception: If a load `in_step` cannot be started.
        """
        self.status()
        if self._thread.ident is None and not (self._has_driver or self._closing):
            self._thread.start()
        try:
            self._engine.submit(plan)
        except Exception:
            self._fail()  # A bug of ours must not end the engine, nor be answered with a wrong token.
            if any(load.in_step for load in plan.loads):
                raise
        if self._engine.pause_s is not None:
            self._event.set()

    def take_over(self) -> TransferEngine:
        """Give the transfer engine to a caller that polls it: the worker will start no thread.

        For tests and measurements that say when copies go on.

        Raises:
            RuntimeError: If a plan was submitted already: the thread polls.
        """
        if self._thread.ident is not None:
            raise RuntimeError(f"{self!r} is driven by its thread: take it over before the first plan")
        self._has_driver = True
        return self._engine

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


def _staging(config: StackConfig, tiers: Sequence[OpenTier], context: TierContext) -> Staging | None:
    """Make the memory for blocks that pass through no host pool; only a little where there is one."""
    has_host_pool = host_pool_of([opened.tier.capabilities for opened in tiers]) >= 0
    if has_host_pool and len(tiers) == 1:
        return None
    nbytes = int(config.staging) // context.world_size
    if has_host_pool:
        nbytes = min(nbytes, 64 * context.max_bytes)
    return Staging(nbytes, context.max_bytes, context.pin)
