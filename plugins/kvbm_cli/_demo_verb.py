"""The verbs `demo` and `model`, and their options. Every option is checked here, before anything starts."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar, overload

import msgspec
import typer
from rich.console import Console

from kvbm_cli._answer import DemoAnswer, answer
from kvbm_cli._engine import HOST
from kvbm_cli._model import prepare_model
from kvbm_core.command import ExitCode, answers, write_json
from kvbm_core.config import parse_size
from kvbm_core.errors import KvbmError

T = TypeVar("T")
U = TypeVar("U")


class ModelAnswer(msgspec.Struct, frozen=True):
    """What `kvbm model --json` writes."""

    path: str
    """The folder that vLLM reads."""


def read_capacity(value: str) -> str:
    """Return `value` if the tiers' configuration would take it as a size above zero."""
    try:
        size_bytes = parse_size(value, "capacity")
    except KvbmError as error:
        raise typer.BadParameter(str(error)) from error
    if size_bytes <= 0:
        raise typer.BadParameter(f"{value} holds nothing; write a size like 1GiB")
    return value


def read_port(value: str) -> int:
    """Return the port named, or a free one for `auto`."""
    if value == "auto":
        return _bind(0)
    if not value.isdecimal() or not 0 < int(value) < 1 << 16:
        raise typer.BadParameter(f"{value} is not a port; write auto or a number from 1 to 65535")
    try:
        return _bind(int(value))
    except OSError as error:
        raise typer.BadParameter(
            f"port {value} cannot be used ({error.strerror}); write auto or another"
        ) from error


def _bind(port: int) -> int:
    """Return the port that the system gives for `port`; it is free again afterwards."""
    with socket.socket() as probe:
        # As the server does: a port that a stopped server has just left may be taken again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        return int(probe.getsockname()[1])


def read_model(value: str) -> str:
    """Return the folder's full path, or the id of a model on a hub."""
    folder = Path(value).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise typer.BadParameter(f"{folder} holds no model: it has no config.json")
        return str(folder.resolve())
    # An id is `name` or `owner/name`; anything else was meant as a path.
    if value.startswith((".", "/", "~")) or value.count("/") > 1:
        raise typer.BadParameter(f"there is no folder {folder}")
    return value


def read_prompt(file: Path) -> str:
    """Return the text of a prompt file."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {file} as UTF-8 text: {error}") from error
    if not text.strip():
        raise typer.BadParameter(f"{file} is empty")
    return text


def make_lmdb_folder(folder: Path) -> Path:
    """Return the full path of an empty folder, made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise typer.BadParameter(f"{folder} cannot be used: {error.strerror}") from error
    if used:
        raise typer.BadParameter(
            f"{folder} is not empty; with blocks of an earlier run in it no run would be cold"
        )
    return folder.resolve()


@overload
def _checked(option: str, check: Callable[[T], U], value: None) -> None: ...
@overload
def _checked(option: str, check: Callable[[T], U], value: T) -> U: ...
@overload
def _checked(option: str, check: Callable[[T], U], value: T | None) -> U | None: ...
def _checked(option: str, check: Callable[[T], U], value: T | None) -> U | None:
    """Return what `check` makes of an option's value; an option not given stays None."""
    if value is None:
        return None
    try:
        return check(value)
    except typer.BadParameter as error:
        # Name the option: typer knows it only where it calls the check itself.
        raise typer.BadParameter(error.message, param_hint=option) from error


@answers(DemoAnswer)
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_ID", help="A model with a chat template. Default: SmolLM2-135M-Instruct."
        ),
    ] = None,
    prompt: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to send as it stands, in place of the demo's story."),
    ] = None,
    cpu_capacity: Annotated[str, typer.Option(metavar="SIZE", help="Size of the host memory tier.")] = "1GiB",
    lmdb_capacity: Annotated[str, typer.Option(metavar="SIZE", help="Size of the LMDB tier.")] = "4GiB",
    lmdb_path: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Empty folder for LMDB, kept. Default: a temporary one, removed afterwards."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 64,
    port: Annotated[str, typer.Option(metavar="PORT", help="Port of the server on 127.0.0.1.")] = "auto",
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the demo's folder with LMDB's files and logs.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers and versions as JSON, and all else to stderr.")
    ] = False,
) -> None:
    """Send one long prompt to vLLM three times: cold, from host memory, and from LMDB after a restart."""
    from kvbm_cli._demo import run_demo
    from kvbm_cli._demo_settings import DemoSettings
    from kvbm_cli._screen import Screen

    settings = DemoSettings(
        model=_checked("--model", read_model, model),
        prompt=_checked("--prompt", read_prompt, prompt),
        cpu_capacity=_checked("--cpu-capacity", read_capacity, cpu_capacity),
        lmdb_capacity=_checked("--lmdb-capacity", read_capacity, lmdb_capacity),
        max_tokens=max_tokens,
        port=_checked("--port", read_port, port),
        keep=keep,
        # Last, because it may make a folder.
        lmdb_path=_checked("--lmdb-path", make_lmdb_folder, lmdb_path),
    )
    screen = Screen(Console(stderr=as_json))
    try:
        report = run_demo(settings, screen)
    except KeyboardInterrupt:
        screen.say("Interrupted; vLLM was stopped.")
        raise
    if as_json:
        write_json(answer(report))
    raise typer.Exit(ExitCode.MEND if report.problems() else ExitCode.DONE)


@answers(ModelAnswer)
def model(
    as_json: Annotated[bool, typer.Option("--json", help="Print the folder as JSON.")] = False,
) -> None:
    """Prepare the demo's model, once, and print the folder it is in."""
    folder = str(prepare_model())
    if as_json:
        write_json(ModelAnswer(folder))
    else:
        typer.echo(folder)
