"""Runs the command line: finds the verb, and turns what it raises into one line and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from kvbm_cli._verbs import Verbs, missing_package, verb_points
from kvbm_core.command import ExitCode
from kvbm_core.errors import ConfigError, KvbmError
from kvbm_core.printable import PROSE, printable

TRACEBACK: str = "KVBM_TRACEBACK"
"""A variable of the environment: set, a fault is raised as it is."""

app = typer.Typer(cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def root() -> None:
    """Keep the KV cache of a language model in an ordered stack of tiers."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status, an `ExitCode`.

    Args:
        arguments: Behind the program's name; by default those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = " ".join(["kvbm", *words[:1]])
    try:
        app(words, prog_name="kvbm")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            return _fail(f"{name}: {stop.code}", ExitCode.WRONG)
        return stop.code or ExitCode.DONE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except ConfigError as error:
        return _fail(f"{name}: {error}", ExitCode.WRONG)
    except KvbmError as error:
        return _fail(f"{name}: {error}", ExitCode.UNUSABLE)
    except ModuleNotFoundError as error:
        said = missing_package(error, verb_points().get(words[0], ())) if words else None
        if said is None:
            return _fault(name, error)
        return _fail(f"{name}: {said}", ExitCode.UNUSABLE)
    except Exception as error:  # noqa: BLE001 - the program's top: no traceback for a user
        return _fault(name, error)
    return ExitCode.DONE


def _fault(name: str, error: Exception) -> int:
    """Say in a line that something is wrong that nobody foresaw."""
    if os.environ.get(TRACEBACK):
        raise error
    what = f"{type(error).__name__}: {error}"
    return _fail(f"{name}: failed with {what}; with {TRACEBACK}=1 it says where", ExitCode.FAULT)


def _fail(line: str, status: ExitCode) -> ExitCode:
    print(printable(line, PROSE), file=sys.stderr)
    return status
