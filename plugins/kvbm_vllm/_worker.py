"""The worker's half of the connector: opens one rank's tiers over vLLM's tensors, and speaks for them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbm_core import ConfigError, Coordinator, Device, KvbmError, StackConfig, Worker, make_namespace
from kvbm_core.groups import is_plain
from kvbm_device import CopyCounts, open_device
from kvbm_engine import Copies, Progress, Rank
from kvbm_metrics import rate_reading
from kvbm_vllm._groups import engine_groups, group_facts
from kvbm_vllm._membership import join_as_worker
from kvbm_vllm._namespace import namespace_facts, shared_facts, told_facts
from kvbm_vllm._ranks import rank_facts
from kvbm_vllm._replicas import replicas_of
from kvbm_vllm._settings import replicas
from kvbm_vllm._values import Handshake, Outcomes, StepPlan

__all__ = ["Opened", "WorkerHalf", "layers_by_group"]


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
    namespace: str = ""
    """In hexadecimal digits."""

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
        self._groups = engine_groups(vllm_config, kv_cache_config)
        self._replicas = replicas(vllm_config, kv_cache_config)
        self._config = config
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._tensors: dict[str, tuple[Any, ...]] = {}
        """Where those lie that the tiers were opened over."""
        # With several groups, stored or not, vLLM takes no failures of blocks: it ends the engine.
        whole = self._groups.total > 1 or not is_plain(self._groups.groups)
        self._progress = Progress(whole_requests=whole)
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
        self._rank = Rank(opened.worker, Copies(opened.counts), self._progress)
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
            opened.facts,
            opened.joins,
            rates,
            self._incarnation,
            opened.namespace,
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

    def take_failed_requests(self) -> set[str]:
        """Take the requests, among those named, that were not loaded in every KV group."""
        return self._progress.take_failed_requests()

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
            layers_by_group(kv_caches, self._kv_cache_config, self._groups.numbers),
            self._kv_cache_config.num_blocks,
            copy=self._config.device_copy, staging_bytes=self._config.device_staging,
        )  # fmt: skip
        facts = namespace_facts(
            self._vllm_config,
            kv_caches,
            self._kv_cache_config.num_blocks,
            self._config.weights_id,
            self._replicas,
            group_facts(self._kv_cache_config, self._groups),
        )
        namespace = make_namespace(facts)
        worker = Worker(
            self._config, device, namespace, rank=parallel.rank, world_size=parallel.world_size,
            peers=replicas_of(parallel).peers(parallel, self._replicas), facts=told_facts(facts),
        )  # fmt: skip
        try:
            # Asked when the tiers have page-locked their memory. Where several engines compute a step
            # together, one that waits for its load holds up the others; and vLLM would zero what is loaded
            # in the step.
            zeroes = getattr(self._kv_cache_config, "needs_kv_cache_zeroing", False)
            alone = parallel.data_parallel_size == 1 and self._groups.total == 1
            joins = device.traits.stream_wait and alone and not zeroes
            shared = make_namespace(shared_facts(facts))
            ranks = rank_facts(self._config, facts)
            coordinator = join_as_worker(self._config, self._vllm_config, namespace, shared)
        except BaseException:
            worker.close()
            raise
        return Opened(worker, device, ranks, joins, coordinator, namespace.hex())


def layers_by_group(
    kv_caches: Mapping[str, Any], kv_cache_config: Any, numbers: Sequence[int]
) -> list[Mapping[str, Any]]:
    """Divide the tensors that vLLM registers over its KV groups, in the order in which it registers them.

    A layer that vLLM puts into no group uses the memory of one that is in a group: it has no KV of its own.

    Args:
        kv_caches: Layer name to KV tensor (or tensors), as registered.
        kv_cache_config: How vLLM keeps the KV of this model.
        numbers: Of the groups that are stored; all if not given.

    Raises:
        ConfigError: If a layer that is in no group has memory of its own, which nothing would store.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) == 1:
        return [kv_caches]
    held = {name: number for number, group in enumerate(groups) for name in group.layer_names}
    known = set(_addresses({name: given for name, given in kv_caches.items() if name in held}).values())
    for name, given in kv_caches.items():
        if name not in held and not known.issuperset(_addresses({name: given}).values()):
            raise ConfigError(f"layer {name!r} is in none of the {len(groups)} KV groups of the model")
    return [
        {name: given for name, given in kv_caches.items() if held.get(name) == number} for number in numbers
    ]


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
