"""ARC, the adaptive replacement cache of Megiddo and Modha (FAST 2003), counted in bytes.

    evicted once ◄── once: seen once lately │ often: seen more than once ──► evicted often
       (ghosts)                     target ─┘                                  (ghosts)

A ghost that comes back says which of the two lists was too short; the target moves towards it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence

import kvbm_core as kvbm

__all__ = ["Arc", "ArcConfig", "kvbm_policies"]

_SPARED_AT_ONCE = 64
"""Protected objects passed over in one eviction, beside `_SPARED_EACH` for each victim; the next goes on
behind them."""
_SPARED_EACH = 8


class ArcConfig(kvbm.PolicyConfig, frozen=True):
    """Settings of `Arc`: none."""


class _Keys(OrderedDict[kvbm.BlockKey, int]):
    """Keys and their bytes, the oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def push(self, key: kvbm.BlockKey, nbytes: int) -> None:
        self[key] = nbytes
        self.nbytes += nbytes

    def take(self, key: kvbm.BlockKey) -> int:
        nbytes = self.pop(key)
        self.nbytes -= nbytes
        return nbytes

    def shrink(self, nbytes: int) -> None:
        """Forget the oldest until no more than so many bytes are left."""
        while self and self.nbytes > nbytes:
            self.take(next(iter(self)))


class Arc(kvbm.EvictionPolicy):
    """Balances recency and frequency by itself. A scan passes through without displacing what is used."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._target_bytes = 0.0
        """That objects seen once may take."""
        self._once, self._often = _Keys(), _Keys()
        self._once_gone, self._often_gone = _Keys(), _Keys()

    def __repr__(self) -> str:
        return (
            f"<Arc {self._once.nbytes} bytes once, {self._often.nbytes} often, "
            f"target {self._target_bytes:.0f}; {len(self._once_gone)} and {len(self._often_gone)} ghosts>"
        )

    def insert(self, key: kvbm.BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`. A ghost that comes back moves the target."""
        once, often = self._once_gone, self._often_gone
        if key in once:
            step = nbytes * max(1.0, often.nbytes / once.nbytes)
            self._target_bytes = min(self._capacity_bytes, self._target_bytes + step)
            once.take(key)
            self._often.push(key, nbytes)
        elif key in often:
            step = nbytes * max(1.0, once.nbytes / often.nbytes)
            self._target_bytes = max(0.0, self._target_bytes - step)
            often.take(key)
            self._often.push(key, nbytes)
        else:
            self._once.push(key, nbytes)

    def touch(self, key: kvbm.BlockKey) -> None:
        """See `EvictionPolicy.touch`."""
        origin = self._once if key in self._once else self._often
        self._often.push(key, origin.take(key))

    def remove(self, key: kvbm.BlockKey) -> None:
        """See `EvictionPolicy.remove`. It leaves no ghost: it was not evicted."""
        (self._once if key in self._once else self._often).take(key)

    def evict(self, nbytes: int, protected: Container[kvbm.BlockKey]) -> Sequence[kvbm.BlockKey]:
        """See `EvictionPolicy.evict`."""
        victims: list[kvbm.BlockKey] = []
        spared = _SPARED_AT_ONCE
        # Protected objects go to their list's end, so each is met once.
        left = {id(keys): len(keys) for keys in (self._once, self._often)}
        while nbytes > 0 and spared and any(left.values()):
            # Without an object that may be tried one list has nothing to give.
            first = self._once.nbytes > self._target_bytes or not left[id(self._often)]
            keys = self._once if first and left[id(self._once)] else self._often
            left[id(keys)] -= 1
            key = next(iter(keys))
            if key in protected:
                keys.move_to_end(key)
                spared -= 1
                continue
            freed = keys.take(key)
            (self._once_gone if keys is self._once else self._often_gone).push(key, freed)
            nbytes -= freed
            victims.append(key)
            spared += _SPARED_EACH
        self._forget_ghosts()
        return victims

    def _forget_ghosts(self) -> None:
        """Keep as many bytes of ghosts as ARC does: twice the capacity with the objects themselves."""
        self._once_gone.shrink(max(0, self._capacity_bytes - self._once.nbytes))
        objects = self._once.nbytes + self._often.nbytes
        self._often_gone.shrink(max(0, 2 * self._capacity_bytes - objects - self._once_gone.nbytes))


def _make(config: ArcConfig, context: kvbm.PolicyContext) -> Arc:
    return Arc(context.capacity_bytes)


@kvbm.hookimpl
def kvbm_policies() -> Sequence[kvbm.Policy]:
    """Offer the policy ``arc``."""
    return [kvbm.Policy("arc", ArcConfig, _make, contract_version=2)]
