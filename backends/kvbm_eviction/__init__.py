"""Eviction policies: which objects of a tier make room for others.

    - {backend: cpu, capacity: 64GiB, policy: adaptive}

`Adaptive` learns what is used again and is never much worse than LRU; `S3Fifo` keeps out what is used once.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_core import Policy, PolicyConfig, PolicyContext, hookimpl
from kvbm_eviction._adaptive import Adaptive
from kvbm_eviction._s3fifo import S3Fifo

__all__ = ["Adaptive", "S3Fifo", "kvbm_policies"]


class NoSettings(PolicyConfig, frozen=True):
    """A policy without settings."""


def _make_adaptive(config: NoSettings, context: PolicyContext) -> Adaptive:
    return Adaptive(context)


def _make_s3fifo(config: NoSettings, context: PolicyContext) -> S3Fifo:
    return S3Fifo(context)


@hookimpl
def kvbm_policies() -> Sequence[Policy]:
    """Offer the policies ``adaptive`` and ``s3fifo``."""
    return [
        Policy("adaptive", NoSettings, _make_adaptive, contract_version=2),
        Policy("s3fifo", NoSettings, _make_s3fifo, contract_version=2),
    ]
