"""Registers the leader and the workers of engines in etcd.

    coordinator: {backend: etcd, endpoints: ["http://etcd-1:2379"]}

`EtcdCoordinator` does it, `EtcdConfig` has its settings. ``kvbm etcd ls`` lists the engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvbm_core.config import convert
from kvbm_core.hookspecs import hookimpl
from kvbm_etcd._config import EtcdConfig
from kvbm_etcd._coordinator import EtcdCoordinator

__all__ = ["EtcdConfig", "EtcdCoordinator", "kvbm_coordinator"]


@hookimpl
def kvbm_coordinator(settings: Mapping[str, Any]) -> EtcdCoordinator:
    """Make the coordinator ``etcd``."""
    return EtcdCoordinator(convert(settings, EtcdConfig, "coordinator (etcd)"))
