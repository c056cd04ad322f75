"""Reads a configuration file, and says of one that cannot be read what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kvbm_core.errors import ConfigError

__all__ = ["read_yaml"]


def read_yaml(source: str | Path) -> tuple[Path, object]:
    """Read a YAML file.

    Returns:
        Its whole path, and its content.

    Raises:
        ConfigError: If it cannot be read, is not YAML, or has a key twice in one mapping.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"configuration file {source}: HOME is not set, and this user has no home directory: write the "
            "whole path, beginning with /"
        ) from error
    try:
        value = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}{_variable_hint(path)}") from error
    except _TwiceError as error:
        raise ConfigError(f"configuration file {path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # Neither chained nor told: its text quotes the file, which may hold a password.
        mark = getattr(error, "problem_mark", None)
        place = f", see line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"configuration file {path} is not YAML{place}") from None
    return path, value


def _variable_hint(path: Path) -> str:
    """Say of a path with a variable in it that nobody has put the value in its place."""
    return "; variables are not replaced: write the whole path" if "$" in str(path) else ""


class _TwiceError(Exception):
    """A key is written twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, see `yaml.SafeLoader`."""
        seen: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in seen:
                raise _TwiceError(
                    f"key {key.value!r} is written twice, in lines {seen[key.value]} and {line}; "
                    "take one away"
                )
            seen[key.value] = line
        return super().construct_mapping(node, deep)
