"""The words behind `kvbm`: entry points of installed packages, each imported when it is run or listed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from kvbm_core.command import COMMANDS_GROUP
from kvbm_core.errors import KvbmError
from kvbm_core.extras import extra_command

__all__ = ["Verbs", "command_of", "load", "missing_package", "verb_points"]

_DISTRIBUTIONS: Final = {"grpc": "grpcio"}
"""By module, where the names differ by more than their punctuation."""
_ANY_WORDS: Final = {"allow_extra_args": True, "ignore_unknown_options": True}


def verb_points() -> Mapping[str, Sequence[EntryPoint]]:
    """Find the verbs that are installed, without importing them: each by its word."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=COMMANDS_GROUP):
        found.setdefault(point.name, []).append(point)
    return dict(sorted(found.items()))


def load(points: Sequence[EntryPoint]) -> Callable[..., Any] | typer.Typer:
    """Import a verb, or a group of them.

    Raises:
        KvbmError: It cannot be imported, or is neither; names the distribution.
    """
    point = points[0]
    owners = " and ".join(map(_owner, points))
    if len(points) > 1:
        raise KvbmError(f"verb {point.name!r} is offered by {owners}; uninstall one of them")
    try:
        found = point.load()
    except ModuleNotFoundError as error:
        if said := missing_package(error, points):
            raise KvbmError(f"verb {point.name!r} {said}") from error
        raise KvbmError(f"verb {point.name!r} of {owners} cannot be imported: {error}") from error
    except Exception as error:
        raise KvbmError(f"verb {point.name!r} of {owners} cannot be imported: {error}") from error
    if not callable(found):
        kind = type(found).__name__
        raise KvbmError(
            f"verb {point.name!r} of {owners} is a {kind}; it must be a typer.Typer or a function"
        )
    return cast("Callable[..., Any]", found)


def missing_package(error: ModuleNotFoundError, points: Sequence[EntryPoint]) -> str | None:
    """Say what to install for a module that is not there; None if it is one of the verb's own package."""
    module = (error.name or "").partition(".")[0]
    if not module or not points or module == points[0].module.partition(".")[0]:
        return None
    distribution = points[0].dist
    needed = f"needs {module}, which is not installed"
    extras = [
        found[1]
        for requirement in (distribution.requires or () if distribution else ())
        if _canonical(re.split(r"[^\w.-]", requirement)[0]) == _canonical(module)
        if (found := re.search(r"extra == [\"']([^\"']+)", requirement))
    ]
    if not extras or distribution is None:
        return needed
    extra = points[0].name if points[0].name in extras else extras[0]
    return f"{needed}: {extra_command(extra, distribution.name)}"


def _canonical(name: str) -> str:
    return _DISTRIBUTIONS.get(name, re.sub(r"[-_.]+", "-", name).lower())


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


class Verbs(TyperGroup):
    """The group of all verbs. One that cannot be loaded is listed with the reason, and harms no other."""

    def list_commands(self, ctx: Any) -> list[str]:
        """List the verbs."""
        return [name for name in verb_points() if "." not in name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb that is meant; of an unknown one the nearest is named, among these keys."""
        self.commands = dict.fromkeys(self.list_commands(ctx))  # type: ignore[assignment]
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a verb."""
        points = verb_points()
        if cmd_name not in self.list_commands(ctx):
            return None
        command = _command(cmd_name, points[cmd_name])
        for name, each in points.items():
            group, _, word = name.partition(".")
            if group == cmd_name and word and isinstance(command, TyperGroup):
                command.add_command(_command(word, each))
        return command


def _command(word: str, points: Sequence[EntryPoint]) -> Any:
    """Import a verb; in place of one that cannot be, give one that says why."""
    try:
        return command_of(word, load(points))
    except KvbmError as error:
        return command_of(word, _broken(error), **_ANY_WORDS)


def command_of(name: str, found: Callable[..., Any] | typer.Typer, **settings: Any) -> Any:
    """Make the command of what an entry point leads to: a group, or a verb."""
    if isinstance(found, typer.Typer):
        command: Any = get_group(found)
    else:
        single = typer.Typer(add_completion=False)
        single.command(context_settings=settings)(found)
        command = get_command(single)
    command.name = name
    return command


def _broken(error: KvbmError) -> Callable[[], None]:
    def fail() -> None:
        raise error

    fail.__doc__ = f"(cannot be used: {error})".replace("[", "\\[")
    return fail
