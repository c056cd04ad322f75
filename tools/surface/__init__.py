"""Compares what our connector overrides and reads of the engine with the sources of a version of it.

An engine that renames an attribute, or makes a property a method, breaks the connector only when the line
is reached. Here every such line is found without running any of it:

    our sources ──► methods that override: kind, parameters ──────────┐
         │                                                            ├──► judge ──► what does not fit
         └────────► reads: attribute, of which class, at which line ──┘
                      ▲
    a version's ──────┘  its annotations say what an attribute holds
    sources
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from surface._classes import Class, Object, Sources
from surface._methods import compare_classes, unheard
from surface._reads import Read, Reader

__all__ = ["NEVER_CALLED", "PROTOCOLS", "SOMETIMES", "Surface", "examine", "judge"]

NEVER_CALLED: Final[Mapping[str, str]] = {
    "KvbmConnector.counts": "for those who hold the connector itself: tests, and programs around an engine",
    "KvbmConnector.request_finished_all_groups": "of `SupportsHMA`, which it is registered as",
}
"""Public methods of ours that no version calls, each with its reason."""

SOMETIMES: Final[Mapping[str, str]] = {
    "CacheConfig.use_replayssm": "since 0.27",
    "KVCacheConfig.kv_tp_replicas": "since 0.31",
    "KVCacheConfig.prefix_cache_retention_interval": "since 0.29",
    "KVCacheConfig.prefix_cacheable_group_ids": "since 0.30",
    "KVConnectorBlockState.boundary_state_offloads": "since 0.29, as its class",
    "KVCacheGroupSpec.host_resident": "since 0.30",
    "KVCacheSpec.compress_ratio": "up to 0.28, `tokens_per_state` since",
    "KVCacheSpec.prefix_replay_tokens": "since 0.31",
    "KVCacheSpec.tokens_per_state": "since 0.29",
    "ParallelConfig.enable_fault_tolerance": "since 0.27",
    "SchedulerOutput.kv_connector_block_state": "since 0.29",
    "SlidingWindowSpec.extra_retained_tokens": "since 0.28",
    "VllmConfig.is_mm_encoder_only": "since 0.29",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorTransferResults": "since 0.30",
}
"""``Class.attribute`` that not every version has, and since which; read by `getattr` with a default."""

PROTOCOLS: Final[Mapping[str, str]] = {
    "kvbm_engine._values.EngineRequest": "vllm.v1.request.Request",
}
"""Protocols beside our package that the engine's objects fulfil: members are read of the engine's class."""

_KINDS: Final = "vllm.v1.kv_cache_interface"
_KIND: Final = re.compile(r"[A-Z]\w+Specs?")
"""How vLLM names the classes that say how a layer keeps its KV. Our code names them in strings."""


@dataclass(frozen=True)
class Surface:
    """How our sources fit one version."""

    problems: frozenset[str]
    unheard: frozenset[str]
    """Public methods of ours that this version does not call."""
    reads: frozenset[Read]
    overrides: frozenset[str]
    """Public methods of ours that were compared."""
    unknown_kinds: frozenset[str]
    """Kinds of KV that our code names and this version does not have."""


def examine(package: Path, engine: Path) -> Surface:
    """Compare a package of ours with a version.

    Args:
        package: Its folder.
        engine: A folder with the package `vllm`, sources only.
    """
    sources = Sources([package.parent, engine])
    modules = [_module(package, path) for path in sorted(package.glob("*.py"))]
    classes = [
        Class(module, node)
        for module in modules
        if (tree := sources.tree(module))
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    problems = {*compare_classes(sources, classes)}
    reads: set[Read] = set()
    for module in modules:
        reader = Reader(sources, module)
        reader.run()
        problems |= reader.problems
        reads |= reader.reads
    reads.update(_read_through_protocols(sources))
    alone = unheard(sources, classes)
    overrides = _methods(sources, classes) - alone
    kinds = _named_kinds(sources, modules)
    unknown = {kind for kind in kinds if sources.defined(_KINDS, kind) is None}
    return Surface(
        frozenset(problems), frozenset(alone), frozenset(reads), frozenset(overrides), frozenset(unknown)
    )


def judge(surfaces: Mapping[str, Surface], sometimes: Mapping[str, str] = SOMETIMES) -> list[str]:
    """List what does not fit, a line each, for every version by its name."""
    found = [f"{version}: {line}" for version, each in surfaces.items() for line in sorted(each.problems)]
    alone = frozenset.intersection(*(each.unheard for each in surfaces.values()))
    found += [f"{name} is called by none of them" for name in sorted(alone - NEVER_CALLED.keys())]
    nowhere = frozenset.intersection(*(each.unknown_kinds for each in surfaces.values()))
    found += [f"no version has a kind of KV {kind!r}" for kind in sorted(nowhere)]
    missing: dict[Read, list[str]] = {}
    for version, surface in surfaces.items():
        for read in surface.reads:
            if not read.found:
                missing.setdefault(read, []).append(version)
    excused = set()
    for read, versions in sorted(missing.items()):
        name = f"{read.of}.{read.name}"
        excused.add(name)
        if not read.has_default:
            found.append(f"{', '.join(versions)}: no {name}, read at {read.place}")
        elif len(versions) == len(surfaces):
            found.append(f"no version has {name}, read at {read.place}")
        elif name not in sometimes:
            found.append(f"{', '.join(versions)}: no {name}, read at {read.place}: name it in SOMETIMES")
    lost = _lost(surfaces)
    excused |= {name for _, _, name in lost}
    stale = sorted(sometimes.keys() - excused)
    found += [f"every version has {name}: take it out of SOMETIMES" for name in stale]
    return found + [
        f"{version}: what {name.rpartition('.')[2]!r} is read of at {place} cannot be told"
        for version, place, name in lost
        if name not in sometimes
    ]


def _lost(surfaces: Mapping[str, Surface]) -> list[tuple[str, str, str]]:
    """Name places that are followed in one version and not in another, whose annotations say less.

    Or which has not the class: then its attribute is named in `SOMETIMES`, and is read by `getattr`.
    """
    of = {(read.place, read.name): read.of for each in surfaces.values() for read in each.reads}
    return [
        (version, place, f"{of[place, name]}.{name}")
        for version, each in surfaces.items()
        for place, name in sorted(of.keys() - {(read.place, read.name) for read in each.reads})
    ]


def _read_through_protocols(sources: Sources) -> Iterator[Read]:
    for ours, theirs in PROTOCOLS.items():
        protocol, engines = (sources.find(*name.rsplit(".", 1)) for name in (ours, theirs))
        if not (isinstance(protocol, Object) and isinstance(engines, Object)):
            continue
        place = f"{protocol.of.module.rpartition('.')[2]}.py:{protocol.of.node.lineno}"
        for name in sources.members(protocol.of):
            found = sources.member(engines.of, name) is not None
            yield Read(engines.of.name, name, place, has_default=False, found=found)


def _named_kinds(sources: Sources, modules: Sequence[str]) -> set[str]:
    trees = [tree for tree in map(sources.tree, modules) if tree]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {node.value for node in nodes if isinstance(node.value, str) and _KIND.fullmatch(node.value)}


def _module(package: Path, path: Path) -> str:
    return package.name if path.name == "__init__.py" else f"{package.name}.{path.stem}"


def _methods(sources: Sources, classes: list[Class]) -> set[str]:
    return {
        f"{cls.name}.{name}"
        for cls in classes
        if any(base.module.startswith("vllm") for base in sources.bases(cls))
        for name, member in sources.members(cls).items()
        if member.function and not name.startswith("_")
    }
