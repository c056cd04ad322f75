"""The console that verbs write tables to."""

from __future__ import annotations

import os
from typing import Final

from rich.console import Console

__all__ = ["make_console"]

_PLAIN_WIDTH: Final = 160
"""Without a terminal there is no width to fit; rich would assume 80 and fold the table."""


def make_console(*, stderr: bool = False) -> Console:
    """Make a console; as wide as the terminal, or wide enough for a file or a pipe."""
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    return console
