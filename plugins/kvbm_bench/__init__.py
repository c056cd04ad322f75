"""Puts a load of conversations on any OpenAI-compatible server, and compares such runs.

`python -m kvbm_bench chat` is the load, `python -m kvbm_bench compare` the comparison.
"""

from __future__ import annotations

import sys

from kvbm_core.extras import extra_command

__all__ = ["main"]

_EXTRA = frozenset({"httpx", "matplotlib", "prometheus_client", "rich"})
"""What the extra `bench` brings, by import name."""


def main() -> None:
    """Run the command line and end the process with its exit status."""
    # Here and not above, so that a missing extra is one line and no traceback.
    try:
        from kvbm_bench._app import run

        status = run(sys.argv[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f"kvbm_bench needs {error.name}, which is not installed: {extra_command('bench')}")
    sys.exit(status)
