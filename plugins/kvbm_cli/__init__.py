"""The command `kvbm`: shows on your machine what a stack of tiers does for time to first token."""

from __future__ import annotations

import sys

from kvbm_core.extras import extra_command

__all__ = ["main"]

_EXTRA = frozenset({"httpx", "prometheus_client", "rich", "typer"})
"""What the extra `cli` brings, by import name."""


def main() -> None:
    """Run the command line and end the process with its exit status."""
    # Here and not above: `kvbm_cli._model` and `kvbm_cli._convert` are used where the extra is not installed.
    try:
        from kvbm_cli._app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f"kvbm needs {error.name}, which is not installed: {extra_command('cli')}")
    sys.exit(run())
