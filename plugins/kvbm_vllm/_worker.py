"""The worker's half of the connector: carries out the leader's plans on one rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from kvbm_core import Coordinator, KvbmError, Load, Report, StackConfig, Worker, make_namespace
from kvbm_device import CopyCounts, open_device
from kvbm_metrics import device_readings, rate_reading
from kvbm_vllm._membership import join_as_worker
from kvbm_vllm._namespace import namespace_facts, shared_facts
from kvbm_vllm._ranks import rank_facts
from kvbm_vllm._settings import block_tokens, replicas
from kvbm_vllm._values import Handshake, Outcomes, StepPlan

__all__ = ["WorkerHalf"]

logger = logging.getLogger("kvbm_vllm")


class WorkerHalf:
    """Moves one rank's blocks.

    Args:
        config: The stack.
        vllm_config: vLLM's configuration.
        kv_cache_config: How vLLM keeps the KV of this model.

    Raises:
        ConfigError: If the model's blocks cannot be stored.
    """

    _LOAD_WAIT_S: Final = 0.005
    """How long an idle step waits for progress: an engine that only waits for a disk shall not burn a core,
    and the transfer engine's thread needs the interpreter meanwhile."""
    _STORE_WAIT_S: Final = 0.001
    """Likewise where no request is loading: the next may come at any time, and is not seen while it waits."""

    def __init__(self, config: StackConfig, vllm_config: Any, kv_cache_config: Any) -> None:
        block_tokens(vllm_config, kv_cache_config)
        self._replicas = replicas(vllm_config, kv_cache_config)
        self._config = config
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._worker: Worker | None = None
        self._coordinator: Coordinator | None = None
        self._tensors: dict[str, tuple[Any, ...]] = {}
        self._incarnation, self._unsaid = "", False
        """Of the tiers as they were opened last, and whether the leader has yet to be told of it."""
        self._block_bytes, self._joins = 0, False
        self._facts: dict[str, str] = {}
        self._counts = CopyCounts()
        self._copied: dict[str, int] = {}
        self._begun: StepPlan | None = None
        self._told = 0
        """The last step whose outcomes held a report."""
        self._loads: dict[int, Load] = {}
        self._open_loads: dict[str, set[int]] = {}
        self._finished: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._reports: list[Report] = []

    def __repr__(self) -> str:
        return f"<WorkerHalf {len(self._open_loads)} requests loading; {self._worker!r}>"

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
        if self._worker is not None and tensors == self._tensors:
            return
        self.close()
        try:
            self._open(kv_caches)
        except BaseException:
            self.close()
            raise
        self._tensors, self._incarnation, self._unsaid = tensors, os.urandom(8).hex(), True

    def _open(self, kv_caches: Mapping[str, Any]) -> None:
        parallel = self._vllm_config.parallel_config
        device = open_device(
            kv_caches, self._kv_cache_config.num_blocks,
            copy=self._config.device_copy, staging_bytes=self._config.device_staging,
        )  # fmt: skip
        self._counts, self._copied = getattr(device, "counts", CopyCounts()), {}
        self._block_bytes = device.traits.block_bytes
        facts = namespace_facts(
            self._vllm_config,
            kv_caches,
            self._kv_cache_config.num_blocks,
            self._config.weights_id,
            self._replicas,
        )
        self._facts = rank_facts(self._config, facts)
        namespace = make_namespace(facts)
        self._worker = Worker(
            self._config, device, namespace, rank=parallel.rank, world_size=parallel.world_size,
            replicas=self._replicas,
        )  # fmt: skip
        # Asked when the tiers have page-locked their memory. Where several engines compute a step together,
        # one that waits for its load holds up the others; and vLLM would zero what is loaded in the step.
        zeroes = getattr(self._kv_cache_config, "needs_kv_cache_zeroing", False)
        self._joins = device.traits.stream_wait and parallel.data_parallel_size == 1 and not zeroes
        self._coordinator = join_as_worker(
            self._config, self._vllm_config, namespace, make_namespace(shared_facts(facts))
        )

    def handshake(self) -> Handshake | None:
        """Say what the tiers can do and hold, as found when they were opened."""
        if self._worker is None:
            return None
        self._unsaid = False
        rank = self._vllm_config.parallel_config.rank
        rates = {
            rate_reading(method, direction, chosen=chosen): int(speed)
            for (method, direction, chosen), speed in self._counts.bytes_per_s.items()
        }
        status = self._worker.status()
        return Handshake(rank, status, self._block_bytes, self._facts, self._joins, rates, self._incarnation)

    def begin(self, step: object) -> None:
        """Start a step's plan, once, before anything of the step is computed.

        Raises:
            Exception: If the step computes with blocks that cannot be loaded.
        """
        if not isinstance(step, StepPlan) or step is self._begun:
            return
        self._begun = step
        for load in step.plan.loads:
            if load.in_step:  # vLLM does not wait to be told that it has ended.
                continue
            self._loads[load.op] = load
            self._open_loads.setdefault(load.request, set()).add(load.op)
        if self._worker is None:
            self._end_all()
            if any(load.in_step for load in step.plan.loads):
                raise KvbmError("the tiers are closed that this step loads from", operation="load")
        elif step.plan:
            self._worker.submit(step.plan)

    def collect(self) -> set[str]:
        """Take in what has ended.

        Returns:
            The requests whose loads have all ended, well or not. Each is named once.
        """
        # Not if the leader has not heard yet what came last: a request may wait for just that.
        if self._worker and self._begun and self._begun.idle and self._begun.heard >= self._told:
            self._worker.wait(self._LOAD_WAIT_S if self._open_loads else self._STORE_WAIT_S)
        self._take_in(self._worker)
        finished, self._finished = self._finished, set()
        return finished

    def take_failed_blocks(self) -> set[int]:
        """Take the device blocks that were not loaded, of the requests named and to be named."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_outcomes(self) -> Outcomes | None:
        """Take what the leader must know."""
        if self._begun is None:
            return None
        reports, self._reports = self._reports, []
        handshake = self.handshake() if self._unsaid or self._begun.asks else None
        if not (reports or handshake or self._begun.computes):
            return None
        if reports:
            self._told = self._begun.number
        said = [handshake] if handshake else []
        return Outcomes(reports, self._begun.number, self._take_copied(), said)

    def close(self) -> None:
        """Close the tiers; what is under way has failed. May be called twice."""
        worker, self._worker = self._worker, None
        coordinator, self._coordinator = self._coordinator, None
        if worker:
            worker.close()
            self._take_in(worker)
            self._end_all()
        if coordinator:
            coordinator.close()

    def _take_in(self, worker: Worker | None) -> None:
        """Take in what has ended."""
        for report in worker.reports() if worker else ():
            self._reports.append(report)
            load = self._loads.get(report.op)
            if load and report.tier == load.tier:
                self._end(load, report.failures)

    def _end_all(self) -> None:
        """Have every load under way fail, of which no report will come."""
        for load in list(self._loads.values()):
            self._end(load, range(len(load.blocks)))

    def _take_copied(self) -> dict[str, int]:
        """Give what the device has copied since the last call."""
        before, counts = self._copied, self._counts
        self._copied = device_readings(
            counts.gathered_blocks * self._block_bytes,
            counts.scattered_blocks * self._block_bytes,
            counts.staging_full_blocks,
        )
        news = {key: value - before.get(key, 0) for key, value in self._copied.items()}
        return {key: value for key, value in news.items() if value}

    def _end(self, load: Load, failures: Iterable[int]) -> None:
        del self._loads[load.op]
        self._failed_blocks.update(load.blocks[at] for at in failures)
        still_open = self._open_loads[load.request]
        still_open.discard(load.op)
        if not still_open:
            del self._open_loads[load.request]
            self._finished.add(load.request)


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
