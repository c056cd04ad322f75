"""Writes docs/reference/commands.md and the schemas beside it from the verbs of the command `kvbm`.

    python tools/make_commands.py            write them
    python tools/make_commands.py --check    exit with 1 if something differs

Of each verb the help, the options and the form of its JSON are read from the code. Needs the project
installed with its extra `dev`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvbm_cli._verbs import command_of
from kvbm_core.command import COMMANDS_GROUP, ExitCode, answer_of

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
PAGE = REFERENCE / "commands.md"
SCHEMAS = REFERENCE / "schemas"

HEAD = """# The command `kvbm`

This page is written by `python tools/make_commands.py` from the code.

`kvbm` comes with the extra `cli`, which `vllm`, `demo` and `bench` bring: `pip install 'kvbm-core[cli]'`. A
verb that needs more says what to install. `kvbm --install-completion` has your shell complete verbs and
options; `kvbm VERB --help` is this page.

Each verb takes `--json`: then the standard output has one document, or one a line from a verb that runs
until it is stopped, and nothing else. Its schema is linked below. What is for people goes to the standard
error.

An error is one line on the standard error that names what is wrong and what to write instead. Of a fault
that nobody foresaw it names the exception; with `KVBM_TRACEBACK=1` in the environment it is raised.

## Exit codes

| code | name | meaning |
|---|---|---|
"""

HOOK = f"""
## Verbs of other packages

A package adds a verb, or a group of verbs, with an entry point in the group `{COMMANDS_GROUP}`; its name is
the word behind `kvbm`, and `bench.shelf` is the verb `shelf` of the group `bench`. It leads to a function
with [typer's](https://typer.tiangolo.com) annotations, which is a verb, or to a `typer.Typer`, which is a
group:

```toml
[project.entry-points."{COMMANDS_GROUP}"]
shelf = "kvbm_shelf.commands:app"
```

`kvbm_core.command` has what verbs share: `ExitCode`, `answers`, which says of a verb what its JSON is, and
`write_json`. A verb raises `ConfigError` for what the user wrote (exit code 2), another `KvbmError` for
what cannot be used (3). The module is imported when the verb is run or listed; a verb that cannot be
imported is listed with the reason, and harms no other.
"""


def main() -> int:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description="Write docs/reference/commands.md and the schemas.")
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    check = parser.parse_args().check
    wanted = files()
    stale = [file for file in SCHEMAS.glob("*.json") if file not in wanted]
    differs = [file for file, text in wanted.items() if not file.exists() or file.read_text() != text]
    if check:
        for file in (*differs, *stale):
            print(f"{file.relative_to(ROOT)} is not what `python tools/make_commands.py` writes")
        return 1 if differs or stale else 0
    SCHEMAS.mkdir(exist_ok=True)
    for file in stale:
        file.unlink()
    for file in differs:
        file.write_text(wanted[file])
    return 0


def files() -> dict[Path, str]:
    """Give each file and its text."""
    found = dict(verbs())
    texts = {PAGE: page(found)}
    for name, verb in found.items():
        if answer := answer_of(verb.callback):
            schema = {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "title": f"kvbm {name} --json",
            }
            schema |= {"description": "Of each line."} if answer.lines else {}
            text = json.dumps({**schema, **msgspec.json.schema(answer.form)}, indent=1)
            texts[SCHEMAS / file_of(name)] = text + "\n"
    return texts


def file_of(name: str) -> str:
    """Name a verb's schema."""
    return f"{name.replace(' ', '-')}.json"


def verbs() -> Iterator[tuple[str, Any]]:
    """Find this project's verbs: the words behind `kvbm`, and the command."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, value in sorted(project["entry-points"][COMMANDS_GROUP].items()):
        module, _, attribute = value.partition(":")
        words = name.replace(".", " ")
        yield from _verbs(words, command_of(words, getattr(importlib.import_module(module), attribute)))


def _verbs(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None or command.invoke_without_command:
        yield name, command
    for word in sorted(inner or ()):
        yield from _verbs(f"{name} {word}", inner[word])


def page(found: dict[str, Any]) -> str:
    """Write the page."""
    rows = "".join(f"| {code.value} | `{code.name}` | {_sentence(code)} |\n" for code in ExitCode)
    return HEAD + rows + "".join(_section(name, verb) for name, verb in found.items()) + HOOK


def _sentence(code: ExitCode) -> str:
    """Give what stands under a member in the source."""
    source = Path(importlib.import_module(ExitCode.__module__).__file__ or "").read_text()
    return source.partition(f"    {code.name} = {code.value}\n")[2].split('"""')[1]


def _section(name: str, verb: Any) -> str:
    words = [_placeholder(each) for each in verb.params if each.param_type_name == "argument"]
    lines = ["", f"## `kvbm {name}`", "", verb.help.strip(), ""]
    lines += [f"`{' '.join(['kvbm', name, *words, '[OPTION ...]'])}`", ""]
    lines += ["| option | default | meaning |", "|---|---|---|"]
    for each in verb.params:
        if each.name != "help":
            lines.append(f"| {_name(each)} | {_default(each)} | {_cell(each.help)} |")
    if answer := answer_of(verb.callback):
        what = "a document a line" if answer.lines else "one document"
        lines += ["", f"JSON: {what}, [schema](schemas/{file_of(name)})."]
    return "\n".join(lines) + "\n"


def _placeholder(each: Any) -> str:
    shown = str(each.metavar or each.name.upper())
    return shown if each.required else f"[{shown}]"


def _name(each: Any) -> str:
    if each.param_type_name == "argument":
        return f"`{_cell(str(each.metavar or each.name.upper()))}`"
    value = "" if each.is_flag else f" {_cell(str(each.metavar or each.name.upper()))}"
    return f"`{', '.join(each.opts)}{value}`"


def _default(each: Any) -> str:
    if each.required:
        return "required"
    if isinstance(each.show_default, str):
        return _cell(each.show_default)
    return "" if each.default is None or each.default is False else f"`{each.default}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
