"""The keys of one request's blocks, in each KV group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kvbm_core import BlockKey, chain_keys
from kvbm_core.groups import TAG_BYTES, KvGroup, group_keys
from kvbm_core.leader.tenancy.wishes import Wish
from kvbm_engine._values import EngineRequest

__all__ = ["BlockKeys", "hash_tokens"]


def hash_tokens(groups: Sequence[KvGroup]) -> int:
    """Give the tokens between two digests of a prefix, so that the blocks of every group end at one."""
    return math.gcd(*(group.block_tokens for group in groups))


class BlockKeys:
    """The keys of one request's blocks, made as its tokens come.

    Args:
        request: Its tokens only grow.
        groups: Of the engine.
        root: What the first block follows, see `kvbm_core.root_key`.
        extras: Names what blocks of `hash_tokens` hold beside their tokens. Given a first block and the one
            after the last, it returns bytes by position after the first.
    """

    __slots__ = (
        "_digests",
        "_extras",
        "_groups",
        "_keys",
        "_last",
        "_members",
        "_noted",
        "_request",
        "_size",
        "wish",
    )

    def __init__(
        self,
        request: EngineRequest,
        groups: Sequence[KvGroup],
        root: BlockKey,
        extras: Callable[[int, int], dict[int, bytes]],
    ) -> None:
        self._request = request
        self._groups = groups
        self._size = hash_tokens(groups)
        self._extras = extras
        self._last = root
        """The digest of all tokens that keys were made of."""
        self._digests = 0
        """Made so far."""
        self._keys: list[list[BlockKey]] = [[] for _ in groups]
        self._members: set[BlockKey] = set()
        """Of the first `_noted` keys of each group: made where somebody asks, for a tier that is full."""
        self._noted = [0] * len(groups)
        self.wish: Wish | None = None
        """What the request asks for its blocks. None: it has no hints."""

    def __repr__(self) -> str:
        return f"<BlockKeys {sum(map(len, self._keys))} of request {self._request.request_id}>"

    def __contains__(self, key: object) -> bool:
        """Return True for the key of a block whose key was made before."""
        for number, keys in enumerate(self._keys):
            if self._noted[number] < len(keys):
                self._members.update(keys[self._noted[number] :])
                self._noted[number] = len(keys)
        return key in self._members

    def __getitem__(self, at: int, /) -> BlockKey:
        return self.at(at)

    def at(self, at: int, group: int = 0) -> BlockKey:
        """Give the key of a group's block; all its tokens must be known."""
        keys = self._keys[group]
        return keys[at] if at < len(keys) else self.slice(at, at + 1, group)[0]

    def slice(self, start: int, stop: int, group: int = 0) -> list[BlockKey]:
        """Give the keys of a group's blocks `start` to `stop`, exclusive; all their tokens must be known."""
        keys = self._keys[group]
        if stop > len(keys):
            self._extend(stop * self._groups[group].block_tokens // self._size)
        return keys[start:stop]

    def prefixes(self, tokens: int) -> list[bytes]:
        """Give for each `hash_tokens` of the leading tokens a digest of all up to there.

        Empty where no group's block ends: nothing is named by that prefix.
        """
        count = tokens // self._size
        digests = [b""] * count
        for at, group in enumerate(self._groups):
            step = group.block_tokens // self._size
            digests[step - 1 :: step] = [key[:-TAG_BYTES] for key in self.slice(0, count // step, at)]
        return digests

    def digests(self, start: int, stop: int) -> list[BlockKey]:
        """Digest the prefixes from one number of `hash_tokens` to another, exclusive. Once, in order."""
        size = self._size
        tokens = self._request.all_token_ids[start * size : stop * size]
        made = chain_keys(self._last, tokens, size, self._extras(start, stop))
        self._last = made[-1]
        return made

    def _extend(self, stop: int) -> None:
        """Make digests up to the number `stop`, and the keys of the blocks that end there."""
        have, size = self._digests, self._size
        digests = self.digests(have, stop)
        for keys, group in zip(self._keys, self._groups, strict=True):
            step = group.block_tokens // size
            ends = digests if step == 1 else digests[(len(keys) + 1) * step - 1 - have :: step]
            keys += group_keys(ends, group.tag)
        self._digests = stop
