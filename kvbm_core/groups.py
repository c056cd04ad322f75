"""KV groups: layers that share one block table, and the rule of what a prefix needs of them.

    tokens     0       16      32      48      64  = boundary
    all        │ need  │ need  │ need  │ need  │
    window 24  │       │       │ need  │ need  │    the last tokens before the boundary
    chunk 48   │       │       │       │ need  │    the chunk that the boundary is in
    state      │       │       │       │ need  │    the block that ends at the boundary

A model with one rule for all layers has one group. An object's key names the prefix and the group:

    28 bytes of the digest of all tokens to the block's end │ 4 bytes of the group's tag
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from kvbm_core.block import BlockKey
from kvbm_core.errors import ConfigError

__all__ = ["TAG_BYTES", "Coverage", "KvGroup", "Rule", "alignment", "group_keys", "group_tag", "is_plain"]

TAG_BYTES: Final = 4
_DIGEST_BYTES: Final = 28


class Rule(enum.Enum):
    """Which blocks of a group a prefix needs."""

    ALL = "all"
    """All of them: full attention, MLA."""
    WINDOW = "window"
    """Those of the last tokens before the boundary."""
    CHUNK = "chunk"
    """Those of the chunk that the boundary is in; none where a chunk ends there."""
    STATE = "state"
    """The one that ends at the boundary: a recurrent state."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a prefix needs of a group."""

    rule: Rule = Rule.ALL
    tokens: int = 0
    """Of a window those before the boundary that are needed; of a chunk its length. Else 0."""

    def first_token(self, boundary: int) -> int:
        """Give the first token that is needed of a prefix of `boundary` tokens."""
        match self.rule:
            case Rule.ALL:
                return 0
            case Rule.WINDOW:
                return max(0, boundary - self.tokens)
            case Rule.CHUNK:
                return boundary // self.tokens * self.tokens
            case Rule.STATE:
                return max(0, boundary - 1)


@dataclass(frozen=True, slots=True)
class KvGroup:
    """One KV group of an engine."""

    block_tokens: int
    """Tokens of a block, at least 1."""
    coverage: Coverage = Coverage()
    tag: bytes = bytes(TAG_BYTES)
    """Tells its objects from those of other groups, see `group_tag`."""

    def first_block(self, boundary: int) -> int:
        """Give the first block that is needed of a prefix of `boundary` tokens."""
        return self.coverage.first_token(boundary) // self.block_tokens

    def needed(self, start: int, boundary: int) -> range:
        """Give the blocks that a prefix of `boundary` tokens needs, of one whose first `start` are there."""
        first = max(self.first_block(boundary), start // self.block_tokens)
        return range(first, boundary // self.block_tokens)


def group_tag(facts: Mapping[str, object]) -> bytes:
    """Digest the content of a group.

    Args:
        facts: Its kind, block tokens, window or shapes of its state, layers, bytes of a page: whatever makes
            its bytes comparable. Never its number, which changes with flags of the engine.

    Returns:
        4 bytes.
    """
    packed = msgspec.msgpack.encode(facts, order="deterministic")
    return hashlib.sha256(packed).digest()[:TAG_BYTES]


def group_keys(digests: Iterable[bytes], tag: bytes) -> list[BlockKey]:
    """Name the objects of a group whose blocks end where so many prefixes end."""
    return [digest[:_DIGEST_BYTES] + tag for digest in digests]


def is_plain(groups: Sequence[KvGroup]) -> bool:
    """Return True for one group of which a prefix needs all blocks: a hit is then its longest prefix."""
    return len(groups) == 1 and groups[0].coverage.rule is Rule.ALL


def alignment(groups: Sequence[KvGroup]) -> int:
    """Give the tokens of which every boundary is a multiple: a block of each group ends there.

    Raises:
        ConfigError: If there is no group, or two have one tag.
    """
    tags = [group.tag for group in groups]
    if not groups or len(set(tags)) < len(tags):
        raise ConfigError(f"KV groups have the tags {[tag.hex() for tag in tags]}: each needs one of its own")
    return math.lcm(*(group.block_tokens for group in groups))
