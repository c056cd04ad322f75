"""vLLM's KV connector: loads from the stack what vLLM's own prefix cache has lost.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvbmConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"tiers": [{"backend": "cpu", "capacity": "8GiB"}]}}'

`KvbmConnector` is found by name through the entry-point group ``vllm.general_plugins``, or with
``"kv_connector_module_path": "kvbm_vllm"`` where plug-ins are switched off. It answers to the name
`DynamoConnector` too, and to the environment variables of NVIDIA's KVBM.
"""

from kvbm_vllm._connector import KvbmConnector

__all__ = ["DynamoConnector", "KvbmConnector"]

DynamoConnector = KvbmConnector
