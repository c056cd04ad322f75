"""The keys of one request's blocks."""

from __future__ import annotations

from collections.abc import Callable

from kvbm_core import BlockKey, chain_keys
from kvbm_engine._values import EngineRequest

__all__ = ["BlockKeys"]


class BlockKeys:
    """The keys of one request's blocks, made as its tokens come.

    Args:
        request: Its tokens only grow.
        block_tokens: Tokens a block.
        root: What the first block follows, see `kvbm_core.root_key`.
        extras: Names what blocks hold beside their tokens. Given a first block and the one after the last, it
            returns bytes by position after the first.
    """

    __slots__ = ("_block_tokens", "_extras", "_keys", "_members", "_noted", "_request", "_root")

    def __init__(
        self,
        request: EngineRequest,
        block_tokens: int,
        root: BlockKey,
        extras: Callable[[int, int], dict[int, bytes]],
    ) -> None:
        self._request = request
        self._block_tokens = block_tokens
        self._root = root
        self._extras = extras
        self._keys: list[BlockKey] = []
        self._members: set[BlockKey] = set()
        """Of the first `_noted` keys: made only where somebody asks, for a tier that is full."""
        self._noted = 0

    def __repr__(self) -> str:
        return f"<BlockKeys {len(self._keys)} of request {self._request.request_id}>"

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
