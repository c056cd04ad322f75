"""The command `kvbm`: checks, sizes and inspects stacks of tiers, and what installed packages add to it."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from kvbm_core.command import ExitCode
from kvbm_core.extras import extra_command

__all__ = ["main"]

_EXTRA = frozenset({"rich", "typer"})
"""What the extra `cli` brings, by import name."""


def main() -> None:
    """Run the command line and end the process with its exit status."""
    # Here and not above: `kvbm_cli._model` and `kvbm_cli._convert` are used where the extra is not installed.
    try:
        from kvbm_cli._app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print(f"kvbm needs {error.name}, which is not installed: {extra_command('cli')}", file=sys.stderr)
        sys.exit(ExitCode.UNUSABLE)
    # A closed terminal and a plain `kill` take the way of Ctrl-C: what was started is stopped then, too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    sys.exit(run())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
