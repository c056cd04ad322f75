"""One file for a bug report: what was found, what is installed, and settings without their secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

import msgspec

from kvbm_cli.doctor._findings import Finding
from kvbm_cli.plugins._list import Plugins, list_plugins
from kvbm_core.config import StackConfig, TierEntry, convert
from kvbm_core.errors import ConfigError
from kvbm_core.registry import Registry
from kvbm_core.remedies import remedy

__all__ = ["Bundle", "make_bundle", "write_bundle"]

_TOLD: Final = re.compile(r"(DYN_KVBM|DYN_SYSTEM|KVBM|VLLM|CUDA|NCCL|NIXL|UCX|OMP|MALLOC)_\w+", re.ASCII)
"""Variables of the environment that are told; of all others not even the name."""
_SECRET: Final = re.compile(r"KEY|SECRET|TOKEN|PASS|CRED|AUTH|URL|ENDPOINT", re.IGNORECASE)
_PLAIN: Final = re.compile(r"[\w.,:/ -]{0,100}", re.ASCII)
_USER: Final = re.compile(r"//[^/@\s]*@")


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm doctor --bundle` writes."""

    findings: list[Finding]
    plugins: Plugins
    distributions: dict[str, str]
    """Everything that is installed, and its version."""
    environment: dict[str, str]
    configuration: list[str]
    """The stack and each tier's settings: numbers and switches; of all else the type or the keys."""


def make_bundle(findings: list[Finding], config: StackConfig | None) -> Bundle:
    """Collect it."""
    return Bundle(
        findings=findings,
        plugins=list_plugins(),
        distributions={each.name: each.version for each in metadata.distributions() if each.name},
        environment=told_environment(os.environ),
        configuration=[] if config is None else [repr(config), *map(_told_settings, config.tiers)],
    )


def _told_settings(entry: TierEntry) -> str:
    """Give a tier's settings as its backend reads them: the type's own repr hides what may be a secret."""
    try:
        return f"{entry.name}: {convert(entry.settings, Registry().backend(entry.backend).config_type, '')!r}"
    except ConfigError:
        return f"{entry.name}: cannot be read, see `kvbm check`"


def told_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Give the variables that may be told, and of those that may hold a secret the name alone."""
    return {name: _shown(name, value) for name, value in sorted(environ.items()) if _TOLD.fullmatch(name)}


def _shown(name: str, value: str) -> str:
    hidden = _SECRET.search(name) or _USER.search(value) or not _PLAIN.fullmatch(value)
    return "(hidden)" if hidden else value


def write_bundle(file: Path, bundle: Bundle) -> None:
    """Write it, for its owner alone.

    Raises:
        ConfigError: The file cannot be written, or is there already.
    """
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as sink:
            sink.write(msgspec.json.format(msgspec.json.encode(bundle), indent=2) + b"\n")
    except FileExistsError as error:
        raise ConfigError(f"--bundle: {file} is there already; write another name") from error
    except OSError as error:
        raise ConfigError(f"--bundle: {file}: {error.strerror}; {remedy(error, file)}") from error
