"""From a connector's own settings, or from the environment, to the stack. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from kvbm_core import ConfigError, StackConfig, load_config
from kvbm_core.config import refuse_unknown
from kvbm_vllm.kvbm import check_environment, makes_stack, read_tiers

__all__ = ["FILE_KEY", "read_stack"]

FILE_KEY: Final = "config"
"""Names a file in place of the keys themselves."""


def read_stack(
    extra: Mapping[str, Any],
    environ: Mapping[str, str],
    block_bytes: Callable[[], int | None],
    world_size: int,
    engines: int = 1,
) -> StackConfig:
    """Read the stack from ``kv_connector_extra_config`` or from the environment.

    Args:
        extra: Has the mapping itself, or ``{"config": path}``.
        environ: May have NVIDIA's variables for KVBM.
        block_bytes: Gives the bytes of a block over all ranks, or None where that is not known.
        world_size: Ranks of the engine.
        engines: That divide each tier.

    Raises:
        ConfigError: If something in it is wrong, or both say what the stack is.
    """
    check_environment(environ)
    written, variables = [key for key in ("tiers", FILE_KEY) if key in extra], makes_stack(environ)
    if written and variables:
        raise ConfigError(
            f"kv_connector_extra_config has {written[0]!r}, and the environment has {', '.join(variables)}: "
            "both say what the tiers are; take one of them away"
        )
    if variables:
        return load_config({**extra, "tiers": read_tiers(environ, block_bytes, world_size, engines)})
    if not extra:
        raise ConfigError(
            "kv_connector_extra_config is empty: write 'tiers' or 'config' there, or set "
            "DYN_KVBM_CPU_CACHE_GB, DYN_KVBM_DISK_CACHE_GB or both in the environment"
        )
    return _read_extra(dict(extra))


def _read_extra(extra: dict[str, Any]) -> StackConfig:
    refuse_unknown(extra, [*StackConfig.__struct_fields__, FILE_KEY], "kv_connector_extra_config")
    if FILE_KEY not in extra:
        return load_config(extra)
    path = extra.pop(FILE_KEY)
    if not isinstance(path, str):  # Not shown: it may be the whole stack, with its passwords.
        raise ConfigError(
            f"kv_connector_extra_config: 'config': a {type(path).__name__}; write the path of a YAML file, "
            "or the keys themselves, beginning with 'tiers', in place of 'config'"
        )
    if extra:
        raise ConfigError(
            f"kv_connector_extra_config: 'config': {path!r} names a file, so {sorted(map(str, extra))} must "
            "be written there"
        )
    return load_config(path)
