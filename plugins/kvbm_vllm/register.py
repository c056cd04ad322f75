"""What vLLM calls in each of its processes before anything else."""

from __future__ import annotations

import multiprocessing
from typing import Any

__all__ = ["register"]

_checked: set[str | None] = set()
"""Engines whose configuration was checked in this process."""


def register() -> None:
    """Make `KvbmConnector` known by name, and have its settings checked with vLLM's own.

    vLLM builds a connector only after the model is loaded; a misspelt key would cost the user that
    time. vLLM has no hook for a connector's settings, so the check is appended to the one place
    where vLLM checks its own, in the process that the user started.
    """
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "KvbmConnector" in KVConnectorFactory._registry:
        return
    KVConnectorFactory.register_connector("KvbmConnector", "kvbm_vllm", "KvbmConnector")
    check_vllm = VllmConfig.__post_init__

    def check_both(self: Any) -> None:
        check_vllm(self)
        _check(self)

    VllmConfig.__post_init__ = check_both


def _check(vllm_config: Any) -> None:
    transfer = vllm_config.kv_transfer_config
    if multiprocessing.parent_process() is not None:
        # An engine's process, where vLLM checks once more when the tiers are open already.
        return
    if transfer is None or transfer.kv_connector != "KvbmConnector" or transfer.engine_id in _checked:
        return
    from kvbm_vllm._settings import check_settings

    check_settings(vllm_config)
    # Once an engine runs in this process its own directories are in use.
    _checked.add(transfer.engine_id)
