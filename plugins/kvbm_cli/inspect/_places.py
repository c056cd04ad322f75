"""From what an operator names to places of tiers: a configuration, a directory, or a URL."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvbm_core.config import StackConfig, TierEntry, convert, load_config
from kvbm_core.contents import Contents
from kvbm_core.errors import ConfigError
from kvbm_core.registry import Registry
from kvbm_core.stored import Stored
from kvbm_core.tier import Backend, TierConfig

__all__ = ["Place", "find_places"]

_MARKS: Final = {"data.mdb": "lmdb", "index": "gds", "slab.000": "gds"}
"""Files in a rank's folder, and whose they are."""
_TOP: Final = "v1"
"""Of a store of the backend `remote` in a directory."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tier keeps its objects."""

    tier: str
    where: str
    backend: str
    settings: dict[str, Any]
    entry: TierEntry | None = None
    """As configured; None where only the place was named."""

    def stored(self) -> Sequence[Stored] | None:
        """List what lies there; None if the backend cannot tell.

        Raises:
            KvbmError: It cannot be read.
        """
        backend = Registry().backend(self.backend)
        if backend.stored is None:
            return None
        return list(backend.stored(self._config(backend)))

    def contents(self) -> Sequence[Contents] | None:
        """Open what lies there for reading; None if the backend cannot do that.

        Raises:
            KvbmError: It cannot be read.
        """
        backend = Registry().backend(self.backend)
        if backend.contents is None:
            return None
        return list(backend.contents(self._config(backend)))

    def _config(self, backend: Backend) -> TierConfig:
        return convert(self.settings, backend.config_type, f"tier {self.tier}")


def find_places(source: str, options: Sequence[str]) -> list[Place]:
    """Find the places.

    Args:
        source: A YAML file, a directory, or a URL.
        options: NAME=VALUE of a URL's storage options.

    Raises:
        ConfigError: It is none of these, or what is there is no tier's.
    """
    if "://" in source:
        if any("=" not in each for each in options):
            raise ConfigError("--option: write NAME=VALUE, like endpoint_url=http://host:9000")
        pairs = (each.partition("=") for each in options)
        found: dict[str, Any] = {"url": source, "storage_options": {name: value for name, _, value in pairs}}
        return [Place("remote", source, "remote", found)]
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        places = [*_in_directory(path)]
        if not places:
            raise ConfigError(
                f"{path}: no tier keeps objects there; write the 'path' or 'url' of a tier, or a "
                "configuration file"
            )
        return places
    return [*_of_stack(load_config(source))]


def _in_directory(path: Path) -> Iterator[Place]:
    """Tell by the files which backend keeps a directory; replicas of a later command have folders in it."""
    for root in (path, *sorted(path.glob("dp[0-9]*"))):
        names = {file.name for file in root.glob("rank[0-9]*/*")}
        backend = next((whose for name, whose in _MARKS.items() if name in names), None)
        if backend:
            yield Place(backend, str(root), backend, {"path": str(root), "capacity": 1})
    if (path / _TOP).is_dir():
        yield Place("remote", f"file://{path}", "remote", {"url": f"file://{path}"})


def _of_stack(config: StackConfig) -> Iterator[Place]:
    for entry in config.tiers:
        where = entry.settings.get("path") or entry.settings.get("url")
        if not isinstance(where, str):
            continue
        settings = dict(entry.settings)
        yield Place(entry.name, where, entry.backend, settings, entry)
        if "path" in settings and not Registry().backend(entry.backend).shared:
            for root in sorted(Path(os.path.expanduser(where)).glob("dp[0-9]*")):
                yield Place(entry.name, str(root), entry.backend, {**settings, "path": str(root)}, entry)
