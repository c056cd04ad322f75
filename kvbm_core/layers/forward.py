"""The base of layers that change one thing of a tier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvbm_core.block import BlockKey
from kvbm_core.tier import Capabilities, Completion, Tier, Transfer

__all__ = ["ForwardTier"]


class ForwardTier(Tier):
    """Forwards every call to another tier, in the caller's thread.

    Args:
        inner: The tier; closed with this one.
    """

    def __init__(self, inner: Tier) -> None:
        self._inner = inner

    def __repr__(self) -> str:
        return f"<{type(self).__name__.removesuffix('Tier')} {self._inner!r}>"

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._inner.capabilities

    def inventory(self) -> Iterable[tuple[BlockKey, int]]:
        """See `Tier.inventory`."""
        return self._inner.inventory()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        self._inner.submit(transfers)

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        return self._inner.poll()

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """See `Tier.discard`."""
        self._inner.discard(keys)

    def close(self) -> None:
        """See `Tier.close`."""
        self._inner.close()
