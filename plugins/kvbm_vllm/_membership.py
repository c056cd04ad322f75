"""One process of the engine, as a coordinator lists it."""

from __future__ import annotations

import os
import socket
from importlib.metadata import version
from typing import Any

import vllm

from kvbm_core import Coordinator, Member, Namespace, Registry, StackConfig
from kvbm_core.config import TierEntry
from kvbm_vllm._replicas import replicas_of

__all__ = ["join_as_leader", "join_as_worker"]


def join_as_leader(config: StackConfig, vllm_config: Any, metrics: str) -> Coordinator | None:
    """Register the leader and wait for its workers. None if no coordinator is configured.

    Args:
        config: The stack.
        vllm_config: vLLM's configuration.
        metrics: Where its metrics are served. Empty: with the engine's own alone.

    Raises:
        CoordinatorError: If the processes of the engine do not come together.
    """
    coordinator = _join(config, vllm_config, metrics=metrics)
    if coordinator is not None:
        try:
            coordinator.gather()
        except BaseException:
            coordinator.close()
            raise
    return coordinator


def join_as_worker(
    config: StackConfig, vllm_config: Any, namespace: Namespace, shared: Namespace
) -> Coordinator | None:
    """Register a worker. None if no coordinator is configured.

    Args:
        config: The stack.
        vllm_config: vLLM's configuration in the worker.
        namespace: Of its rank.
        shared: The namespace without what is its rank's own.

    Raises:
        CoordinatorError: If another process is registered in its place, or access is refused.
    """
    rank = vllm_config.parallel_config.rank
    return _join(config, vllm_config, rank=rank, namespace=namespace.hex(), shared_namespace=shared.hex())


def _join(config: StackConfig, vllm_config: Any, **own: Any) -> Coordinator | None:
    if config.coordinator is None:
        return None
    coordinator = Registry().coordinator(config.coordinator)
    coordinator.join(
        Member(
            engine=vllm_config.kv_transfer_config.engine_id,
            world_size=vllm_config.parallel_config.world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            stack=tuple(
                _shown(tier, replicas_of(vllm_config.parallel_config).count) for tier in config.tiers
            ),
            versions={"kvbm-core": version("kvbm-core"), "vllm": vllm.__version__},
            **own,
        )
    )
    return coordinator


def _shown(tier: TierEntry, engines: int) -> str:
    kind = "" if tier.name == tier.backend else f" ({tier.backend})"
    # Other settings may name places that are nobody else's business.
    capacity = tier.settings.get("capacity")
    shares = f" over {engines} engines" if engines > 1 else ""
    return f"{tier.name}{kind}" + (f" {capacity}{shares}" if capacity is not None else "")
