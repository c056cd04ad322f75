"""The one error the command line shows instead of a traceback."""

from __future__ import annotations

from kvbm_core.errors import KvbmError


class BenchError(KvbmError):
    """A benchmark cannot go on. The message is shown as it stands, so it says what the user can change."""
