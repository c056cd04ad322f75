"""Admission policies: which blocks are written to a tier at all.

    - {backend: lmdb, capacity: 2TiB, path: /nvme/kvbm, admission: {name: write-budget, drive: 2TB}}

`Always`, `SecondTouch`, `PromptsOnly` and `WriteBudget` are the policies. Each has its settings in a type
whose name ends with ``Config``.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_admission._budget import WriteBudget, WriteBudgetConfig
from kvbm_admission._simple import Always, AlwaysConfig, PromptsOnly, PromptsOnlyConfig
from kvbm_admission._touches import SecondTouch, SecondTouchConfig
from kvbm_core import Admission, hookimpl

__all__ = [
    "Always",
    "AlwaysConfig",
    "PromptsOnly",
    "PromptsOnlyConfig",
    "SecondTouch",
    "SecondTouchConfig",
    "WriteBudget",
    "WriteBudgetConfig",
    "kvbm_admissions",
]


@hookimpl
def kvbm_admissions() -> Sequence[Admission]:
    """Offer the admission policies of this package."""
    return [
        Admission("always", AlwaysConfig, Always, contract_version=2),
        Admission("prompts-only", PromptsOnlyConfig, PromptsOnly, contract_version=2),
        Admission("second-touch", SecondTouchConfig, SecondTouch, contract_version=2),
        Admission("write-budget", WriteBudgetConfig, WriteBudget, contract_version=2),
    ]
