"""What the leader knows of one tier: the state, the pins, the order and the room of its objects.

    ABSENT ─reserve─► FILLING ─stored─► READY ─doom─► LEAVING
      ▲                  │ not_stored     │ evict        │ released
      └──────────────────┴────────────────┴──────────────┘

READY objects stand in the policy's order; those with a pin are protected from eviction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Final

from kvbm_core.block import BlockEvent, BlockKey, BlockState, next_state
from kvbm_core.policies import Fifo
from kvbm_core.policy import Origin

__all__ = ["LatestKeys", "TierIndex"]

_EXACT_CHARGES: Final = 4096
"""Different charges that are counted as they are, each kept once: a number of its own takes 32 bytes an
object. Of those beyond, the leading digits count, rounded up: 1/2048 more at most."""
_LEADING_BITS: Final = 12


class LatestKeys:
    """The latest objects that have ceased to be READY, or that have become it, over all tiers.

    A match that was found before remains true as long as none of its objects is among them.
    """

    max_remembered: Final = 1024

    def __init__(self) -> None:
        self.count = 0
        """All so far."""
        self._latest: deque[BlockKey] = deque(maxlen=self.max_remembered)

    def __repr__(self) -> str:
        return f"<LatestKeys {self.count}>"

    def note(self, keys: Sequence[BlockKey]) -> None:
        """Add objects."""
        self.count += len(keys)
        self._latest.extend(keys)

    def any_since(self, count: int, family: Container[BlockKey]) -> bool:
        """Return False if no object of a family was noted since `count`; True if one may have been."""
        news = self.count - count
        if not news:
            return False
        if news > len(self._latest):
            return True
        return any(self._latest[-at] in family for at in range(1, news + 1))


class TierIndex:
    """The objects of one tier, by key. No I/O, no bytes, no clock.

    A move along an edge that `kvbm_core.block.TRANSITIONS` has not raises `TransitionError`: for `found`,
    `stored`, `not_stored` and `unpin`. `reserve`, `pin` and `drop` choose among the objects whose state
    allows the move, and return which they are.

    Args:
        capacity_bytes: Bytes that its objects may take. None: no limit.
        order: The policy, empty: it knows each READY object and the bytes that it takes.
        departures: Where objects are noted that cease to be READY.
        arrivals: Where objects are noted that become READY. None: nowhere.
    """

    def __init__(
        self,
        capacity_bytes: int | None,
        order: Fifo,
        departures: LatestKeys | None = None,
        arrivals: LatestKeys | None = None,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.ready: Container[BlockKey] = order
        """The READY objects, for loops that ask thousands of times."""
        self._departures = departures or LatestKeys()
        self._arrivals = arrivals
        self.eviction_rounds = 1
        """How often the policy is asked for one reservation: a round stops at 64 objects that must stay."""
        self._order = order
        self._pins: dict[BlockKey, int] = {}
        self._filling: dict[BlockKey, int] = {}
        """The bytes reserved for each."""
        self._leaving: dict[BlockKey, int] = {}
        """The bytes that each takes."""
        self._other_bytes = 0
        """Of both."""
        self._charges: dict[int, int] = {}
        """The different ones, each to itself."""

    def __repr__(self) -> str:
        return (
            f"<TierIndex {self.used_bytes}/{self.capacity_bytes} bytes: {len(self._order)} ready, "
            f"{len(self._pins)} pinned, {len(self._filling)} filling, {len(self._leaving)} leaving>"
        )

    @property
    def used_bytes(self) -> int:
        """Bytes that all objects take, those on their way in and out among them."""
        return self._order.nbytes + self._other_bytes

    @property
    def ready_count(self) -> int:
        """Objects that are READY."""
        return len(self._order)

    def __len__(self) -> int:
        return len(self._order) + len(self._filling) + len(self._leaving)

    def __contains__(self, key: object) -> bool:
        """Say whether an object is READY."""
        return key in self._order

    def __iter__(self) -> Iterator[BlockKey]:
        """List the READY objects."""
        return iter(self._order)

    def state(self, key: BlockKey) -> BlockState:
        """Say where an object stands."""
        if key in self._order:
            return BlockState.READY
        if key in self._filling:
            return BlockState.FILLING
        return BlockState.LEAVING if key in self._leaving else BlockState.ABSENT

    def found(self, key: BlockKey, charge: int) -> None:
        """Take in an object that the tier had when it was opened, and the bytes that it takes."""
        self._move(key, BlockEvent.RESERVE)
        self._order.insert(key, self.counted(charge))

    def absent(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Give the keys that are ABSENT, each once."""
        # `state`, written out: a lookup asks thousands of times.
        order, filling, leaving = self._order, self._filling, self._leaving
        absent = [key for key in keys if not (key in order or key in filling or key in leaving)]
        return absent if len(absent) < 2 else list(dict.fromkeys(absent))

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Note that objects were used, those that are READY."""
        order = self._order
        for key in keys:
            if key in order:
                order.touch(key)

    def offered(self, keys: Sequence[BlockKey], origin: Origin, *, has_some: bool) -> None:
        """Note that a request has these blocks; `has_some` says that not all of them are ABSENT."""
        if has_some or self._order.is_told_all:
            self._order.offered(keys, origin)

    def pin(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """Keep READY objects from being evicted until `unpin`; return those that are not READY."""
        order, pins, gone = self._order, self._pins, []
        for key in keys:
            if key in order:
                pins[key] = pins.get(key, 0) + 1
            else:
                gone.append(key)
        return gone

    def next_victims(self, count: int) -> Sequence[BlockKey]:
        """Guess so many READY objects at most that are evicted next, those with a pin among them."""
        return self._order.next_victims(count)

    def is_pinned(self, key: BlockKey) -> bool:
        """Return True if an object may not be evicted now."""
        return key in self._pins

    def is_kept(self, key: BlockKey) -> bool:
        """Return True if an object makes no room for just anybody. Here all do, see `PartitionedIndex`."""
        return False

    def unpin(self, keys: Iterable[BlockKey], *, was_used: bool = True) -> list[BlockKey]:
        """Take one pin of each object back; return those that were LEAVING and are gone with it.

        `was_used`: they count as used now, as after a load.
        """
        pins, leaving, touch = self._pins, self._leaving, self._order.touch
        gone: list[BlockKey] = []
        for key in keys:
            left = pins.get(key, 0) - 1
            if left > 0:
                pins[key] = left
                continue
            if left < 0 or key in leaving:
                self._move(key, BlockEvent.RELEASED)
                self._other_bytes -= leaving.pop(key)
                gone.append(key)
            elif was_used:
                touch(key)
            del pins[key]
        return gone

    def reserve(
        self,
        keys: Sequence[BlockKey],
        charge: int,
        protected: Container[BlockKey] = (),
        *,
        are_absent: bool = False,
    ) -> tuple[list[BlockKey], list[BlockKey]]:
        """Set room aside for objects about to be stored, evicting where needed.

        Args:
            keys: In the order of their prefix.
            charge: The bytes that each takes at most.
            protected: The objects of the same prefix, which are not evicted for `keys`: a prefix without
                its head is worth nothing. Asked for each candidate, so it should answer at once.
            are_absent: All of them are ABSENT, each is named once.

        Returns:
            The keys that are FILLING now: a leading part of those that were ABSENT; and the keys
            evicted for them.
        """
        wanted = list(keys) if are_absent else self.absent(keys)
        evicted: list[BlockKey] = []
        if self.capacity_bytes is not None and charge:
            order, room_bytes = self._order, self.capacity_bytes - self._other_bytes
            if order.nbytes + len(wanted) * charge > room_bytes:
                wanted = order.admitted(wanted, (room_bytes - order.nbytes) // charge, charge)
                for _ in range(self.eviction_rounds):
                    if (excess_bytes := order.nbytes + len(wanted) * charge - room_bytes) <= 0:
                        break
                    evicted += order.evict(excess_bytes, protected, self._pins)
                self._departures.note(evicted)
                del wanted[max(0, room_bytes - order.nbytes) // charge :]
        self._filling.update(dict.fromkeys(wanted, charge))
        self._other_bytes += len(wanted) * charge
        return wanted, evicted

    def stored(self, keys: Sequence[BlockKey], charges: Sequence[int] | None = None) -> None:
        """Note that every rank has objects, and the bytes that each takes. None: as many as reserved.

        The last of them comes in last: as a rule the head of a prefix, which goes last.
        """
        filling = self._filling
        for key in keys:
            if key not in filling:
                self._move(key, BlockEvent.STORED)
        sizes = {key: filling.pop(key) for key in keys}
        self._other_bytes -= sum(sizes.values())
        for key, charge in zip(keys, charges or (), strict=bool(charges)):
            if charge != sizes[key]:  # Rounded, but never for that above what was reserved.
                sizes[key] = max(min(self.counted(charge), sizes[key]), charge)
        self._order.insert_each(sizes)
        if self._arrivals is not None:
            self._arrivals.note(keys)

    def not_stored(self, key: BlockKey) -> None:
        """Note that some rank has the object not."""
        self._move(key, BlockEvent.NOT_STORED)
        self._other_bytes -= self._filling.pop(key)

    def drop(self, key: BlockKey) -> bool:
        """Forget a READY object: at once, or with its last pin. True if at once. Others stay as they are."""
        self._departures.note([key])
        if key not in self._order:
            return False
        if key in self._pins:
            self._move(key, BlockEvent.DOOM)
            self._leaving[key] = self._order[key]
            self._other_bytes += self._order[key]
        self._order.remove(key)
        return key not in self._pins

    def counted(self, charge: int) -> int:
        """Give the number that a charge is counted as: the same object each time, and few of them."""
        if len(self._charges) >= _EXACT_CHARGES and charge not in self._charges:
            unit = 1 << max(0, charge.bit_length() - _LEADING_BITS)
            charge = -(-charge // unit) * unit
        return self._charges.setdefault(charge, charge)

    def _move(self, key: BlockKey, event: BlockEvent) -> None:
        """Check that the table has this edge."""
        next_state(self.state(key), event)
