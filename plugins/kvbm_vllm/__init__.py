"""vLLM's KV connector: loads from the stack what vLLM's own prefix cache has lost.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvbmConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"tiers": [{"backend": "cpu", "capacity": "8GiB"}]}}'

`KvbmConnector` is found by name through the entry-point group ``vllm.general_plugins``, or with
``"kv_connector_module_path": "kvbm_vllm"`` where plug-ins are switched off. It answers to the name
`DynamoConnector` too, and to the environment variables of NVIDIA's KVBM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbm_vllm._connector import KvbmConnector

    DynamoConnector = KvbmConnector

__all__ = ["DynamoConnector", "KvbmConnector"]


def __getattr__(name: str) -> Any:
    """Import the connector, and vLLM with it, when somebody asks for it: `kvbm check` does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvbm_vllm._connector import KvbmConnector

    return KvbmConnector
