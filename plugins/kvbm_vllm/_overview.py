"""What an operator wants to know of a stack when it is ready, in five lines of the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvbm_core import StackConfig, TierStatus
from kvbm_core.config import size_text
from kvbm_core.groups import KvGroup, Rule
from kvbm_metrics import labels_of
from kvbm_vllm._values import Handshake

__all__ = ["overview"]

_WAYS: Final = {"device_to_host": "out of the device", "host_to_device": "into it"}


def overview(
    handshakes: Sequence[Handshake], config: StackConfig, groups: Sequence[KvGroup], metrics: str
) -> list[str]:
    """Describe a stack that is ready.

    Args:
        handshakes: Of all ranks.
        config: The stack.
        groups: The KV groups that are stored.
        metrics: Where the metrics are.

    Returns:
        Lines: the tiers in their order, what fits into each, what each had from before, how fast blocks move,
        and the namespace with the place of the metrics.
    """
    ranks = sorted(handshakes, key=lambda each: each.rank)
    tiers = [[handshake.status[number] for handshake in ranks] for number in range(len(ranks[0].status))]
    order = " > ".join(
        "+".join((entry.name, *(codec.name for codec in entry.codecs))) for entry in config.tiers
    )
    return [
        f"KvbmConnector is ready: {order}; {len(ranks)} rank{'s' * (len(ranks) > 1)}",
        f"room: {'; '.join(_room(tier, groups) for tier in tiers)}",
        f"found from before: {'; '.join(_found(tier) for tier in tiers)}",
        f"speed: {_speed(ranks)}",
        f"namespace: {ranks[0].namespace or 'unknown'}{' on rank 0' * (len(ranks) > 1)}; metrics: {metrics}",
    ]


def _room(ranks: Sequence[TierStatus], groups: Sequence[KvGroup]) -> str:
    """Say how much fits into a tier: of all ranks the least decides, as each has its part of a block."""
    capacities = [status.capabilities.capacity_bytes for status in ranks]
    if None in capacities:
        return f"{ranks[0].name} has no limit"
    total = size_text(sum(capacity or 0 for capacity in capacities))
    tokens = min(_tokens(status, groups) for status in ranks)
    if not tokens:
        return f"{ranks[0].name} {total}"
    beside = " and what windows and states need beside them" * any(
        group.coverage.rule is not Rule.ALL for group in groups
    )
    return f"{ranks[0].name} {total}, {tokens:,} tokens{beside}"


def _tokens(status: TierStatus, groups: Sequence[KvGroup]) -> int:
    """Say how many tokens fit into a rank's share, by the groups that keep all; 0 if there is none."""
    capacity = status.capabilities.capacity_bytes or 0
    whole = [
        (charge, group.block_tokens)
        for charge, group in zip(status.charges, groups, strict=False)
        if group.coverage.rule is Rule.ALL
    ]
    bytes_a_token = sum(charge / block_tokens for charge, block_tokens in whole)
    return int(capacity / bytes_a_token) if bytes_a_token else 0


def _found(ranks: Sequence[TierStatus]) -> str:
    """Say what a tier had when it was opened."""
    first = ranks[0]
    if first.capabilities.remote_lookup:
        return f"{first.name} is asked when a prompt comes"
    objects = sum(len(status.inventory) for status in ranks)
    if not objects:
        return f"{first.name} nothing"
    held = sum(nbytes for status in ranks for _, nbytes in status.inventory)
    return f"{first.name} {objects:,} objects, {size_text(held)}"


def _speed(ranks: Sequence[Handshake]) -> str:
    """Say what the slowest rank's device was measured to copy; tiers are measured as they serve."""
    least: dict[str, tuple[int, str]] = {}
    for handshake in ranks:
        for key, bytes_per_s in handshake.constants.items():
            _, (method, direction, chosen) = labels_of(key)
            if chosen == "yes":
                least[direction] = min(least.get(direction, (bytes_per_s, method)), (bytes_per_s, method))
    measured = ", ".join(
        f"{least[way][0] / 1e9:.1f} GB/s {words} ({least[way][1]})"
        for way, words in _WAYS.items()
        if way in least
    )
    return "; ".join(filter(None, (measured, "tiers are measured as they load")))
