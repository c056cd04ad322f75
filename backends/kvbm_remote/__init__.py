"""Keeps blocks in an object store or on a file server, shared by many engines.

    tiers:
      - {backend: remote, url: "s3://kv-cache/prod"}

`RemoteTier` is the tier, `RemoteConfig` its settings. ``kvbm clear URL`` deletes what is old.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_core.hookspecs import hookimpl
from kvbm_core.tier import Backend
from kvbm_remote._bare import BareFsspec
from kvbm_remote._clients import check
from kvbm_remote._config import RemoteConfig
from kvbm_remote._contents import contents
from kvbm_remote._stored import stored
from kvbm_remote._tier import RemoteTier

__all__ = ["RemoteConfig", "RemoteTier", "kvbm_backends"]


@hookimpl
def kvbm_backends() -> Sequence[Backend]:
    """Offer the backend ``remote``."""
    return [
        Backend(
            "remote",
            RemoteConfig,
            RemoteTier,
            check,
            shared=True,
            stored=stored,
            contents=contents,
            bare=BareFsspec,
        )
    ]
