"""What the suite of policies is written with: an oracle around a policy, and keys that count."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from typing import Any, Final

from kvbm_core.block import BlockKey
from kvbm_core.policy import EvictionPolicy

__all__ = ["MANY", "USUAL_BYTES", "Calls", "Cost", "PolicyOracle", "block_key", "counting"]

USUAL_BYTES: Final = 1000
"""That an object takes at most."""
MANY: Final = 4000
"""Objects that a policy knows when its calls are counted."""


def block_key(number: int) -> BlockKey:
    """Make a key; each call makes an object of its own, as each request does."""
    return hashlib.sha256(f"policy {number}".encode()).digest()


class _Counted(Container[BlockKey]):
    """Protected objects that know how often each was asked for."""

    def __init__(self, keys: Container[BlockKey]) -> None:
        self._keys = keys
        self.asked: dict[object, int] = {}

    def __contains__(self, key: object) -> bool:
        self.asked[key] = self.asked.get(key, 0) + 1
        return key in self._keys


class PolicyOracle(EvictionPolicy):
    """Passes every call on to a policy, and insists that its answers keep the contract.

    Args:
        policy: It knows nothing yet.

    Raises:
        AssertionError: By `evict` and `admits`, with what is wrong with the answer.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self.known: dict[BlockKey, int] = {}
        """The objects that the policy knows, and the bytes that each takes."""

    def __repr__(self) -> str:
        return f"<PolicyOracle {len(self.known)} objects, {self.nbytes} bytes: {self._policy!r}>"

    @property
    def nbytes(self) -> int:
        """The bytes that all known objects take."""
        return sum(self.known.values())

    def insert(self, key: BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`."""
        self.known[key] = nbytes
        self._policy.insert(key, nbytes)

    def touch(self, key: BlockKey) -> None:
        """See `EvictionPolicy.touch`."""
        self._policy.touch(key)

    def remove(self, key: BlockKey) -> None:
        """See `EvictionPolicy.remove`."""
        del self.known[key]
        self._policy.remove(key)

    def evict(self, nbytes: int, protected: Container[BlockKey]) -> Sequence[BlockKey]:
        """See `EvictionPolicy.evict`."""
        counted = _Counted(protected)
        victims = self._policy.evict(nbytes, counted)
        strange = [key for key in victims if key not in self.known]
        assert not strange, f"evict() named {len(strange)} objects that the tier has not"
        assert len(set(victims)) == len(victims), "evict() named an object twice"
        kept = [key for key in victims if key in protected]
        assert not kept, f"evict() named {len(kept)} protected objects"
        often = max(counted.asked.values(), default=0)
        assert often <= 1, f"evict() asked {often} times whether an object is protected; once is enough"
        spared = any(key in protected for key in self.known)
        sizes = [self.known.pop(key) for key in victims]
        assert sum(sizes[:-1]) < nbytes, (
            f"evict({nbytes}) named {len(sizes)} objects of {sum(sizes)} bytes; the last is not needed"
        )
        assert spared or not self.known or sum(sizes) >= nbytes, (
            f"evict({nbytes}) freed {sum(sizes)} bytes, though none of {len(self.known)} more is protected"
        )
        return victims

    def admits(self, key: BlockKey, nbytes: int) -> bool:
        """See `EvictionPolicy.admits`."""
        answer = self._policy.admits(key, nbytes)
        assert isinstance(answer, bool), f"admits() gave {answer!r}, it must be True or False"
        return answer


class Cost:
    """Counts how often keys are compared or hashed."""

    count = 0


class Key(bytes):
    """A key that counts."""

    cost: Cost

    def __hash__(self) -> int:
        self.cost.count += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        self.cost.count += 1
        return super().__eq__(other)

    def __lt__(self, other: Any) -> bool:
        self.cost.count += 1
        return super().__lt__(other)


def counting(cost: Cost, number: int) -> Key:
    made = Key(block_key(number))
    made.cost = cost
    return made


class Calls:
    """Makes calls on a policy that knows many objects, and counts what each costs."""

    def __init__(self, policy: EvictionPolicy, cost: Cost, keys: list[Key]) -> None:
        self._policy = policy
        self._cost = cost
        self._keys = keys

    def cost_of(self, name: str) -> float:
        """Make a call fifty times; give the mean number of comparisons."""
        before, fifty = self._cost.count, range(MANY // 2, MANY // 2 + 50)
        for number in fifty:
            if name == "evict":
                self._policy.evict(USUAL_BYTES, ())
            elif name == "insert":  # What `remove` has taken away.
                self._policy.insert(self._keys[number], USUAL_BYTES)
            elif name == "admits":
                self._policy.admits(self._keys[MANY + number], USUAL_BYTES)
            else:
                getattr(self._policy, name)(self._keys[number])
        return (self._cost.count - before) / len(fifty)
