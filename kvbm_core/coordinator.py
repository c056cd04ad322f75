"""Where the leader and the workers of engines register, so that they can be counted and found.

    worker, one a rank ── join ──► coordinator ◄── join, gather ── leader, one an engine

Optional: an engine brings its own processes together. A coordinator says which of them never came or
came with other settings, and lists all engines that run. What it cannot do it logs; after the start it
raises nothing, and no request ever waits for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import msgspec

__all__ = ["Coordinator", "Member", "Probeable"]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One process of an engine, as it is listed."""

    engine: str
    """Names the engine, the same in all its processes and in no other engine."""
    rank: int | None = None
    """Of a worker; None: the leader."""
    world_size: int
    """Workers the engine has."""
    host: str
    """Name of the machine it runs on."""
    pid: int
    """Number of the process there."""
    namespace: str = ""
    """Of this rank, 32 hexadecimal digits; it names the rank's folders in tiers. Empty: the leader."""
    shared_namespace: str = ""
    """The same without what is this rank's own: equal on all ranks of an engine."""
    stack: tuple[str, ...] = ()
    """The tiers, fastest first, for people to read."""
    versions: Mapping[str, str] = {}
    """Of the packages that must agree."""
    metrics: str = ""
    """Where the engine's metrics are, as a URL; empty if not known."""

    def __str__(self) -> str:
        role = "the leader" if self.rank is None else f"worker {self.rank}"
        return f"{role} ({self.host}, pid {self.pid})"


class Coordinator(ABC):
    """Registers one process, its caller's. Making one checks its settings and connects nowhere."""

    @abstractmethod
    def join(self, member: Member) -> None:
        """Register, and stay registered until `close`. Called once.

        Behaviour:
            - Returns when the process is registered, or when the coordinator cannot be reached; then
              it goes on trying by itself.
            - A process that ends without `close` is listed no more after a while.

        Raises:
            CoordinatorError: If another process is registered in its place, or access is refused.
        """

    @abstractmethod
    def gather(self) -> Sequence[Member]:
        """Wait for the engine's workers and give them by rank. Empty if the coordinator is away.

        **Requires**: called by the leader, after `join`.

        Raises:
            CoordinatorError: If workers have not come in time, or came with something else than
                the others; names them and what differs.
        """

    @abstractmethod
    def close(self) -> None:
        """Be listed no more. May be called twice."""


class Probeable(ABC):
    """What a coordinator adds when it can be tried without an engine, for `kvbm check`."""

    @abstractmethod
    def probe(self) -> str:
        """Connect, do what an engine will do there, undo it, and say in a line how it went.

        Behaviour:
            - Nobody is listed by it.
            - What an operator should look at, though it works, is logged as a warning.

        Raises:
            CoordinatorError: It cannot be used; says why, and what to do.
        """
