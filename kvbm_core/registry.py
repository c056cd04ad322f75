"""Finds backends and coordinators by name through the entry points of installed packages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from kvbm_core import hookspecs
from kvbm_core.config import refuse_unknown
from kvbm_core.coordinator import Coordinator
from kvbm_core.errors import BackendError, ConfigError
from kvbm_core.tier import CONTRACT_VERSION, Backend, TierConfig

__all__ = ["Registry"]


class Registry:
    """Loads backends by name, never all: a broken neighbour then does no harm.

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
        """List the backends that are installed, loaded or not."""
        return sorted({point.name for point in self._points})

    def backend(self, name: str) -> Backend:
        """Load a backend.

        Raises:
            BackendError: If there is none of that name (with the nearest), more than one, it cannot
                be imported, offers something that is no backend, or was written for another version
                of the contract. Names the distribution at fault.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(self._point(name))
        return self._loaded[name]

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

    def _point(self, name: str) -> EntryPoint:
        found = [point for point in self._points if point.name == name]
        if len(found) > 1:
            owners = " and ".join(_owner(point) for point in found)
            raise BackendError(f"backend {name!r} is offered by {owners}; uninstall one of them")
        if not found:
            try:
                refuse_unknown([name], self.names(), "backend")
            except ConfigError as error:
                message = (
                    str(error).replace("unknown key", "unknown backend").replace("known keys", "installed")
                )
                raise BackendError(message.removeprefix("backend: ")) from None
        return found[0]

    def _load(self, point: EntryPoint) -> Backend:
        owner, manager = _owner(point), _plugin(point)
        try:
            offered = [backend for batch in manager.hook.kvbm_backends() for backend in batch]
        except Exception as error:
            message = f"backend {point.name!r} of {owner}: kvbm_backends() failed: {error}"
            raise BackendError(message) from error
        return _accept(offered, point.name, owner)


def _plugin(point: EntryPoint) -> pluggy.PluginManager:
    """Import what an entry point names, and give its hooks."""
    owner = _owner(point)
    try:
        plugin = point.load()
    except Exception as error:
        raise BackendError(f"backend {point.name!r} of {owner} cannot be imported: {error}") from error
    manager = pluggy.PluginManager(hookspecs.ENTRY_POINT_GROUP)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise BackendError(f"backend {point.name!r} of {owner}: {error}") from error
    return manager


def _accept(offered: list[object], name: str, owner: str) -> Backend:
    """Check what a package offers under its entry point's name."""
    for backend in offered:
        if not isinstance(backend, Backend):
            raise BackendError(f"{owner} offers {backend!r} as a backend; it must be a kvbm_core.Backend")
        if backend.name == name:
            if backend.contract_version != CONTRACT_VERSION:
                raise BackendError(
                    f"backend {name!r} of {owner} was written for contract version "
                    f"{backend.contract_version}, this kvbm-core has {CONTRACT_VERSION}; "
                    "install a matching release"
                )
            if not (isinstance(backend.config_type, type) and issubclass(backend.config_type, TierConfig)):
                raise BackendError(f"backend {name!r} of {owner}: config_type must be a kvbm_core.TierConfig")
            return backend
    raise BackendError(f"{owner} has an entry point {name!r} but its kvbm_backends() offers no such backend")


def _owner(point: EntryPoint) -> str:
    """Name the distribution an entry point comes from."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
