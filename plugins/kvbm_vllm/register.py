"""What vLLM calls in each of its processes before anything else."""

from __future__ import annotations

import copy
import logging
import multiprocessing
from collections.abc import Mapping
from typing import Any, Final

from kvbm_vllm.kvbm import NAMES, answer_module_paths, leads_here

__all__ = ["register"]

_MULTI: Final = "MultiConnector"
"""vLLM's connector that has others: its settings list theirs."""
_PAIR: Final = "PdConnector"
"""NVIDIA KVBM's own connector of that kind, for prefill and decode on different machines."""

logger = logging.getLogger("kvbm_vllm")

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
    for name in NAMES:
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, "kvbm_vllm", name)
    answer_module_paths()
    check_vllm = VllmConfig.__post_init__

    def check_both(self: Any) -> None:
        if self.kv_transfer_config is not None:
            _refuse_pair(self.kv_transfer_config)  # vLLM would only say that it knows no such name.
        check_vllm(self)
        if self.kv_transfer_config is not None:
            _check(self)

    VllmConfig.__post_init__ = check_both


def _known_path(transfer: Any) -> bool:
    """Say whether a connector is looked for where ours are."""
    path = transfer.kv_connector_module_path
    return not path or path == "kvbm_vllm" or leads_here(path)


def _children(transfer: Any) -> list[Any]:
    """Give the configurations of the connectors in a MultiConnector, as it will make them."""
    if transfer.kv_connector != _MULTI:
        return []
    extra = transfer.kv_connector_extra_config or {}
    written = extra.get("connectors") or ()
    if any(each.get("kv_connector") in NAMES for each in written):
        _refuse_stray("kv_connector_extra_config of MultiConnector", extra)
        for each in written:
            if each.get("kv_connector") in NAMES:
                _refuse_stray(f"{each['kv_connector']} in 'connectors'", each)
    return [type(transfer)(**{"engine_id": transfer.engine_id, **each}) for each in written]


def _refuse_stray(where: str, written: Mapping[str, Any]) -> None:
    """Refuse settings of ours where MultiConnector gives them to nobody."""
    from kvbm_core import ConfigError, StackConfig

    if stray := [key for key in (*StackConfig.__struct_fields__, "config") if key in written]:
        raise ConfigError(
            f"{where} has {', '.join(map(repr, stray))}, where no connector finds it; write it in the "
            "'kv_connector_extra_config' of KvbmConnector within 'connectors'"
        )


def _ours(transfer: Any) -> list[Any]:
    """Give the configurations of our connectors: this one, or those in a MultiConnector, however deep."""
    if _known_path(transfer) and transfer.kv_connector in NAMES:
        return [transfer]
    return [each for child in _children(transfer) for each in _ours(child)]


def _refuse_pair(transfer: Any) -> None:
    """Say what takes the place of KVBM's pair of DynamoConnector and NixlConnector."""
    if transfer.kv_connector == _PAIR and _known_path(transfer):
        from kvbm_core import ConfigError

        raise ConfigError(
            "kv_connector: 'PdConnector'; it joins NVIDIA KVBM's DynamoConnector with NixlConnector, and "
            'kvbm-core has none. Write "MultiConnector", which is vLLM\'s own, take kv_connector_module_path '
            "away beside it, and leave 'connectors' as it is: DynamoConnector there is KvbmConnector"
        )
    for child in _children(transfer):
        _refuse_pair(child)


def _check(vllm_config: Any) -> None:
    transfer = vllm_config.kv_transfer_config
    ours = _ours(transfer)
    if not ours:
        return
    # Wherever vLLM makes a configuration: its scheduler reads this one, and not the one of a child.
    _recompute_failures(transfer)
    from kvbm_vllm._replicas import note_replicas

    note_replicas(vllm_config.parallel_config)
    if multiprocessing.parent_process() is not None:
        # An engine's process, where vLLM checks once more when the tiers are open already.
        return
    if transfer.engine_id in _checked:
        return
    from kvbm_core import ConfigError
    from kvbm_vllm._settings import check_settings

    if len(ours) > 1:
        raise ConfigError(
            f"connectors: {len(ours)} of them are KvbmConnector; write one, with the tiers of all of them"
        )
    alone = copy.copy(vllm_config)
    alone.kv_transfer_config = ours[0]
    check_settings(alone)
    # Once an engine runs in this process its own directories are in use.
    _checked.add(transfer.engine_id)


def _recompute_failures(transfer: Any) -> None:
    """Have vLLM compute what could not be loaded, whichever connector of a MultiConnector failed.

    vLLM has one setting for all of them. Its default, made for prefill and decode on different machines, ends
    the request with an error, and cannot be told from what a user has written.
    """
    if transfer.kv_load_failure_policy == "recompute":
        return
    from kvbm_vllm._logging import share_log

    share_log()
    whose = ", by any of its connectors," if transfer.kv_connector == _MULTI else ""
    logger.info("kv_load_failure_policy is set to 'recompute': what cannot be loaded%s is computed", whose)
    transfer.kv_load_failure_policy = "recompute"
