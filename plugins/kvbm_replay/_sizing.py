"""How much memory and disk a load is worth, from the hits by size and the machine's speeds.

    hits │           ┌──────── all that was seen before
         │      ┌────┘
         │  ┌───┘   hits(memory): loaded at the link's speed
         │──┘       hits(disk) - hits(memory): loaded at the disk's, if that is faster than to compute
         └───────────────────── size

The disk below has what the memory has, too: all is written through.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import msgspec

from kvbm_replay._curve import Curve
from kvbm_replay._machine import Machine, Speed

__all__ = ["Advice", "Loads", "SizeAnswer", "advise", "grid", "ladder"]

_STEPS_PER_DOUBLING: Final = 4


class SizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What one size is worth."""

    blocks: int
    tokens: int
    nbytes: int
    hit_ratio: float
    """Blocks hit, as a part of those asked for; what the engine's own cache has is not counted."""
    mean_first_token_s: float
    saved_s_per_hour: float
    """Time to first tokens that is saved, of all requests of an hour."""
    next_gib_saves_s_per_hour: float | None = None
    """More of that, for each GiB up to the next size. None for the last."""


class Loads:
    """What hits save.

    Args:
        curve: Hits by size.
        machine: Its speeds.
        block_tokens: Tokens a block.
        tokens: Of all prompts, those that the engine's own cache has left out.
        requests: How many.
        duration_s: In which they came.
    """

    def __init__(
        self, curve: Curve, machine: Machine, block_tokens: int, tokens: int, requests: int, duration_s: float
    ) -> None:
        self.curve = curve
        self._block_tokens = block_tokens
        self.block_bytes = block_tokens * machine.token_bytes
        self._machine = machine
        self._tokens = tokens
        self._requests = max(1, requests)
        self._duration_s = duration_s or 1.0

    def __repr__(self) -> str:
        return f"<Loads of {self._requests} requests over {self.curve!r}>"

    def saves_s(self, speed: Speed) -> float:
        """Give the seconds that a block saves which comes from such a tier; 0 if it is faster to compute."""
        bytes_per_s = min(speed.load_bytes_per_s, self._machine.link_bytes_per_s)
        computing = self._block_tokens / self._machine.prefill_tokens_per_s
        return max(0.0, computing - self.block_bytes / bytes_per_s)

    def saved_s(self, memory: int, memory_speed: Speed, disk: int, disk_speed: Speed) -> float:
        """Give the seconds that so many blocks of memory, and of disk below it, save of all requests."""
        above = self.curve.hits(memory)
        below = max(0.0, self.curve.hits(disk) - above)
        return above * self.saves_s(memory_speed) + below * self.saves_s(disk_speed)

    def answer(self, blocks: int, hits: float, saved_s: float) -> SizeAnswer:
        """Put the numbers of one size in order."""
        computing_s = self._tokens / self._machine.prefill_tokens_per_s
        return SizeAnswer(
            blocks=blocks, tokens=blocks * self._block_tokens, nbytes=blocks * self.block_bytes,
            hit_ratio=hits / max(1, self.curve.accesses),
            mean_first_token_s=(computing_s - saved_s) / self._requests,
            saved_s_per_hour=saved_s / self._duration_s * 3600,
        )  # fmt: skip


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """The cheapest sizes that reach the goal."""

    memory: SizeAnswer
    """What the memory saves alone."""
    disk: SizeAnswer | None
    """What both save. None: a disk is not worth it."""
    reaches: float
    """Of what memory without an end would save."""


def grid(loads: Loads) -> list[int]:
    """Give sizes, in blocks, up to all that is ever hit: powers of two, in whole GiB."""
    largest = max(1, loads.curve.blocks_for(loads.curve.most))
    gib = max(1, (1 << 30) // loads.block_bytes)
    sizes, size = [], gib
    while size < largest:
        sizes.append(size)
        size *= 2
    return [*sizes, max(size, gib)][-12:]


def ladder(
    loads: Loads, sizes: Sequence[int], speed: Speed, *, above: int = 0, above_speed: Speed | None = None
) -> list[SizeAnswer]:
    """Say of each size of a tier what it saves, and what each GiB up to the next size would.

    Args:
        loads: What hits save.
        sizes: In blocks, ascending.
        speed: Of the tier.
        above: Blocks of the memory above it.
        above_speed: Of that.
    """
    answers = []
    for blocks in sizes:
        saved_s = loads.saved_s(above, above_speed or speed, blocks, speed)
        answers.append(loads.answer(blocks, loads.curve.hits(max(above, blocks)), saved_s))
    rates: list[float | None] = [
        (more.saved_s_per_hour - less.saved_s_per_hour) / ((more.nbytes - less.nbytes) / 2**30)
        for less, more in itertools.pairwise(answers)
    ]
    return [
        msgspec.structs.replace(answer, next_gib_saves_s_per_hour=rate)
        for answer, rate in zip(answers, [*rates, None], strict=True)
    ]


def advise(loads: Loads, memory: Speed, disk: Speed, *, goal: float, price: float, least: int = 0) -> Advice:
    """Choose the cheapest memory and disk that save enough.

    Args:
        loads: What hits save.
        memory: Speed of the memory.
        disk: Speed of the disk.
        goal: Part of what memory without an end would save, from 0 to 1.
        price: What a GiB of memory costs, in GiB of disk.
        least: Blocks of memory, if there is any: what is stored on the disk passes through.
    """
    curve = loads.curve
    most_s = curve.most * loads.saves_s(memory)
    largest = max(1, curve.blocks_for(curve.most))
    steps = [0, *(blocks for blocks in _steps(largest) if blocks >= min(least, largest))]
    best: tuple[float, int, int] | None = None
    for blocks in steps:
        above_s = curve.hits(blocks) * loads.saves_s(memory)
        below = blocks
        if above_s < goal * most_s:
            if not loads.saves_s(disk):
                continue
            wanted = curve.hits(blocks) + (goal * most_s - above_s) / loads.saves_s(disk)
            if wanted > curve.most:
                continue
            below = curve.blocks_for(wanted)
        cost = blocks * price + (below if below > blocks else 0)
        if best is None or cost < best[0]:
            best = (cost, blocks, below)
    assert best is not None, "memory for all that is ever hit reaches any goal"
    _, blocks, below = best
    blocks, below = _rounded(blocks), _rounded(below)
    alone = loads.answer(blocks, curve.hits(blocks), curve.hits(blocks) * loads.saves_s(memory))
    saved_s = loads.saved_s(blocks, memory, below, disk)
    both = loads.answer(below, curve.hits(max(blocks, below)), saved_s) if below > blocks else None
    return Advice(memory=alone, disk=both, reaches=saved_s / most_s if most_s else 1.0)


def _rounded(blocks: int) -> int:
    """Round up to a number that people can read: a sixteenth more at most."""
    step = max(1, 1 << max(0, blocks.bit_length() - 5))
    return -(-blocks // step) * step


def _steps(largest: int) -> list[int]:
    """Give sizes to choose from, a few for each doubling."""
    steps, at = {largest}, 0
    while (size := round(2 ** (at / _STEPS_PER_DOUBLING))) < largest:
        steps.add(size)
        at += 1
    return sorted(steps)
