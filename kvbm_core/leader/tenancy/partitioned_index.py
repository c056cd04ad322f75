"""The index of a tier whose room tenants share, or in which requests have blocks kept.

It stands in the place of a `TierIndex` from when the first tenant or the first kept block comes; without any
nothing of this is in the way. Whoever brings an object into a tier first is charged for it as long as it is
there, whoever else uses it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Container, Iterable, Sequence

from kvbm_core.block import BlockKey
from kvbm_core.leader.ground.tier_index import TierIndex
from kvbm_core.leader.tenancy.partitions import Partitions, Share
from kvbm_core.leader.tenancy.wishes import COMMON, wish_of
from kvbm_core.policies import Fifo

__all__ = ["PartitionedIndex"]


class PartitionedIndex(TierIndex):
    """A tier's index, in shares.

    Args:
        index: That of before. It is not to be used any more.
        keep_bytes: That may be kept at once.
        find_owner: Says who is charged for an object elsewhere: where blocks are moved that no request asks
            for, whoever was charged is charged again.
    """

    def __init__(self, index: TierIndex, keep_bytes: int, find_owner: Callable[[BlockKey], str]) -> None:
        vars(self).update(vars(index))
        self.orders = Partitions(index._order, keep_bytes)
        self._order = self.ready = self.orders
        self._find_owner = find_owner
        self._ends: list[tuple[float, int, list[BlockKey]]] = []
        """A heap: when objects need be kept no longer, unless their time was extended."""
        self._batches = itertools.count()

    def open_share(self, tenant: str, quota_bytes: int, keep_bytes: int, order: Fifo) -> None:
        """Set a share of the tier aside for a tenant."""
        self.orders.shares[tenant] = Share(order, quota_bytes, keep_bytes)

    def reserve(
        self,
        keys: Sequence[BlockKey],
        charge: int,
        protected: Container[BlockKey] = (),
        *,
        are_absent: bool = False,
    ) -> tuple[list[BlockKey], list[BlockKey]]:
        """Set room aside, see `TierIndex.reserve`: in the share of whoever is charged.

        A tenant that has used up its quota makes room among its own objects. Else common objects make room.
        """
        wish = wish_of(protected)
        wanted = keys if are_absent else self.absent(keys)
        if wish is not None:
            filling, evicted = self._reserve_for(wish.tenant, wanted, charge, protected)
            if wish.keep_s:
                self.keep(filling, wish.tenant, wish.until_s)
            return filling, evicted
        filling, evicted = [], []
        for tenant, run in itertools.groupby(wanted, key=self._find_owner):
            more, gone = self._reserve_for(tenant, list(run), charge, protected)
            filling += more
            evicted += gone
        return filling, evicted

    def _reserve_for(
        self, tenant: str, keys: Sequence[BlockKey], charge: int, protected: Container[BlockKey]
    ) -> tuple[list[BlockKey], list[BlockKey]]:
        orders, share = self.orders, self.orders.shares.get(tenant)
        if share is None or share.quota_bytes is None or not charge:
            return super().reserve(keys, charge, protected, are_absent=True)
        wanted, evicted = list(keys), list[BlockKey]()
        if share.used_bytes + len(wanted) * charge > share.quota_bytes:
            room = (share.quota_bytes - share.used_bytes) // charge
            wanted, orders.has_asked = share.order.admitted(wanted, room, charge), True
            for _ in range(self.eviction_rounds):
                if (excess_bytes := share.used_bytes + len(wanted) * charge - share.quota_bytes) <= 0:
                    break
                victims = orders.evict_from(tenant, excess_bytes, protected, self._pins)
                evicted += [key for key, _ in victims]
            self._departures.note(evicted)
            del wanted[max(0, share.quota_bytes - share.used_bytes) // charge :]
        orders.making_room_for = tenant
        filling, more = super().reserve(wanted, charge, protected, are_absent=True)
        orders.making_room_for, orders.has_asked = COMMON, False
        share.used_bytes += len(filling) * charge
        orders.owners.update(dict.fromkeys(filling, tenant))
        return filling, evicted + more

    def stored(self, keys: Sequence[BlockKey], charges: Sequence[int] | None = None) -> None:
        """See `TierIndex.stored`."""
        reserved = [self._filling.get(key, 0) for key in keys]
        super().stored(keys, charges)
        for key, before in zip(keys, reserved, strict=True):
            if more := self.orders[key] - before:  # As a rule less than was reserved.
                share = self.orders.share_of(key)
                share.used_bytes += more if share.quota_bytes is not None else 0
                if key in self.orders.kept:
                    self.orders.charge_kept(share, more)

    def not_stored(self, key: BlockKey) -> None:
        """See `TierIndex.not_stored`."""
        reserved = self._filling.get(key, 0)
        super().not_stored(key)
        if key in self.orders.kept:
            self.orders.forget_kept(key, reserved)
        self._discharge(key, reserved)

    def drop(self, key: BlockKey) -> bool:
        """See `TierIndex.drop`."""
        nbytes = self.orders.get(key, 0)
        gone = super().drop(key)
        if gone:
            self._discharge(key, nbytes)
        return gone

    def unpin(self, keys: Iterable[BlockKey], *, was_used: bool = True) -> list[BlockKey]:
        """See `TierIndex.unpin`."""
        leaving = dict(self._leaving)
        gone = super().unpin(keys, was_used=was_used)
        for key in gone:
            self._discharge(key, leaving[key])
        return gone

    def is_kept(self, key: BlockKey) -> bool:
        """See `TierIndex.is_kept`: it must stay for a time, or a tenant is charged for it."""
        return key in self.orders.kept or key in self.orders.owners

    def keep(self, keys: Iterable[BlockKey], tenant: str, until_s: float) -> tuple[int, int]:
        """Keep objects from being evicted until then: those that are here, and charged to the tenant.

        Returns:
            How many are kept, and how many are here and not kept.
        """
        tenant = tenant if tenant in self.orders.shares else COMMON
        kept, batch, refused = self.orders.kept, list[BlockKey](), 0
        for key in keys:
            nbytes = self.orders.get(key) or self._filling.get(key)
            if nbytes is None:
                continue
            if key in kept and self.orders.owners.get(key, COMMON) == tenant:
                kept[key] = max(kept[key], until_s)
            elif self.orders.owners.get(key, COMMON) != tenant or not self.orders.keep(key, nbytes, until_s):
                refused += 1
                continue
            batch.append(key)
        if batch:
            heapq.heappush(self._ends, (until_s, next(self._batches), batch))
        return len(batch), refused

    def release(self, now_s: float) -> None:
        """Keep no longer what need not be kept any more."""
        kept = self.orders.kept
        while self._ends and self._ends[0][0] <= now_s:
            for key in heapq.heappop(self._ends)[2]:
                if kept.get(key, now_s + 1) > now_s:
                    continue
                if key in self.orders:
                    self.orders.release(key)
                else:
                    self.orders.forget_kept(key, self._filling[key])

    def _discharge(self, key: BlockKey, nbytes: int) -> None:
        """Charge nobody any more for an object that is gone."""
        if (owner := self.orders.owners.pop(key, COMMON)) != COMMON:
            self.orders.shares[owner].used_bytes -= nbytes
