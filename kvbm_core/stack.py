"""Leader and worker in one process: for tests, tools, and engines that are one process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from kvbm_core.block import BlockKey, Namespace
from kvbm_core.config import StackConfig, load_config
from kvbm_core.device import Device
from kvbm_core.leader.ground.counts import TierCounts
from kvbm_core.leader.planner import Planner
from kvbm_core.registry import Registry
from kvbm_core.tier import Reason
from kvbm_core.worker.worker import Worker

__all__ = ["Stack"]


class Stack:
    """An ordered stack of tiers under one device.

    Example:
        >>> with Stack.open(config, device, namespace) as stack:
        ...     stack.store(keys, blocks)
        ...     stack.wait()
        ...     loaded = stack.load(keys, other_blocks)

    Not for use from several threads.
    """

    def __init__(self, planner: Planner, worker: Worker) -> None:
        self._planner = planner
        self._worker = worker
        self._requests = itertools.count(1)
        self._failed: dict[str, dict[BlockKey, Reason]] = {}

    @classmethod
    def open(
        cls,
        config: StackConfig | Mapping[str, Any] | str | Path,
        device: Device,
        namespace: Namespace,
        *,
        registry: Registry | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Stack:
        """Open every tier.

        Args:
            config: The configuration, a mapping, or the path of a YAML file.
            device: The blocks to store from and load into.
            namespace: 16 bytes that name everything that makes the bytes comparable.
            registry: Where backends are found; by default the installed ones.
            facts: What the namespace is made of, see `TierContext.facts`: kept beside the objects, so that
                a tier that starts empty can say what was changed.

        Raises:
            ConfigError: For a mistake in the configuration.
            TierOpenError: If a tier cannot be opened.
        """
        if not isinstance(config, StackConfig):
            config = load_config(config)
        registry = registry or Registry()
        policies = registry.policies(config)
        worker = Worker(config, device, namespace, registry=registry, facts=facts)
        try:
            planner = Planner(
                [worker.status()], max_store_blocks=config.max_store_blocks, policies=policies,
                movements=[entry.movement for entry in config.tiers],
            )  # fmt: skip
        except BaseException:
            worker.close()
            raise
        return cls(planner, worker)

    def __repr__(self) -> str:
        return f"<Stack {self._planner!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def counts(self) -> dict[str, TierCounts]:
        """What has happened so far, by the tier's name."""
        return self._planner.counts

    @property
    def occupancy(self) -> dict[str, int]:
        """Blocks in each tier, by its name."""
        return self._planner.occupancy

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Count the leading blocks that could be loaded. Asks and waits where a tier must be asked."""
        return len(self._match(keys))

    def store(
        self, keys: Sequence[BlockKey], blocks: Sequence[int], ancestors: Sequence[BlockKey] = ()
    ) -> None:
        """Start to write device blocks through to every tier.

        The blocks may be overwritten on return; where the device has `async_gather`, after `wait` or a load.
        """
        self._hear()
        self._planner.store(keys, blocks, frozenset([*ancestors, *keys]), time.monotonic())
        self._go()

    def load(self, keys: Sequence[BlockKey], blocks: Sequence[int]) -> int:
        """Load the longest prefix there is into device blocks, and wait for it.

        Returns:
            How many leading blocks hold their data now. Those after them hold anything.
        """
        tiers = self._match(keys)
        if not tiers:
            return 0
        request = str(next(self._requests))
        count = len(tiers)
        self._failed[request] = {}
        self._planner.load(request, keys[:count], blocks[:count], tiers)
        self._go()
        while self._planner.loading_blocks:
            self._step()
        failed = self._failed.pop(request)
        return next((at for at, key in enumerate(keys[:count]) if key in failed), count)

    def wait(self) -> None:
        """Wait until everything under way has ended."""
        while self._planner.busy(time.monotonic()):
            self._go()
            self._step()

    def reset(self) -> None:
        """Forget every block in every tier. In a tier shared with other engines they stay."""
        self._planner.reset()
        self._go()

    def close(self) -> None:
        """Finish what is under way and close the tiers. May be called twice."""
        self._worker.close()

    def _match(self, keys: Sequence[BlockKey]) -> list[int]:
        self._hear()
        while True:
            now_s = time.monotonic()
            tiers = self._planner.match(keys, now_s)
            rest = keys[len(tiers) :]
            if not rest or not self._planner.lookup(rest, now_s):
                return tiers
            self._go()
            self._step()

    def _go(self) -> None:
        self._worker.submit(self._planner.take(time.monotonic()))

    def _step(self) -> None:
        self._worker.wait(0.05)
        self._hear()

    def _hear(self) -> None:
        """Take in what has ended, also since the last call: a tier may work again."""
        for op, failures in self._planner.report(self._worker.reports(), time.monotonic()):
            self._failed.setdefault(op.request, {}).update((op.keys[at], why) for at, why in failures.items())
