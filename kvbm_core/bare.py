"""A tier's medium with no tier around it: `Backend.bare`, what `kvbm bench tier` compares a tier with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

__all__ = ["Bare"]


class Bare(ABC):
    """Writes and reads objects as fast as the medium lets who does nothing else.

    Buffers start on a page, and have whole pages: what is behind an object's bytes is nobody's.
    """

    says: str
    """What it is, in a few words."""

    @abstractmethod
    def store(self, contents: Sequence[memoryview]) -> None:
        """Write all objects, over those of before.

        Raises:
            KvbmError: The medium does not take them.
        """

    @abstractmethod
    def load(self, targets: Sequence[memoryview]) -> None:
        """Read the objects that `store` wrote, in the same order.

        Raises:
            KvbmError: The medium does not give them.
        """

    @abstractmethod
    def close(self) -> None:
        """Delete them, and let go of everything."""
