"""What a policy is: which objects of a tier make room for others, and which are let in.

    insert ──► touch ... touch ──► evict, or remove

Each tier has a policy of its own, named on it in the configuration::

    - {backend: lmdb, capacity: 200GiB, path: /nvme/kvbm, policy: {name: fifo}}

A policy sees keys and lengths, never bytes, and runs in the engine's scheduling loop: every method but
`evict` should take less than a microsecond at any number of objects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from kvbm_core.block import BlockKey
from kvbm_core.config import Settings
from kvbm_core.tier import CONTRACT_VERSION

__all__ = ["EvictionPolicy", "Origin", "Policy", "PolicyConfig", "PolicyContext"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where blocks that are offered together come from. What nobody knows is as by default."""

    start: int = 0
    """Blocks of the same KV group before them in their request."""
    prompt_blocks: int | None = None
    """Leading blocks of the request that are of its prompt; those after them were generated. None: all are of
    the prompt, as far as is known."""

    @property
    def is_generated(self) -> bool:
        """True if none of them is of a prompt."""
        return self.prompt_blocks is not None and self.start >= self.prompt_blocks


class EvictionPolicy(ABC):
    """Orders the objects of one tier. One thread calls it.

    It knows an object from `insert` to `remove`, or until `evict` has named it. Keys of objects that are
    gone may be remembered as well (ghosts), in a number that the capacity bounds.
    """

    @abstractmethod
    def insert(self, key: BlockKey, nbytes: int) -> None:
        """Take an object in that the tier holds now. It is not known yet.

        Args:
            key: Of the object.
            nbytes: The bytes of the capacity that it takes, above 0.
        """

    @abstractmethod
    def touch(self, key: BlockKey) -> None:
        """Note that a known object was used: loaded, or offered to be stored again."""

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:  # noqa: B027 - may be left out.
        """Note that a request has these blocks: all of them, whether the tier has them or not.

        Each request offers each of its blocks once, also those that were loaded. A policy that has this is
        not told by `touch` that known ones among them were used; by default it is, the last block first.

        Args:
            keys: Of consecutive blocks.
            origin: Where they come from.
        """

    @abstractmethod
    def remove(self, key: BlockKey) -> None:
        """Forget a known object that the tier has lost for another reason than room."""

    @abstractmethod
    def evict(self, nbytes: int, protected: Container[BlockKey]) -> Sequence[BlockKey]:
        """Choose objects that make room, and forget them.

        Args:
            nbytes: Bytes to be freed, above 0.
            protected: Objects that must stay: in use, or of the prefix that the room is wanted for. Ask it
                once for each candidate; it answers at once.

        Returns:
            Known objects, none of them protected, that take so many bytes together, or fewer: where
            nearly all are protected a policy may stop early, so that the time is bounded. No more than
            are needed: without the last one too few bytes would be free. Where others may go that it has
            not named, the core chooses among them, and tells it by `remove`.
        """

    def next_victims(self, count: int) -> Sequence[BlockKey]:
        """Name the objects that `evict` would choose next, and change nothing. By default none.

        A tier below that gets its objects by demotion gets these ahead of time. Of a policy that names none
        the core takes the least recently used for them.

        Args:
            count: So many at most, the next one first. A guess is enough.
        """
        return ()

    def admits(self, key: BlockKey, nbytes: int) -> bool:
        """Say whether an object shall be stored for which others would have to go. By default, yes.

        Args:
            key: Of an object that is not known.
            nbytes: The bytes of the capacity that it would take.
        """
        return True


class PolicyConfig(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of a policy's configuration: the keys beside ``name``, as one frozen type."""


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy is told when it is made."""

    capacity_bytes: int
    """Of its tier. The tier may hold less for a while, when its medium is full."""
    usual_bytes: int
    """That an object takes at most, for the sizes of tables; above 0."""
    tier: str
    """The tier's name in the configuration, for messages."""
    ranks: int = 1
    """That keep objects in it, each its own of every block; the bytes above are of one."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a package registers: how policies of one kind are configured and made."""

    name: str
    """As written after ``policy:``, and the name of the entry point."""
    config_type: type[PolicyConfig]
    """A subclass of `PolicyConfig`."""
    make: Callable[[Any, PolicyContext], EvictionPolicy]
    """``make(config, context)``. Raises `ConfigError` for what it cannot work with."""
    contract_version: int = CONTRACT_VERSION
    """As of a `Backend`."""
