"""Which blocks of a window or a chunk group are stored: those that a boundary needs where a hit may end.

    tokens       0         R         2R   end of prompt    end of turn
    boundaries             │         │     │                │
    window 24             ├┤        ├┤    ├┤               ├┤    the blocks ahead of each
    chunk R/2              ·         ·    ├┤          ├─────┤    those of its chunk so far

A full group stores all its blocks, and a state is stored whenever the engine hands it over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvbm_core import StackConfig
from kvbm_core.groups import KvGroup

__all__ = ["SparseStores", "prompt_ends", "sparse_stores"]

_EVERY_TOKENS: Final = 2048
_EVERY_WINDOWS: Final = 4
"""Regular boundaries cost at most a quarter of a window group's blocks."""


class SparseStores:
    """Chooses the blocks of sparse groups that are stored. It keeps nothing of a request.

    Args:
        every_tokens: A boundary is kept each so many tokens, beside those that a prompt marks. None: only
            those. Rounded up to the alignment.
        dense: Every block is stored.
    """

    def __init__(self, every_tokens: int | None, *, dense: bool = False) -> None:
        assert every_tokens is None or every_tokens > 0
        self._every_tokens = every_tokens
        self._dense = dense

    def __repr__(self) -> str:
        every = f"every {self._every_tokens} tokens" if self._every_tokens else "at marks alone"
        return f"<SparseStores {'dense' if self._dense else every}>"

    def wanted(
        self, group: KvGroup, first_block: int, stop_block: int, marks: Sequence[int], alignment: int
    ) -> list[int]:
        """List the blocks that are to be stored.

        Args:
            group: Whose blocks they are.
            first_block: The first to be chosen from.
            stop_block: The one after the last to be chosen from.
            marks: Tokens of the prompt where a later prefix may end; each is rounded down to the alignment.
            alignment: Tokens of which each boundary is a multiple.

        Behaviour:
            A boundary behind the blocks to be chosen from counts too: they are part of what it needs.

        Returns:
            Blocks from `first_block` to `stop_block`, in order, each once.
        """
        if self._dense:
            return list(range(first_block, stop_block))
        size, at = group.block_tokens, first_block
        known = at * size
        ends = [end for mark in marks if (end := mark // alignment * alignment) > known]
        if self._every_tokens is not None:
            step = -(-self._every_tokens // alignment) * alignment
            # One that is longer needs none of these blocks, whatever the rule.
            longest = stop_block * size + group.coverage.tokens + step
            ends += range((known // step + 1) * step, longest, step)
        blocks: list[int] = []
        # What a boundary needs neither begins nor ends earlier than what a shorter one does.
        for boundary in sorted(ends):
            start, stop = max(at, group.first_block(boundary)), boundary // size
            if start >= stop_block:
                break
            blocks += range(start, min(stop, stop_block))
            at = max(at, stop)
        return blocks


def sparse_stores(config: StackConfig, groups: Sequence[KvGroup]) -> SparseStores:
    """Make what the configuration asks for, for an engine's groups."""
    every = config.sparse_stores_every_tokens
    if every is None:
        every = max(_EVERY_TOKENS, *(_EVERY_WINDOWS * group.coverage.tokens for group in groups))
    return SparseStores(every or None, dense=config.sparse_stores == "dense")


def prompt_ends(prompt_tokens: int, alignment: int) -> tuple[int, int]:
    """Give the marks at a prompt's end, for `SparseStores.wanted`.

    The same prompt again leaves one token to be computed. The one before is for templates whose last tokens
    are not in the history, like those that begin a thought.
    """
    last = max(0, prompt_tokens - 1)
    return last, max(0, last - alignment)
