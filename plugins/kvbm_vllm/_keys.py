"""From a vLLM request to the keys of its blocks.

Not vLLM's own block hashes: those are random in each process before 0.29, change between releases,
and before 0.31 cannot tell a LoRA adapter named "x" from a cache salt "x".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from kvbm_core import root_key
from kvbm_core.groups import KvGroup
from kvbm_engine import BlockKeys, hash_tokens
from kvbm_vllm._weights import AdapterDigests

__all__ = ["KeyMaker", "cacheable", "request_keys"]


def cacheable(request: Any) -> bool:
    """Return True if a request's KV is named by its tokens.

    Prompts given as embeddings have no tokens, and a streaming session may take tokens back.
    """
    return request.prompt_embeds is None and not getattr(request, "resumable", False)


class KeyMaker:
    """Makes the keys of requests, alike in every process until the caches are reset.

    Args:
        groups: The engine's KV groups.
        adapters: Tells LoRA adapters apart by their files.
    """

    def __init__(self, groups: Sequence[KvGroup], adapters: AdapterDigests) -> None:
        self._groups = groups
        self._adapters = adapters
        self._epoch: bytes | None = None
        """Random since the caches were last reset in this process; None before."""

    def __repr__(self) -> str:
        return f"<KeyMaker of {len(self._groups)} groups, epoch {self._epoch!r}>"

    def __call__(self, request: Any) -> BlockKeys | None:
        """Make a request's keys. None: its KV is not named by its tokens."""
        if not cacheable(request):
            return None
        return request_keys(request, self._groups, self._adapters, self._epoch)

    def begin_epoch(self) -> None:
        """Make other keys from now on.

        The weights may have been changed in memory, and the namespace knows only their files: what is stored
        from here on must not be found by an engine that starts from the files again.
        """
        self._epoch = os.urandom(16)


def request_keys(
    request: Any, groups: Sequence[KvGroup], adapters: AdapterDigests, epoch: bytes | None = None
) -> BlockKeys:
    """Make the keys of one request's blocks.

    Args:
        request: vLLM's request. Its tokens only grow.
        groups: The engine's KV groups.
        adapters: Tells LoRA adapters apart by their files.
        epoch: What the keys depend on beside the request.
    """
    lora = request.lora_request
    root = root_key(
        lora=f"{lora.lora_name}\0{adapters.digest(lora)}" if lora else None,
        salt=request.cache_salt,
        epoch=epoch,
    )
    return BlockKeys(request, groups, root, partial(_extras, request, hash_tokens(groups)))


def _extras(request: Any, block_tokens: int, start: int, stop: int) -> dict[int, bytes]:
    """Name the multimodal items that lie in blocks `start` to `stop`, exclusive.

    Their placeholder tokens are all alike, so what a block holds is which item, and where it
    begins relative to the block.
    """
    size = block_tokens
    items: dict[int, list[tuple[str, int]]] = {}
    for feature in request.mm_features or ():
        offset, length = feature.mm_position.offset, feature.mm_position.length
        for block in range(max(start, offset // size), min(stop, -(-(offset + length) // size))):
            items.setdefault(block - start, []).append((str(feature.identifier), offset - block * size))
    return {block: msgspec.msgpack.encode(found) for block, found in items.items()}
