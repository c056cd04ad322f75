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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from surface._classes import Class, Object, Sources
from surface._methods import compare_classes, unheard
from surface._reads import Read, Reader

__all__ = ["NEVER_CALLED", "SOMETIMES", "Surface", "examine", "judge"]

NEVER_CALLED: Final[Mapping[str, str]] = {
    "KvbmConnector.counts": "for those who hold the connector itself: tests, and programs around an engine",
}
"""Public methods of ours that no version calls, each with its reason."""

SOMETIMES: Final[Mapping[str, str]] = {}
"""``Class.attribute`` that not every version has, and since which; read by `getattr` with a default."""

_KINDS: Final = "vllm.v1.kv_cache_interface"
_REFUSED: Final = ("kvbm_vllm._settings", "_PARTIAL_KINDS")
"""Where our source says how the names of kinds begin that are refused."""
_JUDGED: Final[Mapping[str, str]] = {
    "KVCacheSpec": "abstract",
    "AttentionSpec": "abstract",
    "FullAttentionSpec": "served",
    "TQFullAttentionSpec": "served",
    "MLAAttentionSpec": "served",
    "UniformTypeKVCacheSpecs": "served",  # Layers of one kind; vLLM names that kind to the scheduler.
    "EncoderOnlyAttentionSpec": "beside",  # Keeps nothing.
    "HiddenStateCacheSpec": "beside",
    "CircularBufferSpec": "beside",
    "KpoolTailSpec": "beside",
    "HiSparseHotSpec": "beside",
    "HiSparseResidentSpec": "beside",
    "RSWASpec": "open",  # Gives the blocks of old answers away while it answers.
}
"""Kinds of KV of every version, beside those that are refused by name. ``beside``: never the only kind of a
model, and a model with several is refused. ``open``: to be judged."""


@dataclass(frozen=True)
class Surface:
    """How our sources fit one version."""

    problems: frozenset[str]
    unheard: frozenset[str]
    """Public methods of ours that this version does not call."""
    reads: frozenset[Read]
    overrides: frozenset[str]
    """Public methods of ours that were compared."""


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
    problems = {*compare_classes(sources, classes), *_misjudged(sources)}
    reads: set[Read] = set()
    for module in modules:
        reader = Reader(sources, module)
        reader.run()
        problems |= reader.problems
        reads |= reader.reads
    alone = unheard(sources, classes)
    overrides = _methods(sources, classes) - alone
    return Surface(frozenset(problems), frozenset(alone), frozenset(reads), frozenset(overrides))


def judge(surfaces: Mapping[str, Surface], sometimes: Mapping[str, str] = SOMETIMES) -> list[str]:
    """List what does not fit, a line each, for every version by its name."""
    found = [f"{version}: {line}" for version, each in surfaces.items() for line in sorted(each.problems)]
    alone = frozenset.intersection(*(each.unheard for each in surfaces.values()))
    found += [f"{name} is called by none of them" for name in sorted(alone - NEVER_CALLED.keys())]
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
    stale = sorted(sometimes.keys() - excused)
    found += [f"every version has {name}: take it out of SOMETIMES" for name in stale]
    return found + _lost(surfaces)


def _lost(surfaces: Mapping[str, Surface]) -> list[str]:
    """Name places that are followed in one version and not in another, whose annotations say less."""
    places = {version: {(read.place, read.name) for read in each.reads} for version, each in surfaces.items()}
    everywhere = set().union(*places.values())
    return [
        f"{version}: what {name!r} is read of at {place} cannot be told"
        for version, have in places.items()
        for place, name in sorted(everywhere - have)
    ]


def _misjudged(sources: Sources) -> Iterator[str]:
    """Name kinds of KV that nobody has looked at, and names to refuse that no kind has."""
    base = sources.find(_KINDS, "KVCacheSpec")
    tree = sources.tree(_KINDS)
    statement = sources.defined(*_REFUSED)
    if not isinstance(base, Object) or tree is None or not isinstance(statement, ast.Assign):
        yield f"{_KINDS}.KVCacheSpec or {'.'.join(_REFUSED)} cannot be found"
        return
    prefixes: tuple[str, ...] = ast.literal_eval(statement.value)
    nodes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    kinds = [node.name for node in nodes if base.of in sources.bases(Class(_KINDS, node))]
    for kind in kinds:
        refused, judged = kind.startswith(prefixes), _JUDGED.get(kind)
        if not refused and judged is None:
            yield f"{kind} is a kind of KV that is neither refused nor known to be served"
        if refused and judged not in (None, "open"):
            yield f"{kind} is refused, and known to be {judged}"
    for prefix in prefixes:
        if not any(kind.startswith(prefix) for kind in kinds):
            yield f"no kind of KV begins with {prefix!r}, which is refused"


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
