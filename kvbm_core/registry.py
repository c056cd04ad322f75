"""Finds backends, codecs, policies and coordinators by name through entry points of installed packages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, TypeVar

import pluggy

from kvbm_core import hookspecs
from kvbm_core.admission import Admission, AdmissionPolicy
from kvbm_core.codec import CodecConfig, CodecKind
from kvbm_core.config import StackConfig, convert, refuse_unknown
from kvbm_core.coordinator import Coordinator
from kvbm_core.errors import BackendError, ConfigError
from kvbm_core.extras import extra_command
from kvbm_core.leader.ground.guarded_policies import GuardedAdmission, GuardedPolicy
from kvbm_core.leader.ground.tier_policies import MakeAdmission, MakeOrder, TierPolicies
from kvbm_core.policies import Fifo, Lru
from kvbm_core.policy import EvictionPolicy, Policy, PolicyConfig, PolicyContext
from kvbm_core.tier import CONTRACT_VERSION, Backend, TierConfig

__all__ = ["Registry"]

_GUIDE = "docs/how-to/contract-2.md"
"""Of authors who bring a plug-in to this version of the contract."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=_Named)


class Registry:
    """Loads plug-ins by name, never all: a broken neighbour then does no harm.

    Args:
        points: The entry points to choose from; by default those of the group ``kvbm_core`` of every
            installed distribution.
    """

    def __init__(self, points: Iterable[EntryPoint] | None = None) -> None:
        group = hookspecs.ENTRY_POINT_GROUP
        self._points = list(entry_points(group=group) if points is None else points)
        self._loaded: dict[str, Backend] = {}

    def __repr__(self) -> str:
        return f"<Registry {', '.join(self.names())}>"

    def names(self) -> list[str]:
        """List the plug-ins that are installed, loaded or not."""
        return sorted({point.name for point in self._points})

    def backend(self, name: str) -> Backend:
        """Load a backend.

        Raises:
            BackendError: If there is none of that name (with the nearest), more than one, it cannot
                be imported, offers something that is no backend, or was written for another version
                of the contract. Names the distribution at fault.
        """
        if name not in self._loaded:
            found, whose = self._offered(name, "backend", "kvbm_backends", Backend), self.owner(name)
            _check(found, f"backend {whose}", TierConfig, "open", "check", "share_bytes")
            if not isinstance(found.shared, bool):
                raise BackendError(f"backend {whose}: shared is {found.shared!r}; it must be True or False")
            self._loaded[name] = found
        return self._loaded[name]

    def owner(self, name: str) -> str:
        """Name a plug-in and the distribution it comes from, for messages: ``'toy' of kvbm-toy 1.0``."""
        found = next((point for point in self._points if point.name == name), None)
        return f"{name!r} of {_owner(found)}" if found else repr(name)

    def codec(self, name: str) -> CodecKind:
        """Load a kind of codec. Raises as `backend`."""
        found = self._offered(name, "codec", "kvbm_codecs", CodecKind)
        _check(found, f"codec {self.owner(name)}", CodecConfig, "open")
        return found

    def policy(self, name: str) -> Policy:
        """Load a kind of policy. Raises as `backend`."""
        found = self._offered(name, "policy", "kvbm_policies", Policy)
        _check(found, f"policy {self.owner(name)}", PolicyConfig, "make")
        return found

    def admission(self, name: str) -> Admission:
        """Load a kind of admission policy. Raises as `backend`."""
        found = self._offered(name, "admission policy", "kvbm_admissions", Admission)
        _check(found, f"admission policy {self.owner(name)}", PolicyConfig, "make")
        return found

    def policies(self, config: StackConfig) -> TierPolicies:
        """Load the policies of a stack, and give the function that makes them.

        Raises:
            BackendError: As `backend` does.
            ConfigError: For a wrong setting.
        """
        orders: dict[int, MakeOrder] = {}
        admissions: dict[int, MakeAdmission] = {}
        for position, entry in enumerate(config.tiers):
            where = f"tiers[{position}] ({entry.name}):"
            if entry.policy is not None:
                kind = self.policy(entry.policy.name)
                settings = convert(entry.policy.settings, kind.config_type, f"{where} policy {kind.name}")
                orders[position] = partial(self._order, kind, settings)
            if (part := entry.admission) is not None:
                admission = self.admission(part.name)
                settings = convert(part.settings, admission.config_type, f"{where} admission {part.name}")
                admissions[position] = partial(self._admission, admission, settings)
        return TierPolicies(orders, admissions)

    def _order(self, kind: Policy, settings: PolicyConfig, context: PolicyContext) -> Fifo:
        """Make an eviction policy; a stranger's is watched, also one made from ours."""
        made: Any = kind.make(settings, context)
        if type(made) is Lru or type(made) is Fifo:
            return made
        if not isinstance(made, EvictionPolicy):
            raise BackendError(
                f"policy {self.owner(kind.name)}: make() gave a {type(made).__name__}; it must be a "
                "kvbm_core.EvictionPolicy"
            )
        return GuardedPolicy(made, context.tier, self.owner(kind.name))

    def _admission(
        self, kind: Admission, settings: PolicyConfig, context: PolicyContext
    ) -> AdmissionPolicy:  # fmt: skip
        made: Any = kind.make(settings, context)
        if not isinstance(made, AdmissionPolicy):
            raise BackendError(
                f"admission policy {self.owner(kind.name)}: make() gave a {type(made).__name__}; it must be "
                "a kvbm_core.AdmissionPolicy"
            )
        return GuardedAdmission(made, context.tier, self.owner(kind.name))

    def _offered(self, name: str, what: str, hook: str, kind: type[P]) -> P:
        """Give what the package of an entry point offers under its name, through one of its hooks."""
        point = self._point(name, what)
        owner, manager = _owner(point), _plugin(point)
        try:
            offered = [each for batch in getattr(manager.hook, hook)() for each in batch]
        except Exception as error:
            raise BackendError(f"{what} {name!r} of {owner}: {hook}() failed: {error}") from error
        for each in offered:
            if not isinstance(each, kind):
                raise BackendError(
                    f"{owner} offers {each!r} as a {what}; it must be a kvbm_core.{kind.__name__}"
                )
            if each.name == name:
                return each
        raise BackendError(f"{owner} has an entry point {name!r} but its {hook}() offers no such {what}")

    def coordinator(self, entry: Mapping[str, Any]) -> Coordinator:
        """Make the coordinator that a configuration's ``coordinator`` describes. Connects nowhere.

        Raises:
            BackendError: As `backend` does.
            ConfigError: For a wrong setting.
        """
        settings = dict(entry)
        name = settings.pop("backend", None)
        if not isinstance(name, str):
            raise ConfigError(
                "coordinator: write a mapping with a 'backend', like "
                "{backend: etcd, endpoints: ['http://host:2379']}"
            )
        point = self._point(name)
        made = _plugin(point).hook.kvbm_coordinator(settings=settings)
        if not isinstance(made, Coordinator):
            raise BackendError(f"backend {name!r} of {_owner(point)} makes no coordinator")
        return made

    def _point(self, name: str, what: str = "backend") -> EntryPoint:
        found = [point for point in self._points if point.name == name]
        if len(found) > 1:
            owners = " and ".join(_owner(point) for point in found)
            raise BackendError(f"{what} {name!r} is offered by {owners}; uninstall one of them")
        if not found:
            try:
                refuse_unknown([name], self.names(), what)
            except ConfigError as error:
                message = (
                    str(error)
                    .replace("unknown key", f"unknown {what}")
                    .replace("known keys", "installed, of all kinds")
                )
                raise BackendError(message.removeprefix(f"{what}: ")) from None
        return found[0]


