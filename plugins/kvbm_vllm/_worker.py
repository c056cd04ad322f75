"""The worker's half of the connector: opens one rank's tiers over vLLM's tensors, and speaks for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvbm_core import Coordinator, Device, KvbmError, StackConfig, Worker, make_namespace
from kvbm_device import CopyCounts, open_device
from kvbm_engine import Copies, Progress, Rank
from kvbm_metrics import rate_reading
from kvbm_vllm._membership import join_as_worker
from kvbm_vllm._namespace import namespace_facts, shared_facts
from kvbm_vllm._ranks import rank_facts
from kvbm_vllm._settings import block_tokens, replicas
from kvbm_vllm._values import Handshake, Outcomes, StepPlan

__all__ = ["Opened", "WorkerHalf"]


@dataclass(slots=True)
class Opened:
    """What a rank has open."""

    worker: Worker
    device: Device
    facts: dict[str, str]
    """What must be alike on every rank, see `kvbm_vllm._ranks`."""
    joins: bool = False
    """True if the device can have a step wait for the load of its blocks."""
    coordinator: Coordinator | None = None

    @property
    def counts(self) -> CopyCounts:
        """What the device counts."""
        counts: CopyCounts = getattr(self.device, "counts", CopyCounts())
        return counts


class WorkerHalf:
    """Moves one rank's blocks.

    Args:
        config: The stack.
        vllm_config: vLLM's configuration.
        kv_cache_config: How vLLM keeps the KV of this model.

    Raises:
        ConfigError: If the model's blocks cannot be stored.
    """

    def __init__(self, config: StackConfig, vllm_config: Any, kv_cache_config: Any) -> None:
        block_tokens(vllm_config, kv_cache_config)
        self._replicas = replicas(vllm_config, kv_cache_config)
        self._config = config
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._tensors: dict[str, tuple[Any, ...]] = {}
        """Where those lie that the tiers were opened over."""
        self._progress = Progress()
        self._opened: Opened | None = None
        self._rank: Rank | None = None
        self._incarnation, self._unsaid = "", False
        """Of the tiers as they were opened last, and True if the leader has yet to be told of it."""
        self._begun: StepPlan | None = None

    def __repr__(self) -> str:
        return f"<WorkerHalf {self._rank or self._progress!r}>"

    @property
    def rank(self) -> Rank:
        """What moves blocks while tiers are open."""
        assert self._rank is not None, "no tiers are open"
        return self._rank

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """Take over the engine's KV tensors and open the tiers.

        The same tensors once more are nothing new. Others take the place of those before: what is under way
        has failed then, and the leader begins anew.

        Raises:
            ConfigError: For tensors of an unknown shape.
            TierOpenError: If a tier cannot be opened.
            CoordinatorError: If another process is registered in this one's place.
        """
        tensors = _addresses(kv_caches)
        if self._opened is not None and tensors == self._tensors:
            return
        self.close()
        self.attach(self._open(kv_caches))
        self._tensors = tensors

    def attach(self, opened: Opened) -> None:
        """Move blocks through tiers that were opened for this half, and are to be told of to the leader."""
        self._opened = opened
        copies = Copies(opened.counts, opened.device.traits.block_bytes)
        self._rank = Rank(opened.worker, copies, self._progress)
        self._incarnation, self._unsaid = os.urandom(8).hex(), True

    def handshake(self) -> Handshake | None:
        """Say what the tiers can do and hold, as found when they were opened."""
        opened = self._opened
        if opened is None:
            return None
        self._unsaid = False
        rank = self._vllm_config.parallel_config.rank
        rates = {
            rate_reading(method, direction, chosen=chosen): int(speed)
            for (method, direction, chosen), speed in opened.counts.bytes_per_s.items()
        }
        return Handshake(
            rank,
            opened.worker.status(),
            opened.device.traits.block_bytes,
            opened.facts,
            opened.joins,
            rates,
            self._incarnation,
        )

    def begin(self, step: object) -> None:
        """Start a step's plan, once, before anything of the step is computed.

        Raises:
            Exception: If the step computes with blocks that cannot be loaded.
        """
        if not isinstance(step, StepPlan) or step is self._begun:
            return
        self._begun = step
        if self._rank is not None:
            self._rank.begin(step.step)
            return
        self._progress.begin(step.step)
        self._progress.fail_all()
        if any(load.in_step for load in step.step.plan.loads):
            raise KvbmError("the tiers are closed that this step loads from", operation="load")

    def collect(self) -> set[str]:
        """Take in what has ended.

        Returns:
            The requests whose loads have all ended, well or not. Each is named once.
        """
        if self._rank is not None:
            self._rank.collect()
        return self._progress.take_finished()

    def take_failed_blocks(self) -> set[int]:
        """Take the device blocks that were not loaded, of the requests named and to be named."""
        return self._progress.take_failed_blocks()

    def take_outcomes(self) -> Outcomes | None:
        """Take what the leader must know."""
        if self._begun is None:
            return None
        handshake = self.handshake() if self._unsaid or self._begun.asks else None
        outcome = self._progress.take_outcome()
        if not (outcome or handshake):
            return None
        reports = outcome.reports if outcome else []
        copied = self._rank.copies.take() if self._rank else {}
        return Outcomes(reports, self._begun.step.number, copied, [handshake] if handshake else [])

    def close(self) -> None:
        """Close the tiers; what is under way has failed. May be called twice."""
        opened, self._opened = self._opened, None
        rank, self._rank = self._rank, None
        if rank:
            rank.close()
        if opened and opened.coordinator:
            opened.coordinator.close()

    def _open(self, kv_caches: Mapping[str, Any]) -> Opened:
        parallel = self._vllm_config.parallel_config
        device = open_device(
            kv_caches, self._kv_cache_config.num_blocks,
            copy=self._config.device_copy, staging_bytes=self._config.device_staging,
        )  # fmt: skip
        facts = namespace_facts(
            self._vllm_config,
            kv_caches,
            self._kv_cache_config.num_blocks,
            self._config.weights_id,
            self._replicas,
        )
        namespace = make_namespace(facts)
        worker = Worker(
            self._config, device, namespace, rank=parallel.rank, world_size=parallel.world_size,
            replicas=self._replicas,
        )  # fmt: skip
        try:
            # Asked when the tiers have page-locked their memory. Where several engines compute a step
            # together, one that waits for its load holds up the others; and vLLM would zero what is loaded
            # in the step.
            zeroes = getattr(self._kv_cache_config, "needs_kv_cache_zeroing", False)
            joins = device.traits.stream_wait and parallel.data_parallel_size == 1 and not zeroes
            shared = make_namespace(shared_facts(facts))
            ranks = rank_facts(self._config, facts)
            coordinator = join_as_worker(self._config, self._vllm_config, namespace, shared)
        except BaseException:
            worker.close()
            raise
        return Opened(worker, device, ranks, joins, coordinator)


def _addresses(kv_caches: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Say where tensors lie, to find that they are the same ones."""
    tensors = {
        f"{name} {at}": tensor
        for name, given in kv_caches.items()
        for at, tensor in enumerate(given if isinstance(given, list | tuple) else [given])
    }
    return {
        name: (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        for name, tensor in tensors.items()
    }
