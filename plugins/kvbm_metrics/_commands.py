"""The group `kvbm metrics`: the dashboard, alert rules, and what starts Prometheus and Grafana."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from kvbm_core.command import answers, write_json
from kvbm_core.errors import ConfigError
from kvbm_core.remedies import remedy

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The dashboard, and what Prometheus and Grafana start with.")

_DEPLOY: Final = Path(__file__).with_name("deploy")
_DIGESTS: Final = ".kvbm_metrics.json"
"""In the folder: of each file the digest of what was written there."""


class Copied(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm metrics copy --json` writes. Paths are below the folder."""

    folder: str
    written: list[str]
    edited: list[str]
    """Left as they are: somebody has edited them. This version's text is beside each, with `.new`."""


@app.callback()
def root() -> None:
    """The dashboard, and what Prometheus and Grafana start with."""


@app.command("copy")
@answers(Copied)
def copy(
    folder: Annotated[Path, typer.Argument(help="Is made if it is not there; files edited there stay.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Copy the dashboard, the alert rules and a compose file into a folder."""
    try:
        done = copy_files(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; {remedy(error, folder)}") from error
    if as_json:
        write_json(done)
        return
    for name in done.edited:
        target = folder / name
        print(f"{target} was edited and is left as it is; the text of this version is {target}.new")
    print(f"copied to {folder}; now: cd {folder} && docker compose up -d")


def copy_files(folder: Path) -> Copied:
    """Copy. A file that somebody has edited stays, and the new text is put beside it."""
    digests = _read_digests(folder / _DIGESTS)
    done = Copied(folder=str(folder), written=[], edited=[])
    for source in sorted(path for path in _DEPLOY.rglob("*") if path.is_file()):
        name = source.relative_to(_DEPLOY).as_posix()
        text, target = source.read_bytes(), folder / name
        if _edited(target, text, digests.get(name)):
            target.with_name(f"{target.name}.new").write_bytes(text)
            done.edited.append(name)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)
        digests[name] = _digest(text)
        done.written.append(name)
    (folder / _DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")
    return done


def _edited(target: Path, text: bytes, written: str | None) -> bool:
    """Say whether a file has neither this version's text nor that which was written there."""
    return target.exists() and _digest(target.read_bytes()) not in (_digest(text), written)


def _read_digests(file: Path) -> dict[str, str]:
    """Read what was written. A record that cannot be read is none: then what differs counts as edited."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
