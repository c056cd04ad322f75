"""How tenants share the tiers, and how much may be kept for requests: what a configuration says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

from kvbm_core.config import StackConfig, parse_size, size_text
from kvbm_core.errors import ConfigError

__all__ = ["OTHERS", "Sharing", "sharing_of"]

OTHERS: Final = "default"
"""In place of a tenant's name: the quotas of each tenant that is not named."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Quotas are parts of a tier's capacity, whichever part of that an engine or a rank has."""

    keep_fraction: float = 0.0
    """Of a tier, and of a tenant's quota there: what may be kept for requests at most."""
    tenants: Mapping[str, Mapping[str, Fraction]] = field(default_factory=dict)
    """By tenant and by a tier's name the quota. Without an entry of a tier it has none there."""
    others: Mapping[str, Fraction] | None = None
    """The quotas of each tenant that is not named. None: there are no others."""


def sharing_of(config: StackConfig) -> Sharing:
    """Read what a configuration says.

    Raises:
        ConfigError: For a tier that is not there or has no capacity, and for quotas that a tier cannot hold.
    """
    names = {entry.name: entry.settings.get("capacity") for entry in config.tiers}
    sums = dict.fromkeys(names, 0)
    parts: dict[str, dict[str, Fraction]] = {tenant: {} for tenant in config.tenants}
    for tenant, quotas in config.tenants.items():
        for tier, quota in quotas.items():
            where = f"tenants: {tenant}: {tier}"
            if tier not in names:
                raise ConfigError(f"{where}: there is no such tier; write one of {', '.join(names)}")
            if names[tier] is None:
                raise ConfigError(
                    f"{where}: this tier has no capacity to be shared: other engines may fill it, and "
                    "nothing is evicted there; take this quota away"
                )
            if quota <= 0:
                raise ConfigError(f"{where}: {quota}; write a size above 0, like 1GiB")
            sums[tier] += quota
            capacity = parse_size(names[tier], f"tier {tier}: capacity")
            if sums[tier] > capacity:
                raise ConfigError(
                    f"{where}: the quotas add up to {size_text(sums[tier], up=True)}, the tier's capacity "
                    f"is {names[tier]}; write smaller quotas or a larger capacity"
                )
            parts[tenant][tier] = Fraction(quota, capacity)
    others = parts.pop(OTHERS, None)
    return Sharing(config.keep_fraction, parts, others)
