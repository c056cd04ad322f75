"""What a request asks of the tiers for its blocks: whose they are, and how long they must stay.

A wish travels with the keys of its request's prefix, as their attribute ``wish``, to wherever room is made
for them: a store of now, a write-back of later, a promotion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["COMMON", "NO_WISH", "Wish", "wish_of"]

COMMON: Final = ""
"""Whose the blocks are that no tenant is charged for."""


@dataclass(slots=True, eq=False)
class Wish:
    """Of one request that has hints."""

    tenant: str = COMMON
    """Who is charged for the blocks that it brings into a tier."""
    keep_s: float = 0.0
    """They stay for so long after they were stored or used last. 0: as long as the policy lets them."""
    until_s: float = 0.0
    """When that ends, by the leader's clock."""


NO_WISH: Final = Wish()
"""Of a request without hints."""


def wish_of(prefix: object) -> Wish | None:
    """Give the wish of a request's keys, `NO_WISH` if it has no hints. None: they are of no request."""
    wish = getattr(prefix, "wish", None)
    if wish is not None or not hasattr(prefix, "wish"):
        return wish
    return NO_WISH
