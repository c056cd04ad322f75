"""The policies of a stack's tiers, as they are configured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from kvbm_core.admission import AdmissionPolicy
from kvbm_core.policies import Fifo, Lru
from kvbm_core.policy import PolicyContext

__all__ = ["MakeAdmission", "MakeOrder", "TierPolicies"]

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
