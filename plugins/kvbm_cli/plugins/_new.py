"""Writes a package of its own for a backend, a codec or a policy."""

from __future__ import annotations

import enum
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

import msgspec

from kvbm_core import CONTRACT_VERSION, ConfigError, Registry
from kvbm_core.remedies import remedy

__all__ = ["Kind", "Written", "write_package"]

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


class Kind(enum.Enum):
    """What a package offers."""

    BACKEND = "backend"
    CODEC = "codec"
    POLICY = "policy"


_EXAMPLES: Final = {
    Kind.BACKEND: "  - {backend: $name, capacity: 8GiB}",
    Kind.CODEC: '  - {backend: remote, url: "s3://bucket/kv", codecs: [{name: $name, level: 1}]}',
    Kind.POLICY: "  - {backend: lmdb, capacity: 200GiB, path: /nvme/kvbm, policy: $name}",
}


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm plugins new --json` writes."""

    folder: str
    files: list[str]
    """Below the folder."""


def write_package(kind: Kind, name: str, folder: Path | None) -> Written:
    """Write the package.

    Raises:
        ConfigError: The name is none, or is taken; or the folder is not empty, or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"NAME: {name!r} cannot be one; write small letters, digits and hyphens, a letter first, "
            "like redis-cluster"
        )
    if name in (registry := Registry()).names():
        raise ConfigError(f"NAME: {registry.owner(name)} has it already; write another")
    target = folder or Path(f"kvbm-{name}")
    short = name.replace("-", "_")
    words = {
        "contract": str(CONTRACT_VERSION),
        "distribution": f"kvbm-{name}",
        "kind": kind.value,
        "module": f"kvbm_{short}",
        "name": name,
        "Name": "".join(part.capitalize() for part in name.split("-")),
        "short": short,
    }
    words["example"] = Template(_EXAMPLES[kind]).substitute(words)
    sources = {
        "README.md": "readme",
        f"kvbm_{short}.py": kind.value,
        "pyproject.toml": "pyproject",
        f"tests/test_{short}.py": f"test_{kind.value}",
    }
    try:
        if target.exists() and any(target.iterdir()):
            raise ConfigError(f"{target} is not empty; write another folder with --folder")
        for file, source in sources.items():
            template = resources.files(__package__).joinpath("templates", f"{source}.txt")
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (target / file).write_text(Template(template.read_text("utf-8")).substitute(words), "utf-8")
    except OSError as error:
        raise ConfigError(f"{target}: {error.strerror}; {remedy(error, target)}") from error
    return Written(folder=str(target), files=sorted(sources))
