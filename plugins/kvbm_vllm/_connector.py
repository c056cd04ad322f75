"""The class vLLM makes: one object in the scheduler, one in each worker."""

from __future__ import annotations

import logging
import os
from abc import ABCMeta
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from kvbm_core import TierCounts
from kvbm_vllm._logging import share_log
from kvbm_vllm._models import GROUPS_FROM, vllm_version
from kvbm_vllm._scheduler import SchedulerHalf
from kvbm_vllm._settings import read_settings
from kvbm_vllm._stats import KvbmPromMetrics, KvbmStats
from kvbm_vllm._values import Handshake, Outcomes, StepPlan
from kvbm_vllm._worker import WorkerHalf
from kvbm_vllm.kvbm import explain

__all__ = ["KvbmConnector"]

logger = logging.getLogger("kvbm_vllm")


class KvbmConnector(KVConnectorBase_V1):
    """Stores every complete block into the stack and loads what vLLM's prefix cache has lost.

    Loads hold nobody up but who waits for them, stores hold no block back. What fails is computed. Works
    with vLLM 0.26 to 0.33.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        share_log()
        _known_by_name()
        config = read_settings(vllm_config)
        self._leader: SchedulerHalf | None = None
        self._mover: WorkerHalf | None = None
        if role is KVConnectorRole.SCHEDULER:
            _recompute_failures(vllm_config.kv_transfer_config)
            for line in explain(os.environ):
                logger.info(line)
            self._leader = SchedulerHalf(config, vllm_config, kv_cache_config)
        else:
            self._mover = WorkerHalf(config, vllm_config, kv_cache_config)

    def __repr__(self) -> str:
        return f"<KvbmConnector {self._leader or self._mover!r}>"

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that is dropped is a miss later, so nobody has to wait for one."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """The workers keep addresses of the KV tensors, which sleep mode would free."""
        return False

    @property
    def counts(self) -> dict[str, TierCounts]:
        """What has happened so far, by the tier's name. Only in the scheduler."""
        return self._scheduler().counts

    # In the scheduler.

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Take in what every worker says of its tiers. What other connectors' workers say is not for us."""
        self._scheduler().start([each for each in metadata.values() if isinstance(each, Handshake)])

    def on_new_request(self, request: Any) -> None:
        """Note that a request has come."""
        self._scheduler().arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Say how many tokens can be loaded beyond those vLLM has, and whether it shall wait to be told."""
        return self._scheduler().match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Learn the blocks vLLM has given to a request, and plan its load."""
        self._scheduler().allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        """Plan this step."""
        step = self._scheduler().step(scheduler_output)
        return StepPlan(step, asks=self._scheduler().asks())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Note that what is left shall be stored, and answer hints. vLLM may free the blocks at once."""
        return False, self._scheduler().finished(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`, where vLLM keeps KV in several groups."""
        return False, self._scheduler().finished(request)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take in what the workers report."""
        self._scheduler().lost(connector_output.invalid_block_ids or set())
        self._scheduler().outcomes(connector_output.kv_connector_worker_meta)

    def has_pending_push_work(self) -> bool:
        """Keep an idle engine stepping while something is under way."""
        return self._scheduler().busy()

    def reset_cache(self) -> bool:
        """Forget every block in every tier, as after a change of weights.

        False, so that the caller tries again, if a request is loading from before.
        """
        return self._scheduler().reset()

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take over the KV tensors and open the tiers."""
        self._worker().register(kv_caches)

    def get_handshake_metadata(self) -> Handshake | None:
        """Tell the scheduler what the tiers can do and hold.

        None beside other connectors: vLLM's MultiConnector brings the handshake of one of them, to all. There
        the scheduler asks for ours with its first step.
        """
        beside_others = has_kv_transfer_group() and get_kv_transfer_group() is not self
        return None if beside_others else self._worker().handshake()

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Start the step's plan: called in every step, before anything is computed."""
        self._worker().begin(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the step's plan where `handle_preemptions` was not called."""
        self._worker().begin(self._connector_metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No layer waits alone: a request is computed after its load, or behind it on the stream."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are stored whole, by the plan."""

    def wait_for_save(self) -> None:
        """Stores are started with the plan, and hold nothing back."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Name the requests whose loads have ended. Nothing is ever sent."""
        return None, self._worker().collect() or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """As `get_finished`, and name the requests that could not be restored in all KV groups."""
        finished = self._worker().collect()
        failed = self._worker().take_failed_requests()
        results: Any = getattr(base, "KVConnectorTransferResults", None)  # Who calls has it.
        return results(finished_sending=set(), finished_recving=finished, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Name the blocks that must be computed after all."""
        return self._worker().take_failed_blocks()

    def build_connector_worker_meta(self) -> Outcomes | None:
        """Report to the scheduler."""
        return self._worker().take_outcomes()

    # In both, and in the frontend.

    def get_kv_connector_stats(self) -> KvbmStats | None:
        """Give what was counted since the last call; the scheduler counts for all."""
        return self._leader.take_stats() if self._leader else None

    def shutdown(self) -> None:
        """Close the tiers and the port for metrics, and be listed no more."""
        for half in (self._leader, self._mover):
            if half:
                half.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvbmStats:
        """Make the statistics that vLLM logs."""
        return KvbmStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KvbmPromMetrics:
        """Make the Prometheus metrics."""
        _known_by_name()
        return KvbmPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _scheduler(self) -> SchedulerHalf:
        assert self._leader is not None, "only in the scheduler"
        return self._leader

    def _worker(self) -> WorkerHalf:
        assert self._mover is not None, "only in a worker"
        return self._mover


if vllm_version() >= GROUPS_FROM:
    # vLLM then leaves its hybrid KV cache manager on. It asks the class, before there is a model.
    ABCMeta.register(base.SupportsHMA, KvbmConnector)


def _known_by_name() -> None:
    """Have vLLM find the connector by its name also where it was given by the path of its module.

    MultiConnector looks the statistics of its children up by the name of their class, in the engine and
    where vLLM exports them.
    """
    name = KvbmConnector.__name__
    if name not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(name, "kvbm_vllm", name)


def _recompute_failures(transfer: Any) -> None:
    """Have vLLM compute what could not be loaded.

    vLLM's default, made for prefill and decode on different machines, ends the request with an
    error. A cache must never do that. vLLM reads this setting after it has made the connector.
    """
    if transfer.kv_load_failure_policy != "recompute":
        logger.info("kv_load_failure_policy is set to 'recompute': what cannot be loaded is computed")
        transfer.kv_load_failure_policy = "recompute"
