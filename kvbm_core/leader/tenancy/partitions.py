"""One tier's READY objects in several orders: each tenant's own, the common one, and none for those kept.

insert ─► the order of whoever is charged ─► evict: only for itself, see `Partitions.evict`
▲      │ keep
│      ▼
`release`  kept: in no order until their time has come
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from kvbm_core.block import BlockKey
from kvbm_core.leader.tenancy.wishes import COMMON
from kvbm_core.policies import Fifo
from kvbm_core.policy import Origin

__all__ = ["Partitions", "Share"]


@dataclass(slots=True)
class Share:
    """What one tenant has in a tier, or all that no tenant is charged for."""

    order: Fifo
    """Of its READY objects that are not kept."""
    quota_bytes: int | None
    """That its objects may take, and that nobody else's load takes from it. None: the common share."""
    keep_bytes: int
    """Of these, kept at most."""
    used_bytes: int = 0
    """By its objects, those on their way in and out among them. Not counted for the common share."""
    kept_bytes: int = 0


class Partitions(Fifo):
    """An order of orders: it *is* the dictionary of all READY objects and their bytes.

    Args:
        common: The tier's policy, with the objects that are there.
        keep_bytes: Of them, kept at most.
    """

    def __init__(self, common: Fifo, keep_bytes: int) -> None:
        super().__init__()
        self.update(common)
        self.nbytes = common.nbytes
        self.shares = {COMMON: Share(common, None, keep_bytes)}
        self.owners: dict[BlockKey, str] = {}
        """Of the objects that a tenant is charged for, in whatever state."""
        self.kept: dict[BlockKey, float] = {}
        """Objects that must stay, and until when. They are FILLING or READY."""
        self.kept_bytes = 0
        """That they take, of all shares."""
        self.is_told_all = common.is_told_all
        self.making_room_for = COMMON
        self.has_asked = False
        """True if the tenant's policy has let in what `admitted` is asked for."""

    def __repr__(self) -> str:
        return f"<Partitions {len(self)} objects, {len(self.shares) - 1} tenants, {len(self.kept)} kept>"

    def share_of(self, key: BlockKey) -> Share:
        """Give the share that an object is in."""
        return self.shares[self.owners.get(key, COMMON)]

    def insert(self, key: BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`."""
        self[key] = nbytes
        self.nbytes += nbytes
        if key not in self.kept:
            self.share_of(key).order.insert(key, nbytes)

    def insert_each(self, sizes: Mapping[BlockKey, int]) -> None:
        """See `Fifo.insert_each`."""
        for key, nbytes in sizes.items():
            self.insert(key, nbytes)

    def touch(self, key: BlockKey) -> None:
        """See `EvictionPolicy.touch`."""
        if key not in self.kept:
            self.share_of(key).order.touch(key)

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:
        """See `EvictionPolicy.offered`. Each share learns of the objects that are charged to its tenant."""
        free = [key for key in keys if key not in self.kept] if self.kept else keys
        for tenant, run in itertools.groupby(free, key=lambda key: self.owners.get(key, COMMON)):
            self.shares[tenant].order.offered(list(run), origin)

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy.remove`. Who is charged remains: the object may be LEAVING."""
        nbytes = self.pop(key)
        self.nbytes -= nbytes
        if key in self.kept:
            self.forget_kept(key, nbytes)
        else:
            self.share_of(key).order.remove(key)

    def next_victims(self, count: int) -> Sequence[BlockKey]:
        """See `EvictionPolicy.next_victims`: of each share as many as it has of all objects."""
        found: list[BlockKey] = []
        for share in self.shares.values():
            own = -(-count * len(share.order) // max(1, len(self)))
            found += share.order.next_victims(own) if own else ()
        return found[:count]

    def admitted(self, keys: list[BlockKey], fitting: int, nbytes: int) -> list[BlockKey]:
        """See `Fifo.admitted`. No policy is asked twice for one object."""
        if self.has_asked:
            return keys
        return self.shares[self.making_room_for].order.admitted(keys, fitting, nbytes)

    def evict(
        self, nbytes: int, protected: Container[BlockKey], pinned: Container[BlockKey] = ()
    ) -> list[BlockKey]:
        """Choose objects that make room: common ones, then the tenant's own, never another tenant's."""
        victims = self.evict_from(COMMON, nbytes, protected, pinned)
        missing = nbytes - sum(size for _, size in victims)
        if missing > 0 and self.making_room_for != COMMON:
            victims += self.evict_from(self.making_room_for, missing, protected, pinned)
        return [key for key, _ in victims]

    def evict_from(
        self, tenant: str, nbytes: int, protected: Container[BlockKey], pinned: Container[BlockKey]
    ) -> list[tuple[BlockKey, int]]:
        """Choose objects of one share, and forget them; give each with its bytes."""
        share = self.shares[tenant]
        victims = [(key, self.pop(key)) for key in share.order.evict(nbytes, protected, pinned)]
        freed = sum(size for _, size in victims)
        self.nbytes -= freed
        if tenant != COMMON:
            share.used_bytes -= freed
            for key, _ in victims:
                del self.owners[key]
        return victims

    def keep(self, key: BlockKey, nbytes: int, until_s: float) -> bool:
        """Keep an object that takes so many bytes. False: too many are kept already."""
        share = self.share_of(key)
        if share.kept_bytes + nbytes > share.keep_bytes:
            return False
        if self.kept_bytes + nbytes > self.shares[COMMON].keep_bytes:
            return False
        self.kept[key] = until_s
        self.charge_kept(share, nbytes)
        if key in self:
            share.order.remove(key)
        return True

    def charge_kept(self, share: Share, nbytes: int) -> None:
        """Note that so many bytes more, or fewer, are kept of a share."""
        share.kept_bytes += nbytes
        self.kept_bytes += nbytes

    def release(self, key: BlockKey) -> None:
        """Keep an object no longer. In its order it counts as used now."""
        share, nbytes = self.share_of(key), self[key]
        self.forget_kept(key, nbytes)
        share.order.insert(key, nbytes)

    def forget_kept(self, key: BlockKey, nbytes: int) -> None:
        """Note that an object is kept no longer; it is in no order."""
        del self.kept[key]
        self.charge_kept(self.share_of(key), -nbytes)

    def dissolve(self, tenant: str) -> None:
        """Have a tenant's objects be common from now on."""
        share, common = self.shares.pop(tenant), self.shares[COMMON]
        for key, nbytes in share.order.items():
            common.order.insert(key, nbytes)
        for key in [key for key, owner in self.owners.items() if owner == tenant]:
            del self.owners[key]
        common.kept_bytes += share.kept_bytes
