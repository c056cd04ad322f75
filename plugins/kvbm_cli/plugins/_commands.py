"""The group `kvbm plugins`: lists what is installed, and writes new packages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbm_cli._console import make_console
from kvbm_cli.plugins._list import Plugins, State, list_plugins, make_table
from kvbm_cli.plugins._new import Kind, Written, write_package
from kvbm_core.command import ExitCode, answers, write_json

__all__ = ["app"]

app = typer.Typer(invoke_without_command=True, help="What is installed, and new packages.")


@app.callback()
@answers(Plugins)
def plugins(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List installed backends, codecs, policies, coordinators and engines, and which cannot be used."""
    if context.invoked_subcommand is not None:
        return
    found = list_plugins()
    if as_json:
        write_json(found)
    else:
        console = make_console()
        console.print(make_table(found))
        for each in found.plugins:
            if each.problem:
                console.print(f"{each.name}: {each.problem}", markup=False, highlight=False, soft_wrap=True)
    broken = any(each.state is State.BROKEN for each in found.plugins)
    raise typer.Exit(ExitCode.MEND if broken else ExitCode.DONE)


@app.command("new")
@answers(Written)
def new(
    kind: Annotated[Kind, typer.Argument(help="What the package offers.")],
    name: Annotated[str, typer.Argument(help="As an operator will write it: letters, digits, hyphens.")],
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The package's folder.", show_default="./kvbm-NAME")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a package that offers a backend, a codec or a policy, and passes its tests at once."""
    written = write_package(kind, name, folder)
    if as_json:
        write_json(written)
        return
    for file in written.files:
        print(f"{written.folder}/{file}")
    print(f"now: cd {written.folder} && pip install -e '.[test]' && pytest")
