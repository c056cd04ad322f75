"""Who shares the tiers: which tenants there are, what each has, and which blocks are kept for requests.

A tenant's quota is both a bound and a promise: it makes room among its own blocks when it has used it up, and
nobody else's load takes from what it has. So no more quotas are given than a tier can hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, NamedTuple

from kvbm_core.block import BlockKey
from kvbm_core.errors import ConfigError
from kvbm_core.leader.ground.tier_policies import TierPolicies
from kvbm_core.leader.ground.tier_state import TierState
from kvbm_core.leader.ground.tiers import Tiers
from kvbm_core.leader.tenancy.partitioned_index import PartitionedIndex
from kvbm_core.leader.tenancy.wishes import COMMON, Wish
from kvbm_core.policy import PolicyContext
from kvbm_core.sharing import OTHERS, Sharing

__all__ = ["TenantLevel", "Tenants"]

_IDLE_S: Final = 600.0
"""A tenant that the configuration does not name keeps its share for so long after its last request; then it
loses it to the next such tenant for which there is no room."""
_MAX_TENANTS: Final = 256
"""At once, those that the configuration names among them: each has series of metrics of its own."""


class TenantLevel(NamedTuple):
    """What a tenant has in a tier, over all ranks."""

    tenant: str
    tier: str
    used_bytes: int
    quota_bytes: int


@dataclass(slots=True)
class _Account:
    """One tenant."""

    quotas: dict[int, int]
    """By the tier's position, of one rank."""
    is_named: bool
    requests: int = 0
    """That live."""
    seen_s: float = 0.0
    """When the last one ended."""


class Tenants:
    """Gives tenants their shares, and keeps blocks.

    Args:
        tiers: The leader's tiers.
        sharing: What the configuration says.
        policies: Make the order of each tenant's part of a tier.
        world_size: Ranks of the engine.

    Raises:
        ConfigError: For a quota in a tier that cannot be shared out.
    """

    def __init__(self, tiers: Tiers, sharing: Sharing, policies: TierPolicies, world_size: int) -> None:
        self._tiers = tiers
        self._sharing = sharing
        self._policies = policies
        self._world_size = world_size
        self._accounts: dict[str, _Account] = {}
        self._parted: dict[int, PartitionedIndex] = {}
        """The indexes of the tiers that are shared out or have kept blocks, by position."""
        self._others = None if sharing.others is None else self._by_position(OTHERS, sharing.others)
        for name, quotas in sharing.tenants.items():
            self._open(name, _Account(self._by_position(name, quotas), is_named=True))

    def __repr__(self) -> str:
        return f"<Tenants {', '.join(self._accounts)}>"

    def why_not(self, name: str, now_s: float) -> str:
        """Take a tenant in, unless it is here. Gives the reason if that is not possible, else nothing."""
        if name in self._accounts:
            return ""
        if self._others is None:
            return "it is no tenant of this server, which has none but those that its configuration names"
        account = _Account(dict(self._others), is_named=False)
        if not self._fits(account):
            self._dissolve_idle(now_s, account)
        if not self._fits(account):
            return "the tiers have no room for the quotas of another tenant"
        self._open(name, account)
        return ""

    def begin(self, wish: Wish) -> None:
        """Note that a request with a wish lives."""
        if wish.keep_s and self._sharing.keep_fraction:
            for tier in self._tiers:
                if tier.capacity_bytes is not None and not tier.capabilities.shared:
                    self._part(tier)
        if account := self._accounts.get(wish.tenant):
            account.requests += 1

    def end(self, wish: Wish, now_s: float) -> None:
        """Note that a request with a wish has ended."""
        if account := self._accounts.get(wish.tenant):
            account.requests -= 1
            account.seen_s = now_s

    def keep(self, keys: Sequence[BlockKey], wish: Wish, now_s: float) -> dict[str, tuple[int, int]]:
        """Keep blocks of a request for as long as it has asked for, from now on.

        Returns:
            By the tier's name how many are kept, and how many are there and are not.
        """
        wish.until_s = now_s + wish.keep_s
        return {
            self._tiers[position].name: index.keep(keys, wish.tenant, wish.until_s)
            for position, index in self._parted.items()
        }

    def release(self, now_s: float) -> None:
        """Keep no longer what need not be kept any more. Costs nothing where nothing is kept."""
        for index in self._parted.values():
            index.release(now_s)

    def levels(self) -> Iterator[TenantLevel]:
        """Say what each tenant has."""
        for name, account in self._accounts.items():
            for position in account.quotas:
                share = self._parted[position].orders.shares[name]
                used, quota = share.used_bytes * self._world_size, share.quota_bytes or 0
                yield TenantLevel(name, self._tiers[position].name, used, quota * self._world_size)

    def kept_bytes(self) -> dict[str, int]:
        """Say how much is kept, by the tier's name, over all ranks."""
        kept = dict.fromkeys([tier.name for tier in self._tiers], 0)
        for position, index in self._parted.items():
            kept[self._tiers[position].name] = index.orders.kept_bytes * self._world_size
        return kept

    def _by_position(self, tenant: str, quotas: Mapping[str, Fraction]) -> dict[int, int]:
        """Give the bytes that these quotas are on one rank, by the tier's position."""
        positions, found = {tier.name: at for at, tier in enumerate(self._tiers)}, {}
        for name, quota in quotas.items():
            tier = self._tiers[positions[name]]
            if tier.capabilities.shared or tier.capacity_bytes is None:
                raise ConfigError(
                    f"tenants: {tenant}: {name}: other engines use this tier, so that no part of it can be "
                    "promised; take this quota away"
                )
            found[positions[name]] = int(tier.capacity_bytes * quota)
        return found

    def _fits(self, account: _Account) -> bool:
        if len(self._accounts) >= _MAX_TENANTS:
            return False
        for position, quota in account.quotas.items():
            given = sum(each.quotas.get(position, 0) for each in self._accounts.values())
            if given + quota > (self._tiers[position].capacity_bytes or 0):
                return False
        return True

    def _dissolve_idle(self, now_s: float, account: _Account) -> None:
        """Take their shares from those that the configuration does not name, and that have long been idle."""
        idle = [
            (each.seen_s, name)
            for name, each in self._accounts.items()
            if not each.is_named and not each.requests and now_s - each.seen_s >= _IDLE_S
        ]
        for _, name in sorted(idle):
            if self._fits(account):
                return
            for position in self._accounts.pop(name).quotas:
                self._parted[position].orders.dissolve(name)

    def _open(self, name: str, account: _Account) -> None:
        self._accounts[name] = account
        for position, quota in account.quotas.items():
            tier = self._tiers[position]
            context = PolicyContext(quota, max(tier.charges), tier.name)
            keep_bytes = int(quota * self._sharing.keep_fraction)
            self._part(tier).open_share(name, quota, keep_bytes, self._policies.order(position, context))

    def _part(self, tier: TierState) -> PartitionedIndex:
        """Have the index of a tier with a capacity of its own be in shares."""
        index = self._parted.get(tier.position)
        if index is None:
            keep_bytes = int((tier.capacity_bytes or 0) * self._sharing.keep_fraction)
            index = PartitionedIndex(tier.index, keep_bytes, self._find_owner)
            tier.index = self._parted[tier.position] = index
        return index

    def _find_owner(self, key: BlockKey) -> str:
        for index in self._parted.values():
            if owner := index.orders.owners.get(key):
                return owner
        return COMMON
