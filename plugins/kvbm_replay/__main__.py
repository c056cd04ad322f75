"""`python -m kvbm_replay` has the verbs `replay` and `plan`."""

from __future__ import annotations

import sys

import typer

from kvbm_core.errors import KvbmError
from kvbm_core.printable import PROSE, printable
from kvbm_replay._commands import plan, replay

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command()(replay)
app.command()(plan)

if __name__ == "__main__":
    try:
        app()
    except KvbmError as error:
        sys.exit(printable(f"kvbm: {error}", PROSE))
