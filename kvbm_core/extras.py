"""The command that installs an extra of a package, from where the package itself came."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["extra_command"]


def extra_command(extra: str, package: str = "kvbm-core") -> str:
    """Give the command, like ``pip install -e '/src/kvbm-core[remote]'``.

    Args:
        extra: Its name, as in the package's metadata.
        package: Name of the distribution.
    """
    name = f"{package}[{extra}]"
    try:
        origin = json.loads(metadata.distribution(package).read_text("direct_url.json") or "{}")
        return f"pip install {_source(origin, name, extra)}"
    except (metadata.PackageNotFoundError, ValueError, KeyError):
        return f"pip install {shlex.quote(name)}"


def _source(origin: dict[str, Any], name: str, extra: str) -> str:
    """Write where a package came from as pip wants it."""
    if not origin:
        return shlex.quote(name)
    url = str(origin["url"])
    if "vcs_info" in origin:
        vcs, commit = origin["vcs_info"]["vcs"], origin["vcs_info"]["commit_id"]
        return shlex.quote(f"{name} @ {vcs}+{url}@{commit}")
    if urlsplit(url).scheme != "file":
        return shlex.quote(f"{name} @ {url}")
    path = unquote(urlsplit(url).path)
    if origin.get("dir_info", {}).get("editable"):
        return f"-e {shlex.quote(f'{path}[{extra}]')}"
    return shlex.quote(f"{path}[{extra}]")
