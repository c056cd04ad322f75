"""Whether a class overrides what its bases have in a way that they can be called in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from surface._classes import Class, Function, Member, Sources

__all__ = ["Parameters", "accepts", "compare_classes", "refuses", "unheard"]

_ENGINE: Final = "vllm"


@dataclass(frozen=True)
class Parameters:
    """What a function can be called with, without `self` or `cls`."""

    positional: tuple[str, ...]
    """Names of those that can be given by position, in order."""
    by_position_only: int
    """How many of them cannot be given by name."""
    required: frozenset[str]
    keyword_only: tuple[str, ...]
    any_positional: bool
    any_keyword: bool

    @classmethod
    def of(cls, function: Function, *, bound: bool) -> Parameters:
        """Read them from a function; `bound` leaves the first out."""
        arguments = function.args
        positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
        with_default = positional[len(positional) - len(arguments.defaults) :] if arguments.defaults else []
        keyword_only = [each.arg for each in arguments.kwonlyargs]
        with_default += [
            name for name, default in zip(keyword_only, arguments.kw_defaults, strict=True) if default
        ]
        skipped = int(bound)
        return cls(
            tuple(positional[skipped:]),
            max(0, len(arguments.posonlyargs) - skipped),
            frozenset({*positional[skipped:], *keyword_only} - {*with_default}),
            tuple(keyword_only),
            arguments.vararg is not None,
            arguments.kwarg is not None,
        )

    @property
    def names(self) -> set[str]:
        """Those that can be given by name."""
        return {*self.positional[self.by_position_only :], *self.keyword_only}


def parameters_of(member: Member) -> Parameters:
    """Read the parameters of a method as its caller sees them."""
    assert member.function is not None
    return Parameters.of(member.function, bound=member.kind != "staticmethod")


def accepts(ours: Parameters, base: Parameters) -> list[str]:
    """Say why ours cannot be called in every way that the base's can; empty if it can."""
    reasons = []
    for at, name in enumerate(base.positional):
        if at >= len(ours.positional):
            if not ours.any_positional:
                reasons.append(f"takes no {name!r} at position {at + 1}")
        elif at >= base.by_position_only and ours.positional[at] != name:
            reasons.append(f"calls {name!r} {ours.positional[at]!r}")
    by_name = {*base.names} - ours.names - {*ours.positional}
    if not ours.any_keyword:
        # Those by position were named above.
        reasons += [f"takes no {name!r}" for name in sorted(by_name - {*base.positional})]
    if base.any_positional and not ours.any_positional:
        reasons.append("takes no further positions")
    if base.any_keyword and not ours.any_keyword:
        reasons.append("takes no further names")
    known = {*base.positional, *base.keyword_only}
    reasons += [f"requires {name!r}" for name in sorted((ours.required & known) - base.required)]
    # One that is only called otherwise was named above.
    renamed = {*ours.positional[: len(base.positional)]}
    reasons += [f"requires {name!r}, which is not given" for name in sorted(ours.required - known - renamed)]
    return reasons


def refuses(function: Parameters, call: ast.Call) -> str | None:
    """Say why a function cannot be called like this; None if it can."""
    if any(isinstance(each, ast.Starred) for each in call.args) or any(not k.arg for k in call.keywords):
        return None
    given = {keyword.arg for keyword in call.keywords if keyword.arg}
    if len(call.args) > len(function.positional) and not function.any_positional:
        return f"takes {len(function.positional)} positions, is given {len(call.args)}"
    unknown = sorted(given - function.names)
    if unknown and not function.any_keyword:
        return f"takes no {unknown[0]!r}"
    missing = sorted(function.required - given - {*function.positional[: len(call.args)]})
    return f"requires {missing[0]!r}" if missing else None


def compare_classes(sources: Sources, classes: list[Class]) -> Iterator[str]:
    """Give what does not fit, of classes that have one of the engine's among their bases."""
    for cls in classes:
        theirs = _engine_bases(sources, cls)
        own = sources.members(cls)
        for name, member in own.items():
            base = _first(sources, theirs, name)
            if base is not None:
                yield from (f"{cls.name}.{name} {reason}" for reason in _differences(name, member, base))
        have = {name for each in sources.bases(cls) if each not in theirs for name in sources.members(each)}
        for name, member in ((n, m) for each in reversed(theirs) for n, m in sources.members(each).items()):
            if name not in have and _is_abstract(_first(sources, theirs, name) or member):
                yield f"{cls.name}.{name} is missing: it is abstract in {member.owner.name}"


def unheard(sources: Sources, classes: list[Class]) -> set[str]:
    """List public methods that no base of the engine's has: nobody calls them."""
    return {
        f"{cls.name}.{name}"
        for cls in classes
        if (theirs := _engine_bases(sources, cls))
        for name, member in sources.members(cls).items()
        if member.function and not name.startswith("_") and _first(sources, theirs, name) is None
    }


def _engine_bases(sources: Sources, cls: Class) -> list[Class]:
    return [each for each in sources.bases(cls) if each.module.partition(".")[0] == _ENGINE]


def _first(sources: Sources, classes: list[Class], name: str) -> Member | None:
    return next((sources.members(cls)[name] for cls in classes if name in sources.members(cls)), None)


def _differences(name: str, ours: Member, base: Member) -> Iterator[str]:
    if name.startswith("_") and not name.startswith("__"):
        yield f"is a private name of {base.owner.name}, too"
    elif ours.kind != base.kind:
        yield f"is a {ours.kind}, in {base.owner.name} it is a {base.kind}"
    elif ours.function and base.function and ours.kind != "property":
        for reason in accepts(parameters_of(ours), parameters_of(base)):
            yield f"{reason}, unlike {base.owner.name}"


def _is_abstract(member: Member) -> bool:
    if member.function is None:
        return False
    return any(ast.unparse(each).endswith("abstractmethod") for each in member.function.decorator_list)
