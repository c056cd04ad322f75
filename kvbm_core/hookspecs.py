"""The hooks a plug-in package may implement. Called at start only: a hook call costs about 1 µs.

A backend package has one entry point in the group ``kvbm_core``, named like the backend, that
points to a module with this in it::

    from kvbm_core import Backend, hookimpl

    @hookimpl
    def kvbm_backends() -> list[Backend]:
        return [Backend(name="mine", config_type=MyConfig, open=MyTier)]

Codecs and policies are offered in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pluggy

from kvbm_core.admission import Admission
from kvbm_core.codec import CodecKind
from kvbm_core.coordinator import Coordinator
from kvbm_core.policy import Policy
from kvbm_core.tier import Backend

__all__ = [
    "ENTRY_POINT_GROUP",
    "hookimpl",
    "hookspec",
    "kvbm_admissions",
    "kvbm_backends",
    "kvbm_codecs",
    "kvbm_coordinator",
    "kvbm_policies",
]

ENTRY_POINT_GROUP: Final = "kvbm_core"

hookspec = pluggy.HookspecMarker(ENTRY_POINT_GROUP)
hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


@hookspec
def kvbm_backends() -> Sequence[Backend]:  # type: ignore[empty-body]
    """Offer backends. A package offers those its entry points name."""


@hookspec
def kvbm_codecs() -> Sequence[CodecKind]:  # type: ignore[empty-body]
    """Offer codecs. A package offers those its entry points name."""


@hookspec
def kvbm_policies() -> Sequence[Policy]:  # type: ignore[empty-body]
    """Offer eviction policies. A package offers those its entry points name."""


@hookspec
def kvbm_admissions() -> Sequence[Admission]:  # type: ignore[empty-body]
    """Offer admission policies. A package offers those its entry points name."""


@hookspec(firstresult=True)
def kvbm_coordinator(settings: Mapping[str, Any]) -> Coordinator:  # type: ignore[empty-body]
    """Make the coordinator of the package's entry point. Raises `ConfigError` for a wrong setting."""
