"""Somebody else's connector, as NIXL's is: with a handshake, and loads and saves beside the engine.

All of it is in one process.

A test says with `state` how it behaves, and reads there what it was told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

state: Any = SimpleNamespace()


def begin(**settings: Any) -> None:
    """Forget everything of before."""
    vars(state).clear()
    defaults = {
        "store": {},
        "asynchronous": True,
        "delay_steps": 3,
        "fails": False,
        "loaded": 0,
        "handshakes": [],
    }
    vars(state).update({**defaults, **settings})


begin()


@dataclass
class OtherHandshake(KVConnectorHandshakeMetadata):
    """Of no interest to anybody else."""

    secret: int = 42


@dataclass
class OtherStats(KVConnectorStats):
    """A count."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        self.data = {"loaded": self.data.get("loaded", 0) + other.data.get("loaded", 0)}
        return self

    def reduce(self) -> dict[str, int | float]:
        return self.data

    def is_empty(self) -> bool:
        return not self.data


@dataclass
class Meta(KVConnectorMetadata):
    """Request, keys and blocks."""

    loads: list[tuple[str, list[Any], list[int]]] = field(default_factory=list)
    saves: list[tuple[str, list[Any], list[int]]] = field(default_factory=list)


class OtherMetrics(KVConnectorPromMetrics):
    """Of a connector that counts vLLM up to 0.32 requires metrics."""

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None: ...


class OtherConnector(KVConnectorBase_V1):
    """Keeps copies of the blocks of prompts."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block = vllm_config.cache_config.block_size
        self._meta = Meta()
        self._starts: dict[str, int] = {}
        self._layers: list[Any] = []
        self._waiting: list[list[Any]] = []
        self._sent: set[str] = set()
        self._failed: set[int] = set()

    # In the scheduler.

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        state.handshakes.append([type(each).__name__ for each in metadata.values()])

    def _keys(self, request: Any) -> list[Any]:
        tokens = request.prompt_token_ids
        return [tuple(tokens[:end]) for end in range(self._block, len(tokens), self._block)]

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        start = self._starts[request.request_id] = num_computed_tokens // self._block
        keys = self._keys(request)[start:]
        found = next((at for at, key in enumerate(keys) if key not in state.store), len(keys))
        return found * self._block, state.asynchronous and found > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            ids = blocks.get_block_ids()[0]
            keys = self._keys(request)
            count = num_external_tokens // self._block
            start = self._starts[request.request_id]
            self._meta.loads.append(
                (request.request_id, keys[start : start + count], ids[start : start + count])
            )

    def build_connector_meta(self, scheduler_output: Any) -> Meta:
        meta, self._meta = self._meta, Meta()
        return meta

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        keys = self._keys(request)
        self._meta.saves.append((request.request_id, keys, block_ids[: len(keys)]))
        return True, None

    def has_pending_push_work(self) -> bool:
        return bool(self._meta.saves)

    # In the worker.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._layers = list(kv_caches.values())

    def get_handshake_metadata(self) -> OtherHandshake:
        return OtherHandshake()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        meta = self._connector_metadata
        for request, keys, ids in meta.saves:
            for key, block in zip(keys, ids, strict=True):
                state.store[key] = [layer[block].clone() for layer in self._layers]
            self._sent.add(request)
        for load in meta.loads:
            if state.asynchronous:
                self._waiting.append([state.delay_steps, *load])
            else:
                self._load(*load)

    def _load(self, request: str, keys: list[Any], ids: list[int]) -> None:
        for at, (key, block) in enumerate(zip(keys, ids, strict=True)):
            if state.fails and at >= len(keys) // 2:
                self._failed.add(block)
            for layer, page in zip(self._layers, state.store[key], strict=True):
                layer[block] = -page if state.fails and at >= len(keys) // 2 else page
        state.loaded += len(keys)

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        sent, self._sent = self._sent, set()
        received = set()
        for load in list(self._waiting):
            load[0] -= 1
            if load[0] <= 0:
                self._waiting.remove(load)
                self._load(*load[1:])
                received.add(load[1])
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def get_kv_connector_stats(self) -> OtherStats | None:
        return OtherStats(data={"loaded": state.loaded}) if self.role is KVConnectorRole.WORKER else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> OtherStats:
        return OtherStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> OtherMetrics:
        return OtherMetrics(*args)
