"""One tier's READY objects in several orders: each tenant's own, the common one, and none for those kept.

insert ─► the order of whoever is charged ─► evict: only for itself, see `Partitions.evict`
▲      │ keep
│      ▼
`release`  kept: in no order until their time has come
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass

from kvbm_core.block import BlockKey
from kvbm_core.leader.claims import COMMON
from kvbm_core.policies import Fifo
from kvbm_core.policy import Origin

__all__ = ["Part", "Partitions"]


@dataclass(slots=True)
class Part:
    """What one tenant has in a tier, or all that no tenant is charged for."""

    order: Fifo
    """Of its READY objects that are not kept."""
    quota_bytes: int | None
    """That its objects may take, and that nobody else's load takes from it. None: the common part."""
    keep_bytes: int
    """Of these, kept at most."""
    used_bytes: int = 0
    """By its objects, those on their way in and out among them. Not counted for the common part."""
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
        self.parts = {COMMON: Part(common, None, keep_bytes)}
        self.owners: dict[BlockKey, str] = {}
        """Of the objects that a tenant is charged for, in whatever state."""
        self.kept: dict[BlockKey, float] = {}
        """Objects that must stay, and until when. They are FILLING or READY."""
        self.kept_bytes = 0
        """That they take, of all parts."""
        self.is_told_all = common.is_told_all
        self.making_room_for = COMMON
        self.has_asked = False
        """True if the tenant's policy has let in what `admitted` is asked for."""

    def __repr__(self) -> str:
        return f"<Partitions {len(self)} objects, {len(self.parts) - 1} tenants, {len(self.kept)} kept>"

    def part_of(self, key: BlockKey) -> Part:
        """Give the part that an object is in."""
        return self.parts[self.owners.get(key, COMMON)]

    def insert(self, key: BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`."""
        self[key] = nbytes
        self.nbytes += nbytes
        if key not in self.kept:
            self.part_of(key).order.insert(key, nbytes)

    def touch(self, key: BlockKey) -> None:
        """See `EvictionPolicy.touch`."""
        if key not in self.kept:
            self.part_of(key).order.touch(key)

    def offered(self, keys: Sequence[BlockKey], origin: Origin) -> None:
        """See `EvictionPolicy.offered`. Each part learns of the objects that are charged to its tenant."""
        free = [key for key in keys if key not in self.kept] if self.kept else keys
        for tenant, run in itertools.groupby(free, key=lambda key: self.owners.get(key, COMMON)):
            self.parts[tenant].order.offered(list(run), origin)

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy.remove`. Who is charged remains: the object may be LEAVING."""
        nbytes = self.pop(key)
        self.nbytes -= nbytes
        if key in self.kept:
            self.forget_kept(key, nbytes)
        else:
            self.part_of(key).order.remove(key)

    def next_victims(self, count: int) -> Sequence[BlockKey]:
        """See `EvictionPolicy.next_victims`: of each part as many as it has of all objects."""
        found: list[BlockKey] = []
        for part in self.parts.values():
            share = -(-count * len(part.order) // max(1, len(self)))
            found += part.order.next_victims(share) if share else ()
        return found[:count]

    def admitted(self, keys: list[BlockKey], fitting: int, nbytes: int) -> list[BlockKey]:
        """See `Fifo.admitted`. No policy is asked twice for one object."""
        if self.has_asked:
            return keys
        return self.parts[self.making_room_for].order.admitted(keys, fitting, nbytes)

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
        """Choose objects of one part, and forget them; give each with its bytes."""
        part = self.parts[tenant]
        victims = [(key, self.pop(key)) for key in part.order.evict(nbytes, protected, pinned)]
        freed = sum(size for _, size in victims)
        self.nbytes -= freed
        if tenant != COMMON:
            part.used_bytes -= freed
            for key, _ in victims:
                del self.owners[key]
        return victims

    def keep(self, key: BlockKey, nbytes: int, until_s: float) -> bool:
        """Keep an object that takes so many bytes. False: too many are kept already."""
        part = self.part_of(key)
        if part.kept_bytes + nbytes > part.keep_bytes:
            return False
        if self.kept_bytes + nbytes > self.parts[COMMON].keep_bytes:
            return False
        self.kept[key] = until_s
        self.charge_kept(part, nbytes)
        if key in self:
            part.order.remove(key)
        return True

    def charge_kept(self, part: Part, nbytes: int) -> None:
        """Note that so many bytes more, or fewer, are kept of a part."""
        part.kept_bytes += nbytes
        self.kept_bytes += nbytes

    def release(self, key: BlockKey) -> None:
        """Keep an object no longer. In its order it counts as used now."""
        part, nbytes = self.part_of(key), self[key]
        self.forget_kept(key, nbytes)
        part.order.insert(key, nbytes)

    def forget_kept(self, key: BlockKey, nbytes: int) -> None:
        """Note that an object is kept no longer; it is in no order."""
        del self.kept[key]
        self.charge_kept(self.part_of(key), -nbytes)

    def dissolve(self, tenant: str) -> None:
        """Have a tenant's objects be common from now on."""
        part, common = self.parts.pop(tenant), self.parts[COMMON]
        for key, nbytes in part.order.items():
            common.order.insert(key, nbytes)
        for key in [key for key, owner in self.owners.items() if owner == tenant]:
            del self.owners[key]
        common.kept_bytes += part.kept_bytes
