"""Policies that remember nothing: everything, and what is of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_core import AdmissionPolicy, BlockKey, Origin, PolicyConfig, PolicyContext

__all__ = ["Always", "AlwaysConfig", "PromptsOnly", "PromptsOnlyConfig"]


class AlwaysConfig(PolicyConfig, frozen=True):
    """Settings of `Always`: none."""


class Always(AdmissionPolicy):
    """Everything is written."""

    def __init__(self, config: AlwaysConfig, context: PolicyContext) -> None:
        pass

    def __repr__(self) -> str:
        return "<Always>"

    def admitted(self, keys: Sequence[BlockKey], nbytes: int, origin: Origin, now_s: float) -> int:
        """See `AdmissionPolicy.admitted`."""
        return len(keys)


class PromptsOnlyConfig(PolicyConfig, frozen=True):
    """Settings of `PromptsOnly`: none."""


class PromptsOnly(AdmissionPolicy):
    """What a model has generated is not written: it comes back only where the next prompt repeats it.

    Of blocks that come from another tier nobody knows what they were, so they are written.
    """

    def __init__(self, config: PromptsOnlyConfig, context: PolicyContext) -> None:
        pass

    def __repr__(self) -> str:
        return "<PromptsOnly>"

    def admitted(self, keys: Sequence[BlockKey], nbytes: int, origin: Origin, now_s: float) -> int:
        """See `AdmissionPolicy.admitted`."""
        return 0 if origin.is_generated else len(keys)
