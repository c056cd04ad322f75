"""What the verbs of the command `kvbm` share: how they end, and how they answer programs.

A package adds a verb, or a group of verbs, with one entry point in the group `COMMANDS_GROUP`::

    [project.entry-points."kvbm_core.commands"]
    shelf = "kvbm_shelf._commands:app"

Its name is the word behind ``kvbm``; ``bench.shelf`` is the verb ``shelf`` of the group ``bench``, which may
be another package's. It leads to a `typer.Typer`, which becomes a group, or to a function with typer's
annotations, which becomes a verb; its docstring is the help. It is imported when it is run or listed, so it
imports at its top only what is cheap. A verb raises a `KvbmError` for what is wrong, or
`typer.Exit` with an `ExitCode`. This module does not need typer.
"""

from __future__ import annotations

import enum
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

__all__ = ["COMMANDS_GROUP", "Answer", "ExitCode", "answer_of", "answers", "moved", "write_json"]

COMMANDS_GROUP: Final = "kvbm_core.commands"
"""The group of entry points."""

F = TypeVar("F", bound=Callable[..., Any])


class ExitCode(enum.IntEnum):
    """How a verb ends. `docs/reference/commands.md` shows this table."""

    DONE = 0
    """It did what was asked, and found nothing to mend."""
    MEND = 1
    """It did what was asked, and found something to mend, or a part of it failed."""
    WRONG = 2
    """An option or a configuration is wrong; nothing was done."""
    UNUSABLE = 3
    """A place, a server or a package cannot be used."""
    FAULT = 70
    """A fault of `kvbm` or of a plug-in."""
    INTERRUPTED = 130
    """Ended by Ctrl-C, or by a signal that asks it to end."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verb writes with ``--json``."""

    form: Any
    """A type that msgspec has a JSON schema for."""
    lines: bool = False
    """One document a line, as long as the verb runs; otherwise one document."""


def answers(form: Any, *, lines: bool = False) -> Callable[[F], F]:
    """Say of a verb what it writes with ``--json``: the schema is published from it."""

    def mark(verb: F) -> F:
        verb.__kvbm_answer__ = Answer(form, lines)  # type: ignore[attr-defined]
        return verb

    return mark


def answer_of(verb: Callable[..., Any]) -> Answer | None:
    """Give what was said of a verb by `answers`."""
    return getattr(verb, "__kvbm_answer__", None)


def write_json(answer: object, *, lines: bool = False) -> None:
    """Write an answer to the standard output. What others wrote cannot command the terminal: it is ASCII."""
    print(json.dumps(msgspec.to_builtins(answer), indent=None if lines else 2), flush=True)


def moved(old: str, *words: str) -> None:
    """Run ``kvbm WORDS ARGUMENTS`` in place of a program that was one of its own, and say so.

    Args:
        old: How it was called.
        words: Behind ``kvbm``; the arguments of this process follow.
    """
    print(f"`{old}` is now `{' '.join(('kvbm', *words))}`", file=sys.stderr, flush=True)
    sys.argv[1:] = [*words, *sys.argv[1:]]
    runpy.run_module("kvbm_cli", run_name="__main__", alter_sys=False)
