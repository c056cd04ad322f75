"""The errors a user of kvbm-core can meet.

    KvbmError                      root: `temporary`, `operation`, `tier`
    ├── ConfigError                a setting is wrong; also a ValueError
    │   └── BackendError           a backend cannot be found, loaded or trusted
    ├── TierError                  a tier failed
    │   ├── TierOpenError          it could not be opened (path, lock, permissions, memory)
    │   └── QueueFullError         it refused a batch; nothing of the batch was started
    ├── CorruptError               bytes are not those that were stored; a codec raises it
    │   └── UnverifiableError      a codec cannot tell: it has not the key they were made with
    ├── CoordinatorError           the processes of an engine did not come together
    └── TransitionError            a bug: a block was moved along an illegal edge

A failed transfer is not an error: it is a `Completion` whose outcome says so.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "ConfigError",
    "CoordinatorError",
    "CorruptError",
    "KvbmError",
    "QueueFullError",
    "TierError",
    "TierOpenError",
    "TransitionError",
    "UnverifiableError",
]


class KvbmError(Exception):
    """Root of every error this package raises."""

    temporary: bool = False
    """True if the same call may succeed later without a change by the user."""

    def __init__(self, message: str, *, operation: str = "", tier: str = "") -> None:
        super().__init__(message)
        self.operation = operation
        """What was being done, for example ``open``."""
        self.tier = tier
        """The tier's name in the configuration, empty if no tier was concerned."""


class ConfigError(KvbmError, ValueError):
    """A setting is wrong. The message names the key, the value and what to write instead."""


class BackendError(ConfigError):
    """A backend cannot be found, loaded or trusted. The message names the distribution at fault."""


class TierError(KvbmError):
    """A tier failed."""


class TierOpenError(TierError):
    """A tier could not be opened. The message names the path or resource and what to change."""


class QueueFullError(TierError):
    """A tier refused a batch because its queue is full; nothing of the batch was started."""

    temporary = True


class CoordinatorError(KvbmError):
    """The processes of an engine did not come together. The message names them and what to change."""


class CorruptError(KvbmError):
    """Bytes are not those that were stored. The object is dropped from its tier and computed."""


class UnverifiableError(CorruptError):
    """A codec cannot tell whether bytes are those that were stored: it has not the key they were made with.

    The object is a miss, not damage. In a shared tier it stays, for the engines that can verify it.
    """


class TransitionError(KvbmError):
    """A block was moved along an edge the transition table does not have: a bug, not a condition."""
