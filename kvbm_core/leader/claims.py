"""What a request asks of the tiers for its blocks: whose they are, and how long they must stay.

A claim travels with the keys of its request's prefix, as their attribute ``claim``, to wherever room is made
for them: a store of now, a write-back of later, a promotion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["COMMON", "UNCLAIMED", "Claim", "claim_of"]

COMMON: Final = ""
"""Whose the blocks are that no tenant is charged for."""


@dataclass(slots=True, eq=False)
class Claim:
    """Of one request that has hints."""

    tenant: str = COMMON
    """Who is charged for the blocks that it brings into a tier."""
    keep_s: float = 0.0
    """They stay for so long after they were stored or used last. 0: as long as the policy lets them."""
    until_s: float = 0.0
    """When that ends, by the leader's clock."""


UNCLAIMED: Final = Claim()
"""Of a request without hints."""


def claim_of(prefix: object) -> Claim | None:
    """Give the claim of a request's keys, `UNCLAIMED` if it has no hints. None: they are of no request."""
    claim = getattr(prefix, "claim", None)
    if claim is not None or not hasattr(prefix, "claim"):
        return claim
    return UNCLAIMED
