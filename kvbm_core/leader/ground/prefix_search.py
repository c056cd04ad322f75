"""What is known of a tier that cannot list its blocks: which are absent, and what is being asked.

Whoever stored a block stored those before it too, so a prefix is searched, not listed:

    span    k0 k1 k2 ... (consecutive blocks of one prompt that nobody here knows)
    probes  k0       k8       k16       k24      at most `max_probes`, evenly spread
    answer  there    there    missing   missing  k0 to k8 are taken as there; next span: k9 to k15

Windows and states of a prefix may be there without those before them: of these each is asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.tier import Reason

__all__ = ["PrefixSearch"]


class PrefixSearch:
    """Chooses what to ask a tier, and remembers what it has not. No I/O, no clock."""

    max_probes: Final = 64
    """Blocks asked for at once."""
    absent_s: Final = 5.0
    """An answer "not there" counts for so long: another engine may store the block at any time."""
    max_absent: Final = 1 << 16
    """Such answers remembered."""

    def __init__(self) -> None:
        self._absent: OrderedDict[BlockKey, float] = OrderedDict()
        self._spans: dict[int, Sequence[BlockKey]] = {}
        self._heads: dict[BlockKey, int] = {}
        self._singles: dict[BlockKey, int] = {}
        """Objects asked for one by one, and the operation that does."""

    def __repr__(self) -> str:
        return f"<PrefixSearch {len(self._spans)} asked, {len(self._absent)} absent>"

    def asking(self, key: BlockKey) -> int | None:
        """Give the operation that asks about a block and those after it. None: no answer is on its way."""
        return self._heads.get(key)

    def absent_until_s(self, key: BlockKey) -> float:
        """Give the time until which an answer "not there" counts for a block; 0 if there is none."""
        return self._absent.get(key, 0.0)

    def span(self, keys: Sequence[BlockKey], now_s: float) -> Sequence[BlockKey]:
        """Give the leading blocks of which nothing is known."""
        for at, key in enumerate(keys):
            if self._absent.get(key, 0.0) > now_s:
                return keys[:at]
        return keys

    def ask(self, op: int, span: Sequence[BlockKey]) -> list[BlockKey]:
        """Note that operation `op` asks about a span, and choose the blocks it asks for."""
        self._spans[op] = span
        self._heads[span[0]] = op
        return list(span[:: self._step(span)])

    def unknown(self, keys: Sequence[BlockKey], now_s: float) -> list[BlockKey]:
        """Give the objects of which nothing is known, and for which no answer is on its way."""
        return [k for k in keys if self._absent.get(k, 0.0) <= now_s and k not in self._singles]

    def asking_each(self, keys: Sequence[BlockKey]) -> set[int]:
        """Give the operations that ask for single objects among these."""
        return {self._singles[key] for key in keys if key in self._singles}

    def ask_each(self, op: int, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Note that operation `op` asks for single objects, of which each may be there without the others."""
        self._spans[op] = keys
        self._singles.update(dict.fromkeys(keys, op))
        return list(keys)

    def answer(self, op: int, failures: Mapping[int, Reason], now_s: float) -> Sequence[BlockKey]:
        """Take in the answer to operation `op`.

        Args:
            op: As given to `ask`.
            failures: Position among the blocks asked for, to why it is not there.
            now_s: The time, in seconds.

        Returns:
            The leading blocks of the span that are there; of single objects those that are.
        """
        span = self._spans.pop(op)
        if self._singles.pop(span[0], None) == op:
            for key in span[1:]:
                self._singles.pop(key, None)
            for at in failures:
                self.miss(span[at], now_s)
            return [key for at, key in enumerate(span) if at not in failures]
        self._heads.pop(span[0], None)
        step = self._step(span)
        for at in failures:
            self.miss(span[at * step], now_s)
        probes = -(-len(span) // step)
        found = min(failures, default=probes)
        return span[: (found - 1) * step + 1] if found else ()

    def miss(self, key: BlockKey, now_s: float) -> None:
        """Note that a block is not there, or cannot be remembered."""
        self._absent[key] = now_s + self.absent_s
        self._absent.move_to_end(key)
        if len(self._absent) > self.max_absent:
            self._absent.popitem(last=False)

    def _step(self, span: Sequence[BlockKey]) -> int:
        return -(-len(span) // self.max_probes)
