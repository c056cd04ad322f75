"""Finds ranks that would not hold the same blocks, before the first request.

Each rank says what it was started with, as lines of a name and a value that must be alike on all. A
configuration file or an environment variable may differ between machines, and so may what is installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Final

import msgspec
import vllm

from kvbm_core import ConfigError, StackConfig
from kvbm_vllm._namespace import shared_facts, told_facts
from kvbm_vllm._values import Handshake

__all__ = ["check_ranks", "rank_facts"]

_TRAITS: Final = ("addressable", "device_direct", "shared", "remote_lookup")
"""What the planner must know of a tier, see `kvbm_core.Capabilities`."""
_OWN_KEYS: Final = re.compile(r"configuration\.(tiers\.\d+\.settings|coordinator)\.(.*)")
"""Keys that a backend or a coordinator has named: any of them may be a password."""
_TOLD_KEYS: Final = ("backend", "name", "path", "url")
_MOST_NAMED: Final = 5
_LONGEST_VALUE: Final = 80


def rank_facts(config: StackConfig, namespace: Mapping[str, Any]) -> dict[str, str]:
    """Flatten what must be alike on every rank.

    Args:
        config: The stack as this rank has read it.
        namespace: The facts of this rank's namespace.
    """
    tensor_parallel, pipeline_parallel, _rank = namespace["ranks"]
    # A stage of a pipeline has layers of its own.
    whole = namespace if pipeline_parallel == 1 else shared_facts(namespace)
    alike = {key: value for key, value in whole.items() if key not in ("ranks", "models")}
    facts = {
        "version of": {"kvbm-core": metadata.version("kvbm-core"), "vllm": vllm.__version__},
        "configuration": msgspec.to_builtins(config, enc_hook=str),
        **alike,
        "models": told_facts(namespace)["models"],
        "tensor_parallel_size": tensor_parallel,
        "pipeline_parallel_size": pipeline_parallel,
    }
    return {name: _without_chance(value) for name, value in _flatten(facts)}


def check_ranks(handshakes: Sequence[Handshake], world_size: int) -> None:
    """Refuse ranks that are missing or differ.

    Raises:
        ConfigError: Names the rank, and what differs with both values.
    """
    by_rank = {handshake.rank: handshake for handshake in handshakes}
    missing = sorted(set(range(world_size)) - by_rank.keys())
    if missing or len(handshakes) != world_size:
        raise ConfigError(
            f"{len(handshakes)} of {world_size} ranks have opened their tiers; missing: "
            f"{', '.join(map(str, missing)) or 'none, but one came twice'}. Look for its error in the log"
        )
    first = _said(by_rank[0])
    for rank in range(1, world_size):
        if different := _differences(_said(by_rank[rank]), first):
            raise ConfigError(
                f"rank {rank} differs from rank 0: {'; '.join(different)}. Give all ranks the same "
                "configuration, environment, packages and model"
            )


def _said(handshake: Handshake) -> dict[str, str]:
    """Add how its tiers work on a rank's machine to what it was started with."""
    traits = {
        f"tier {status.name}: {trait}": str(getattr(status.capabilities, trait))
        for status in handshake.status
        for trait in _TRAITS
    }
    return {**handshake.facts, **traits}


def _differences(facts: Mapping[str, str], first: Mapping[str, str]) -> list[str]:
    names = [name for name in {**first, **facts} if facts.get(name) != first.get(name)]
    told = [f"{name} is {_shown(name, facts)}, there {_shown(name, first)}" for name in names[:_MOST_NAMED]]
    return [*told, f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else told


def _shown(name: str, facts: Mapping[str, str]) -> str:
    """Show a value without what may be a password in it."""
    value = facts.get(name, "not there")
    own = _OWN_KEYS.fullmatch(name)
    if own and name in facts and own[2] not in _TOLD_KEYS and not _is_size(value):
        return "(hidden)"
    value = re.sub(r"//[^/@]*@", "//(hidden)@", value)
    return value if len(value) <= _LONGEST_VALUE else value[:_LONGEST_VALUE] + "..."


def _is_size(value: str) -> bool:
    """Say whether it is a number of at most 15 digits, perhaps with a unit, or a switch."""
    return value in ("True", "False") or bool(re.fullmatch(r"\d{1,15}(\.\d*)?\s*[A-Za-z]{0,3}", value))


def _flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        parts = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(str(index), part) for index, part in enumerate(value)]
    else:
        return [(name, str(value))]
    joint = "" if not name else " " if name == "version of" else "."
    return [flat for key, part in parts for flat in _flatten(part, f"{name}{joint}{key}")]


def _without_chance(value: str) -> str:
    """Weights that were not found have a random name in each process; that is no difference."""
    return "unknown" if value.startswith("unknown:") else value
