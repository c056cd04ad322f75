"""What vLLM calls in each of its processes before anything else."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from importlib import metadata
from types import ModuleType
from typing import Any, Final

__all__ = ["register"]

_NAMES: Final = ("KvbmConnector", "DynamoConnector")
"""The second is what NVIDIA's KVBM calls its connector."""
_THEIR_PATHS: Final = {
    "kvbm.vllm_integration.connector": "kvbm",
    "dynamo.llm.vllm_integration.connector": "ai-dynamo",
}
"""Where the guides for KVBM, the present and an older one, tell vLLM to find it, and the distribution
that has it."""

_checked: set[str | None] = set()
"""Engines whose configuration was checked in this process."""


def register() -> None:
    """Make the connector known by its names, and have its settings checked with vLLM's own.

    vLLM builds a connector only after the model is loaded; a misspelt key would cost the user that
    time. vLLM has no hook for a connector's settings, so the check is appended to the one place
    where vLLM checks its own, in the process that the user started.
    """
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "KvbmConnector" in KVConnectorFactory._registry:
        return
    for name in _NAMES:
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, "kvbm_vllm", name)
    _stand_in()
    check_vllm = VllmConfig.__post_init__

    def check_both(self: Any) -> None:
        check_vllm(self)
        _check(self)

    VllmConfig.__post_init__ = check_both


def _stand_in() -> None:
    """Answer to the module paths of NVIDIA's guides, where the package itself is not installed."""
    for path, distribution in _THEIR_PATHS.items():
        if path not in sys.modules and not _installed(distribution):
            # An import of a module that is known asks for none of its parents.
            sys.modules[path] = _StandIn(path)


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


class _StandIn(ModuleType):
    """A module that has our connector, imported when it is asked for: that takes a while."""

    def __getattr__(self, name: str) -> Any:
        if name in _NAMES:
            return getattr(importlib.import_module("kvbm_vllm"), name)
        raise AttributeError(name)


def _is_ours(transfer: Any) -> bool:
    path = transfer.kv_connector_module_path
    ours = not path or path == "kvbm_vllm" or isinstance(sys.modules.get(path), _StandIn)
    return ours and transfer.kv_connector in _NAMES


def _check(vllm_config: Any) -> None:
    transfer = vllm_config.kv_transfer_config
    if multiprocessing.parent_process() is not None:
        # An engine's process, where vLLM checks once more when the tiers are open already.
        return
    if transfer is None or not _is_ours(transfer) or transfer.engine_id in _checked:
        return
    from kvbm_vllm._settings import check_settings

    check_settings(vllm_config)
    # Once an engine runs in this process its own directories are in use.
    _checked.add(transfer.engine_id)
