"""Measures several policies at once, each in a shadow cache of its own, and follows the best.

    every use ──► all policies know all objects ──► the leader alone is asked what to evict
         └─ of 1 key in n ──► shadow caches: one for each policy ──► hit ratios ──► the leader

A shadow cache has no bytes, only keys: one in n of all, and a room n times smaller, so that it misses as the
whole tier would (Waldspurger et al., ATC 2017).
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from kvbm_arc import Arc

import kvbm_core as kvbm

__all__ = ["Chooser", "ChooserConfig", "kvbm_policies"]

_LEAST_SHADOW = 256
"""Objects of the usual length that a shadow cache has room for, at least, where the tier has it."""
_MOST_SAMPLED = 64
"""One key in so many is sampled, at most."""


class ChooserConfig(kvbm.PolicyConfig, frozen=True):
    """Settings of a `Chooser`.

    Raises:
        ConfigError: If a value is out of range.
    """

    window: int = 1024
    """Sampled uses between two decisions, at least 1. Older ones count half as much each time."""
    margin: float = 0.02
    """By how much another's hit ratio must be above the leader's, 0 to 1."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise kvbm.ConfigError(f"window: {self.window!r}; write 1 or more, like 1024")
        if not 0 <= self.margin <= 1:
            raise kvbm.ConfigError(f"margin: {self.margin!r}; write a number from 0 to 1, like 0.02")


def _candidates(capacity_bytes: int) -> dict[str, kvbm.EvictionPolicy]:
    return {"lru": kvbm.Lru(), "fifo": kvbm.Fifo(), "arc": Arc(capacity_bytes)}


class _Shadow:
    """What a small cache would hold under one policy."""

    def __init__(self, policy: kvbm.EvictionPolicy, capacity_bytes: int) -> None:
        self._policy = policy
        self._capacity_bytes = capacity_bytes
        self._keys: dict[kvbm.BlockKey, int] = {}
        self._used_bytes = 0
        self.hits = 0.0

    def use(self, key: kvbm.BlockKey, nbytes: int) -> None:
        """Ask for an object, and store it if it is not there."""
        if key in self._keys:
            self._policy.touch(key)
            self.hits += 1
            return
        excess = self._used_bytes + nbytes - self._capacity_bytes
        if excess > 0:
            for gone in self._policy.evict(excess, ()):
                self._used_bytes -= self._keys.pop(gone)
        self._policy.insert(key, nbytes)
        self._keys[key] = nbytes
        self._used_bytes += nbytes


class Chooser(kvbm.EvictionPolicy):
    """Every candidate knows all objects, so that another can lead at once."""

    def __init__(self, config: ChooserConfig, context: kvbm.PolicyContext) -> None:
        self._config = config
        room = context.capacity_bytes // context.usual_bytes
        self._one_in = max(1, min(_MOST_SAMPLED, room // _LEAST_SHADOW))
        self._policies = _candidates(context.capacity_bytes)
        shadow_bytes = context.capacity_bytes // self._one_in
        self._shadows = {
            name: _Shadow(policy, shadow_bytes) for name, policy in _candidates(shadow_bytes).items()
        }
        self._sizes: dict[kvbm.BlockKey, int] = {}
        self._uses = 0.0
        self._until_decision = config.window
        self.leader = "lru"
        """The candidate that is followed."""

    def __repr__(self) -> str:
        ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in self.hit_ratios.items())
        return f"<Chooser {self.leader}, of {ratios}; 1 key in {self._one_in}>"

    @property
    def hit_ratios(self) -> dict[str, float]:
        """Of each candidate's shadow cache, the latest uses counting most."""
        return {name: shadow.hits / max(1.0, self._uses) for name, shadow in self._shadows.items()}

    def insert(self, key: kvbm.BlockKey, nbytes: int) -> None:
        """See `EvictionPolicy.insert`."""
        self._sizes[key] = nbytes
        for policy in self._policies.values():
            policy.insert(key, nbytes)
        self._sample(key, nbytes)

    def touch(self, key: kvbm.BlockKey) -> None:
        """See `EvictionPolicy.touch`."""
        for policy in self._policies.values():
            policy.touch(key)
        self._sample(key, self._sizes[key])

    def remove(self, key: kvbm.BlockKey) -> None:
        """See `EvictionPolicy.remove`."""
        del self._sizes[key]
        for policy in self._policies.values():
            policy.remove(key)

    def evict(self, nbytes: int, protected: Container[kvbm.BlockKey]) -> Sequence[kvbm.BlockKey]:
        """See `EvictionPolicy.evict`. The leader chooses; the others forget what it has chosen."""
        leader = self._policies[self.leader]
        victims = leader.evict(nbytes, protected)
        for key in victims:
            del self._sizes[key]
            for policy in self._policies.values():
                if policy is not leader:
                    policy.remove(key)
        return victims

    def _sample(self, key: kvbm.BlockKey, nbytes: int) -> None:
        """Let the shadow caches see one key in n: a key is a digest, so its first bytes are chance."""
        if int.from_bytes(key[:4], "little") % self._one_in:
            return
        for shadow in self._shadows.values():
            shadow.use(key, nbytes)
        self._uses += 1
        self._until_decision -= 1
        if not self._until_decision:
            self._decide()

    def _decide(self) -> None:
        ratios = self.hit_ratios
        best = max(ratios, key=ratios.__getitem__)
        if ratios[best] > ratios[self.leader] + self._config.margin:
            self.leader = best
        self._until_decision = self._config.window
        self._uses /= 2
        for shadow in self._shadows.values():
            shadow.hits /= 2


@kvbm.hookimpl
def kvbm_policies() -> Sequence[kvbm.Policy]:
    """Offer the policy ``chooser``."""
    return [kvbm.Policy("chooser", ChooserConfig, Chooser, contract_version=2)]
