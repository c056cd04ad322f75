"""The policies of a stack's tiers, as they are configured; an admission policy is watched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from kvbm_core.admission import AdmissionPolicy
from kvbm_core.block import BlockKey
from kvbm_core.policies import Fifo, Lru
from kvbm_core.policy import Origin, PolicyContext

__all__ = ["GuardedAdmission", "MakeAdmission", "MakeOrder", "TierPolicies"]

logger = logging.getLogger("kvbm_core")

MakeOrder = Callable[[PolicyContext], Fifo]
MakeAdmission = Callable[[PolicyContext], AdmissionPolicy]


class TierPolicies:
    """Makes the policies of each tier, by its position.

    Args:
        orders: Of the tiers that name an eviction policy. The others have `lru`.
        admissions: Of those that name an admission policy. To the others everything is written.
    """

    def __init__(
        self,
        orders: Mapping[int, MakeOrder] = MappingProxyType({}),
        admissions: Mapping[int, MakeAdmission] = MappingProxyType({}),
    ) -> None:
        self._orders, self._admissions = orders, admissions

    def __repr__(self) -> str:
        return f"<TierPolicies of tiers {sorted({*self._orders, *self._admissions})}>"

    def order(self, position: int, context: PolicyContext) -> Fifo:
        """Make the eviction policy of a tier."""
        make = self._orders.get(position)
        return Lru() if make is None else make(context)

    def admission(self, position: int, context: PolicyContext) -> AdmissionPolicy | None:
        """Make the admission policy of a tier; None for none."""
        make = self._admissions.get(position)
        return None if make is None else make(context)


class GuardedAdmission(AdmissionPolicy):
    """Asks another policy. Once it fails, everything is written.

    Args:
        adviser: The policy.
        tier: The tier's name, for the log.
        owner: The policy's name and distribution, for the log.
    """

    def __init__(self, adviser: AdmissionPolicy, tier: str, owner: str) -> None:
        self._adviser: AdmissionPolicy | None = adviser
        self._tier, self._owner = tier, owner

    def __repr__(self) -> str:
        return f"<GuardedAdmission {self._adviser!r}>"

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:
        """See `AdmissionPolicy.offered`."""
        try:
            if self._adviser is not None:
                self._adviser.offered(keys, origin)
        except Exception as error:  # noqa: BLE001 - a stranger's code: its mistake must not end the engine.
            self._dismiss("offered", error)

    def admitted(self, keys: Sequence[BlockKey], nbytes: int, origin: Origin, now_s: float) -> int:
        """See `AdmissionPolicy.admitted`."""
        try:
            if self._adviser is not None:
                return max(0, min(len(keys), int(self._adviser.admitted(keys, nbytes, origin, now_s))))
        except Exception as error:  # noqa: BLE001 - a stranger's code: its mistake must not end the engine.
            self._dismiss("admitted", error)
        return len(keys)

    def _dismiss(self, method: str, error: Exception) -> None:
        self._adviser = None
        logger.error(
            "tier %s goes on without an admission policy, so that everything is written: policy %s is at "
            "fault (%s() raised %s). Tell its authors, or write another policy for the tier",
            self._tier, self._owner, method, type(error).__name__, exc_info=error,
        )  # fmt: skip