def _plugin(point: EntryPoint) -> pluggy.PluginManager:
    """Import what an entry point names, and give its hooks."""
    owner = _owner(point)
    try:
        plugin = point.load()
    except Exception as error:
        remedy = _remedy(point) if isinstance(error, ModuleNotFoundError) else ""
        raise BackendError(
            f"plug-in {point.name!r} of {owner} cannot be imported: {error}{remedy}"
        ) from error
    manager = pluggy.PluginManager(hookspecs.ENTRY_POINT_GROUP)
    manager.add_hookspecs(hookspecs)
    for name in vars(hookspecs):
        function = getattr(plugin, name, None)
        if name.startswith("kvbm_") and callable(function) and not manager.parse_hookimpl_opts(plugin, name):
            raise BackendError(
                f"plug-in {point.name!r} of {owner}: {point.value} has a function {name}() that is no hook; "
                "write @hookimpl (from kvbm_core import hookimpl) above it"
            )
    try:
        manager.register(plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise BackendError(f"plug-in {point.name!r} of {owner}: {error}") from error
    return manager


def _check(found: Backend | CodecKind | Policy | Admission, whose: str, base: type, *functions: str) -> None:
    """Check what every plug-in says of itself: the contract, the type of its settings, its functions."""
    if found.contract_version != CONTRACT_VERSION:
        raise BackendError(
            f"{whose} was written for contract version {found.contract_version}, this kvbm-core has "
            f"{CONTRACT_VERSION}; install a matching release (its authors find in {_GUIDE} what to change)"
        )
    if not (isinstance(found.config_type, type) and issubclass(found.config_type, base)):
        raise BackendError(f"{whose}: config_type must be a kvbm_core.{base.__name__}")
    for name in functions:
        if not callable(getattr(found, name)):
            raise BackendError(f"{whose}: {name} must be a function")


def _remedy(point: EntryPoint) -> str:
    """Give the command that installs the extra named like an entry point, if its distribution has one."""
    extras = point.dist.metadata.get_all("Provides-Extra") or [] if point.dist else []
    return f"; {extra_command(point.name, point.dist.name)}" if point.dist and point.name in extras else ""


def _owner(point: EntryPoint) -> str:
    """Name the distribution an entry point comes from."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
