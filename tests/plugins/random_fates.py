"""What becomes of the blocks of a window or a chunk, until they can be stored.

What a step completes can be stored when the outcome of that step is known: by the plan of the first step that
is scheduled then, before anything of it is computed. Until then vLLM may have given the block away.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

STEPS = ("steps one by one", "steps that overlap")
PLACES = ("other blocks", "blocks ahead of a prompt's end")


@dataclass
class Block:
    """A block that a step completes."""

    number: int
    ends_prompt: bool
    """Whether the longest prefix of the prompt that can be found needs it."""
    gone: bool = False
    """Given away since."""


class Fates:
    """Counts blocks of sparse groups that are complete, and those that were given away too early.

    Args:
        mix: The groups.
        scheduler: vLLM's.
        counts: Where to count.
        overlaps: Whether its steps do.
    """

    def __init__(self, mix, scheduler, counts, *, overlaps):
        self.mix, self.scheduler, self.counts = mix, scheduler, counts
        self.steps = STEPS[overlaps]
        self.given: set[int] = set()
        """Since the last step."""
        self.under_way: dict[int, list[Block]] = {}
        """By the step that completes them."""
        self.due: list[Block] = []
        pool = scheduler.kv_cache_manager.block_pool
        take = pool.get_new_blocks

        def note(count):
            blocks = take(count)
            self.given.update(block.block_id for block in blocks)
            return blocks

        pool.get_new_blocks = note

    def scheduled(self, output):
        """Go on to the next step."""
        given, self.given = self.given, set()
        for block in self.due:
            fate = "lost" if block.gone else "given" if block.number in given else "kept"
            self.counts[f"{self.steps}, {PLACES[block.ends_prompt]}, {fate}"] += 1
        self.due = []
        for blocks in self.under_way.values():
            for block in blocks:
                block.gone |= block.number in given

    def executed(self, output, parts):
        """Note which blocks the step completes."""
        self.under_way[id(output)] = blocks = []
        for part in parts:
            prompt = (self.scheduler.requests[part.name].num_prompt_tokens - 1) // self.mix.alignment
            prompt *= self.mix.alignment
            for group, table in zip(self.mix.groups, part.tables, strict=True):
                if group.kind not in ("window", "chunk"):
                    continue
                size, first = group.tokens, group.first_token(prompt)
                for index in range(part.start // size, part.stop // size):
                    ends_prompt = first < (index + 1) * size <= prompt
                    blocks.append(Block(table[index], ends_prompt))

    def ended(self, output):
        """Take in that the outcome of a step has come."""
        self.due += self.under_way.pop(id(output), ())


def tell(counts):
    """Say which share of the blocks was lost, and which is stored by the step that gives it away."""
    for steps, place in itertools.product(STEPS, PLACES):
        lost, given, kept = (counts[f"{steps}, {place}, {fate}"] for fate in ("lost", "given", "kept"))
        if total := lost + given + kept:
            shares = f"{lost / total:.2%} lost, {given / total:.1%} given in the step"
            yield f"{steps}: of {total} {place} {shares}"
