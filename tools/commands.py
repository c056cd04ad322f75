"""Runs commands for the other tools, silent unless they fail.

Its syntax is one that an older Python reads too, as `tools/setup.py` says.
"""

from __future__ import annotations

import subprocess
import tempfile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LOG_TAIL_LINES = 40


class CommandError(Exception):
    """A step cannot be done; the message says what the user can change, or what a command wrote."""


def pip(python: Path, *arguments: str) -> None:
    """Run pip in an environment.

    Raises:
        CommandError: It failed.
    """
    run([str(python), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments])


def run(command: Sequence[str], cwd: Path | None = None) -> None:
    """Run a command, in a folder if one is given.

    Raises:
        CommandError: It failed; the message holds the end of what it wrote.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        status = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
        if status:
            log.seek(0)
            tail = "".join(log.readlines()[-LOG_TAIL_LINES:])
            raise CommandError(f"this failed with status {status}: {' '.join(command)}\n{tail}")
