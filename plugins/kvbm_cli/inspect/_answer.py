"""What `kvbm inspect` says of each namespace."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from kvbm_cli.inspect._places import Place
from kvbm_core.errors import ConfigError
from kvbm_core.namespace_facts import differences
from kvbm_core.printable import printable
from kvbm_core.stored import Stored

__all__ = ["Inspected", "Lying", "describe", "inspect_places"]


class Lying(msgspec.Struct, frozen=True, kw_only=True):
    """One namespace of one rank in one place."""

    tier: str
    where: str
    rank: int
    world_size: int | None
    namespace: str
    """32 digits."""
    model: str | None
    """Its architecture, and its weights; null where nobody wrote the namespace's facts."""
    layout: str | None
    """The engine's release, the tokens of a block, the KV cache's type, ranks and codecs."""
    age_s: float | None
    """Since it was last used, or something was stored."""
    objects: int | None
    """Null: not known while an engine uses the place."""
    nbytes: int | None
    held_by: str | None
    """The process that holds the place."""


class Inspected(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm inspect --json` writes."""

    source: str
    namespaces: list[Lying]
    unknown: list[str]
    """Tiers whose backend cannot tell what lies there."""
    differences: list[str] | None = None
    """With --diff: each fact that the two namespaces differ in; `here` is the first, `there` the second."""


def inspect_places(source: str, places: Iterable[Place], pair: Sequence[str] | None) -> Inspected:
    """Look into every place, and compare two namespaces.

    Raises:
        KvbmError: A place cannot be read, or there are no two such namespaces.
    """
    lying: list[Lying] = []
    found: list[Stored] = []
    unknown: list[str] = []
    for place in places:
        stored = place.stored()
        if stored is None:
            unknown.append(
                f"{place.tier}: the backend {place.backend} cannot tell what lies in {place.where}: "
                "it has no Backend.stored"
            )
            continue
        found += stored
        lying += [_lying(place, each) for each in stored]
    compared = None if pair is None else _compare(found, *pair)
    return Inspected(source=source, namespaces=lying, unknown=unknown, differences=compared)


def _lying(place: Place, stored: Stored) -> Lying:
    model, layout = describe(stored.facts) if stored.facts else (None, None)
    return Lying(
        tier=place.tier,
        where=place.where,
        rank=stored.rank,
        world_size=stored.world_size,
        namespace=stored.namespace.hex(),
        model=model,
        layout=layout,
        age_s=None if stored.latest_s is None else max(0.0, time.time() - stored.latest_s),
        objects=stored.objects,
        nbytes=stored.nbytes,
        held_by=stored.owner or None,
    )


def describe(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Say in words which model facts are of, and how its blocks are laid out. Facts may be anything."""
    names = [_model(each) for each in _list(facts.get("models")) if isinstance(each, Mapping)]
    layout = []
    for key, word in (
        ("vllm", "vLLM"), ("block_tokens", "tokens"), ("cache_dtype", "KV"), ("ranks", "ranks"),
        ("codecs", "codecs"),
    ):  # fmt: skip
        if (value := facts.get(key)) not in (None, []):
            layout.append(f"{word} {value}")
    return _short(", ".join(names) or "unknown"), _short("; ".join(layout) or "unknown")


def _model(facts: Mapping[str, Any]) -> str:
    config = facts.get("config")
    config = config if isinstance(config, Mapping) else {}
    name = next(iter(_list(config.get("architectures"))), config.get("model_type", "unknown"))
    return f"{name} (weights {str(facts.get('weights', 'unknown'))[:20]})"


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _short(text: str) -> str:
    return printable(text)[:200]


def _compare(found: Sequence[Stored], one: str, other: str) -> list[str]:
    """Compare the facts of two namespaces, each named by its first digits; of one rank if both have one."""
    here, there = _named(found, one), _named(found, other)
    ranks = sorted({each.rank for each in here} & {each.rank for each in there})
    rank_here = ranks[0] if ranks else here[0].rank
    rank_there = ranks[0] if ranks else there[0].rank
    first = next(each for each in here if each.rank == rank_here)
    second = next(each for each in there if each.rank == rank_there)
    for each in (first, second):
        if each.facts is None:
            raise ConfigError(
                f"--diff: nobody wrote what namespace {each.namespace.hex()} is made of, or it cannot be read"
            )
    return differences(first.facts or {}, second.facts or {})


def _named(found: Sequence[Stored], digits: str) -> list[Stored]:
    # Where it has facts, first.
    fitting = sorted(
        (each for each in found if each.namespace.hex().startswith(digits.lower())),
        key=lambda each: (each.facts is None, each.rank),
    )
    names = {each.namespace.hex() for each in fitting}
    if len(names) != 1 or not digits:
        said = "is of several" if names else "is of none"
        known = ", ".join(sorted({each.namespace.hex()[:12] for each in found})) or "none"
        raise ConfigError(f"--diff: {digits!r} {said}; write the first digits of one of: {known}")
    return fitting
