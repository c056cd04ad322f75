"""From a vLLM request to the keys of its blocks.

Not vLLM's own block hashes: those are random in each process before 0.29, change between releases,
and before 0.31 cannot tell a LoRA adapter named "x" from a cache salt "x".
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvbm_core import BlockKey, chain_keys, root_key
from kvbm_vllm._weights import AdapterDigests

__all__ = ["RequestKeys", "cacheable"]


def cacheable(request: Any) -> bool:
    """Say whether a request's KV is named by its tokens.

    Prompts given as embeddings have no tokens, and a streaming session may take tokens back.
    """
    return request.prompt_embeds is None and not getattr(request, "resumable", False)


class RequestKeys:
    """The keys of one request's blocks, made as its tokens come.

    Args:
        request: vLLM's request. Its tokens only grow.
        block_tokens: Tokens a block.
        adapters: Tells LoRA adapters apart by their files.
        epoch: Random since the caches were last reset in this process; None before.
    """

    def __init__(
        self, request: Any, block_tokens: int, adapters: AdapterDigests, epoch: bytes | None = None
    ) -> None:
        self._request = request
        self._block_tokens = block_tokens
        self._keys: list[BlockKey] = []
        self._members: set[BlockKey] = set()
        """Of the first `_noted` keys: made only where somebody asks, for a tier that is full."""
        self._noted = 0
        lora = request.lora_request
        self._root = root_key(
            lora=f"{lora.lora_name}\0{adapters.digest(lora)}" if lora else None,
            salt=request.cache_salt,
            epoch=epoch,
        )

    def __contains__(self, key: object) -> bool:
        """Return True for the key of a block whose key was made before."""
        if self._noted < len(self._keys):
            self._members.update(self._keys[self._noted :])
            self._noted = len(self._keys)
        return key in self._members

    def __getitem__(self, at: int, /) -> BlockKey:
        return self._keys[at] if at < len(self._keys) else self.slice(at, at + 1)[0]

    def slice(self, start: int, stop: int) -> list[BlockKey]:
        """Give the keys of blocks `start` to `stop`, exclusive; all their tokens must be known."""
        have, size = len(self._keys), self._block_tokens
        if stop > have:
            parent = self._keys[-1] if self._keys else self._root
            tokens = self._request.all_token_ids[have * size : stop * size]
            self._keys += chain_keys(parent, tokens, size, self._extras(have, stop))
        return self._keys[start:stop]

    def _extras(self, start: int, stop: int) -> dict[int, bytes]:
        """Name the multimodal items that lie in blocks `start` to `stop`, exclusive.

        Their placeholder tokens are all alike, so what a block holds is which item, and where it
        begins relative to the block.
        """
        size = self._block_tokens
        items: dict[int, list[tuple[str, int]]] = {}
        for feature in self._request.mm_features or ():
            offset, length = feature.mm_position.offset, feature.mm_position.length
            for block in range(max(start, offset // size), min(stop, -(-(offset + length) // size))):
                items.setdefault(block - start, []).append((str(feature.identifier), offset - block * size))
        return {block: msgspec.msgpack.encode(found) for block, found in items.items()}
