"""Reads the stack from whatever an operator gives a connector."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from kvbm_core.config import StackConfig
from kvbm_core.errors import ConfigError
from kvbm_vllm._extra import FILE_KEY, read_stack
from kvbm_vllm.kvbm import NAMES

__all__ = ["read_source"]

_EXTRA: Final = "kv_connector_extra_config"


def read_source(
    source: str | None, environ: Mapping[str, str], block_bytes: Callable[[], int | None], ranks: int
) -> tuple[StackConfig, str]:
    """Read a configuration.

    Args:
        source: The path of a YAML file; or JSON: the stack itself, or what vLLM is given as
            ``--kv-transfer-config``. None: the environment alone.
        environ: The environment.
        block_bytes: Gives the bytes of a block over all ranks, or None where that is not known.
        ranks: Of the engine.

    Returns:
        The stack, and where it was read from, for messages.

    Raises:
        ConfigError: Something in it is wrong; names it as the connector would.
    """
    if source is None:
        return read_stack({}, environ, block_bytes, ranks), "the environment"
    if not source.lstrip().startswith("{"):
        return read_stack({FILE_KEY: source}, environ, block_bytes, ranks), source
    try:
        value = json.loads(source)
    except ValueError as error:
        # Not quoted: it may hold a password.
        raise ConfigError(f"CONFIG: begins with {{ and is no JSON: {error}") from None
    return read_stack(_extra(value), environ, block_bytes, ranks), "the JSON given"


def _extra(value: Mapping[str, Any]) -> dict[str, Any]:
    """Find the connector's own settings in what vLLM is given."""
    if "kv_connector" not in value and _EXTRA not in value:
        return dict(value)
    extra = value.get(_EXTRA) or {}
    if not isinstance(extra, dict):
        raise ConfigError(f"{_EXTRA}: a {type(extra).__name__}; write a mapping with 'tiers' or 'config'")
    for child in extra.get("connectors", ()):
        if isinstance(child, dict) and child.get("kv_connector") in NAMES:
            return _extra(child)
    name, role = value.get("kv_connector"), value.get("kv_role")
    if name not in NAMES:
        raise ConfigError(f"kv_connector: {name!r}; write {NAMES[0]!r}: nothing else reads tiers")
    if role != "kv_both":
        raise ConfigError(f'kv_role: {role!r}; KvbmConnector stores and loads: write "kv_both"')
    return dict(extra)
