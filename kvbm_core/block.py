"""What a block is: its key, its namespace, and the states it goes through.

    block     the KV of `block_tokens` consecutive tokens, all layers, one rank
    key       32 bytes naming the whole prefix up to and including the block
    namespace 16 bytes naming everything that makes stored bytes comparable

Keys are chained, so an equal key means equal tokens in this block *and in all before it*:

    root ──sha256──► key 0 ──sha256──► key 1 ──sha256──► key 2
           tokens 0..n-1    tokens n..2n-1   tokens 2n..3n-1

SHA-256 and not a faster hash, because a prompt is input from strangers: whoever can make two
prefixes collide can read another tenant's answer. A namespace rests on it as well.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from array import array
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec

from kvbm_core.errors import TransitionError

__all__ = [
    "KEY_BYTES",
    "NAMESPACE_BYTES",
    "ORDER_KEYS",
    "PROBE_KEY",
    "TRANSITIONS",
    "BlockEvent",
    "BlockKey",
    "BlockState",
    "Namespace",
    "chain_keys",
    "is_of_order",
    "make_namespace",
    "next_state",
    "root_key",
]

BlockKey = bytes
"""32 bytes. A plain ``bytes``, because a scheduler handles millions of them."""

Namespace = bytes
"""16 bytes."""

KEY_BYTES: Final = 32
NAMESPACE_BYTES: Final = 16

_KEY_SCHEME: Final = b"kvbm-key-1"
"""Part of every root. Change it when the derivation below changes."""

PROBE_KEY: Final = hashlib.sha256(b"kvbm-probe-1").digest()
"""Of the block with which a tier is tried that is left alone. No prompt has it."""

ORDER_KEYS: Final = hashlib.sha256(b"kvbm-order-1").digest()[:24]
"""The first bytes of the keys under which the order of use is kept in a tier. No prompt has them."""


def is_of_order(key: BlockKey) -> bool:
    """Say whether an object is of the order of use, see `kvbm_core.layers.order_parts`, and no block."""
    return key.startswith(ORDER_KEYS)


def root_key(**facts: str | int | bytes | None) -> BlockKey:
    """Make the parent of a sequence's first block.

    Args:
        facts: What distinguishes equal tokens here, by name: the LoRA adapter, the cache salt.
            A fact that is None is left out; a name is part of the key, so that a salt "x" and an
            adapter "x" never meet.

    Returns:
        32 bytes. Stable across processes, machines and Python versions.
    """
    named = sorted((name, value) for name, value in facts.items() if value is not None)
    return hashlib.sha256(_KEY_SCHEME + msgspec.msgpack.encode(named)).digest()


def chain_keys(
    parent: BlockKey,
    tokens: Sequence[int],
    block_tokens: int,
    extras: Mapping[int, bytes] | None = None,
) -> list[BlockKey]:
    """Name the complete blocks of a token sequence.

    Args:
        parent: `root_key` for the start of a sequence, or the last key made, to go on from there.
        tokens: The tokens after `parent`; those that do not fill a block are ignored.
        block_tokens: Tokens a block, at least 1.
        extras: Block index (counted from `parent`) to whatever else the block's KV depends on,
            for example the hash of an image whose placeholder tokens lie in it.

    Returns:
        ``len(tokens) // block_tokens`` keys, in order.
    """
    packed = array("q", tokens).tobytes()
    step = block_tokens * 8
    keys = []
    for index in range(len(tokens) // block_tokens):
        content = parent + packed[index * step : (index + 1) * step]
        if extras and index in extras:
            content += struct.pack("<q", len(extras[index])) + extras[index]
        parent = hashlib.sha256(content).digest()
        keys.append(parent)
    return keys


def make_namespace(facts: Mapping[str, object]) -> Namespace:
    """Digest everything that makes stored bytes comparable.

    Args:
        facts: Names and values (numbers, strings, bytes, lists and mappings of these): weights,
            dtype, layout, block size, parallel sizes and rank, versions.

    Returns:
        16 bytes, the first of a SHA-256. Two engines may share blocks only if these are equal.
    """
    packed = msgspec.msgpack.encode(facts, order="deterministic")
    return hashlib.sha256(packed).digest()[:NAMESPACE_BYTES]


class BlockState(enum.Enum):
    """Where a block stands in one tier."""

    ABSENT = "absent"
    """Not there."""
    FILLING = "filling"
    """Being written; not yet matched, not yet loadable."""
    READY = "ready"
    """There; may be matched, pinned and loaded."""
    LEAVING = "leaving"
    """Doomed while somebody still reads it: not matched any more, gone with the last pin."""


class BlockEvent(enum.Enum):
    """What can happen to a block in one tier."""

    RESERVE = "reserve"
    """A store was planned and room was set aside."""
    STORED = "stored"
    """Every rank has it."""
    NOT_STORED = "not_stored"
    """At least one rank has it not."""
    EVICT = "evict"
    """Its room is wanted, nobody reads it."""
    DOOM = "doom"
    """It must go (corrupt, reset) but somebody still reads it."""
    RELEASED = "released"
    """The last reader let go of a doomed block."""


TRANSITIONS: Final[Mapping[tuple[BlockState, BlockEvent], BlockState]] = MappingProxyType(
    {
        (BlockState.ABSENT, BlockEvent.RESERVE): BlockState.FILLING,
        (BlockState.FILLING, BlockEvent.STORED): BlockState.READY,
        (BlockState.FILLING, BlockEvent.NOT_STORED): BlockState.ABSENT,
        (BlockState.READY, BlockEvent.EVICT): BlockState.ABSENT,
        (BlockState.READY, BlockEvent.DOOM): BlockState.LEAVING,
        (BlockState.LEAVING, BlockEvent.RELEASED): BlockState.ABSENT,
    }
)
"""Every legal move. `next_state` raises `TransitionError` for a pair that is not here."""


def next_state(state: BlockState, event: BlockEvent) -> BlockState:
    """Look up where `event` leads from `state`.

    Raises:
        TransitionError: If the table has no such edge.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise TransitionError(f"a block that is {state.value} cannot {event.value}") from None
