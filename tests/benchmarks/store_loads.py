"""Loads of prompts for `bench_store_policy.py`: who shares which tokens with whom, and where they part.

A sequence is a list of pieces, `(content, tokens)`. Equal pieces behind equal pieces are equal tokens; a
piece may be cut short, and whoever cuts it goes on with something else. No place is a multiple of anything.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Piece = tuple[int, int]
"""What it says, and how many tokens of it."""

TRACE_BLOCK = 512
"""Tokens of a block in the trace."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt and the answer to it."""

    prompt: tuple[Piece, ...]
    answer: Piece

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for _, tokens in self.prompt)


class Contents:
    """Numbers for what has not been said before, and how long people go on."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._next = itertools.count()

    def piece(self, tokens: float) -> Piece:
        return next(self._next), max(1, round(tokens))

    def about(self, median: float, spread: float, most: float) -> Piece:
        """A piece of log-normal length."""
        return self.piece(min(most, median * self.rng.lognormvariate(0, spread)))


def together(
    talks: list[Iterator[Turn]], rng: random.Random, arrivals: float, pause: float
) -> Iterator[Turn]:
    """Let talks happen side by side: they begin in a span of time, and each waits between its turns."""
    due = [(rng.uniform(0, arrivals), number) for number in range(len(talks))]
    heapq.heapify(due)
    while due:
        time, number = heapq.heappop(due)
        if turn := next(talks[number], None):
            yield turn
            heapq.heappush(due, (time + rng.expovariate(1 / pause), number))


def chat(seed: int, scale: float, *, reasons: bool = False) -> Iterator[Turn]:
    """People talk, each with their own first message behind one of three system prompts."""
    new = Contents(seed)
    systems = [new.piece(new.rng.uniform(400, 1500)) for _ in range(3)]

    def talk() -> Iterator[Turn]:
        said = [new.rng.choice(systems)]
        if new.rng.random() < 0.3:
            said.append(new.about(2500, 0.7, 12_000))  # A document.
        while True:
            said.append(new.about(80, 1.2, 4000))
            if reasons:
                # The thoughts and the three tokens that begin them are not in the history.
                thought, final = new.about(600, 0.8, 6000), new.about(250, 0.8, 2000)
                yield Turn((*said, new.piece(3)), (thought[0], thought[1] + final[1]))
                said.append(final)
            else:
                answer = new.about(250, 0.8, 2000)
                yield Turn(tuple(said), answer)
                said.append(answer)
            if new.rng.random() < 0.2:
                return

    talks = [talk() for _ in range(round(400 * scale))]
    return together(talks, new.rng, arrivals=len(talks) * 10.0, pause=120.0)


def reasoning(seed: int, scale: float) -> Iterator[Turn]:
    """The same with thoughts that are left out of the history, so that it parts from what was computed."""
    return chat(seed, scale, reasons=True)


def shared(seed: int, scale: float) -> Iterator[Turn]:
    """Few long system prompts for many; each request leaves its prompt at some place inside.

    Half do so at a field of the prompt that has one of twenty values, as a date or a name; half anywhere.
    """
    new = Contents(seed)
    templates = []
    for _ in range(8):
        template = new.piece(new.rng.uniform(1000, 12_000))
        field = round(template[1] * new.rng.uniform(0.1, 0.95))
        rests = [new.piece(template[1] - field) for _ in range(20)]
        templates.append((template, field, rests))
    weights = [1 / (rank + 1) for rank in range(len(templates))]
    for _ in range(round(2500 * scale)):
        (content, length), field, rests = new.rng.choices(templates, weights)[0]
        if new.rng.random() < 0.5:
            head = [(content, field), new.rng.choice(rests)]
        else:
            head = [(content, round(length * new.rng.uniform(0.1, 1.0)) or 1), new.about(500, 0.8, 4000)]
        yield Turn((*head, new.about(100, 1.0, 2000)), new.about(200, 0.8, 2000))


def agents(seed: int, scale: float) -> Iterator[Turn]:
    """Agents send their growing context again with each step; some go back, or take old output out of it."""
    new = Contents(seed)
    tools = [new.piece(new.rng.uniform(3000, 9000)) for _ in range(3)]

    def work() -> Iterator[Turn]:
        start = [new.rng.choice(tools), new.about(400, 0.8, 4000)]
        said = list(start)
        for _ in range(new.rng.randint(8, 30)):
            answer = new.about(150, 0.8, 2000)
            yield Turn(tuple(said), answer)
            said += [answer, new.about(500, 1.1, 8000)]
            luck = new.rng.random()
            if luck < 0.06:  # Try again from an earlier step.
                del said[2 + 2 * new.rng.randrange(len(said) // 2 - 1) :]
                said.append(new.about(80, 0.8, 1000))
            elif luck < 0.12:  # An old output is shortened; what follows is computed anew.
                at = new.rng.randrange(1, len(said))
                content, tokens = said[at]
                said[at] = (content, round(tokens * new.rng.random()) or 1)
                said[at + 1 :] = [new.piece(tokens) for _, tokens in said[at + 1 :]]
            if sum(tokens for _, tokens in said) > 60_000:
                said = [*start, new.about(1500, 0.4, 4000)]  # A summary takes its place.

    talks = [work() for _ in range(round(50 * scale))]
    return together(talks, new.rng, arrivals=len(talks) * 30.0, pause=15.0)


def trace(path: Path, seed: int, *, requests: int) -> Iterator[Turn]:
    """The requests of a published trace, which says of each 512 tokens only whether they are the same.

    Where two part inside a block, that is at a random place of it. A prompt that has all whole blocks of an
    earlier one, and is longer than that with its answer, is taken for the next turn of the talk.
    """
    new = Contents(seed)
    where: dict[int, tuple[Piece, ...]] = {}
    """A block to the first prompt that has it."""
    behind: dict[int, Turn] = {}
    """A block to the latest turn that has it and goes on."""
    for line in itertools.islice(path.open(), requests):
        row = json.loads(line)
        ids, length = row["hash_ids"], row["input_length"]
        known = next((at for at, name in enumerate(ids) if name not in where), len(ids))
        same = min(known * TRACE_BLOCK, length)
        said = list(_cut(where[ids[known - 1]], same)) if known else []
        if same < length and known and (sibling := behind.get(ids[known - 1])):
            talked = (*sibling.prompt, sibling.answer)
            total = sum(tokens for _, tokens in talked)
            if sibling.prompt_tokens // TRACE_BLOCK == known and total < length:
                said, same = list(talked), total
            else:
                same += min(new.rng.randrange(TRACE_BLOCK), length - same - 1)
                said = list(_cut(sibling.prompt, same))
                same = sum(tokens for _, tokens in said)
        if same < length:
            said.append(new.piece(length - same))
        turn = Turn(tuple(said), new.piece(row["output_length"]))
        for name in ids:
            where.setdefault(name, turn.prompt)
        behind.update(dict.fromkeys(ids[:-1], turn))
        yield turn


def _cut(pieces: tuple[Piece, ...], length: int) -> Iterator[Piece]:
    """The first tokens of a sequence."""
    for content, tokens in pieces:
        if length <= 0:
            return
        yield content, min(tokens, length)
        length -= tokens


LOADS: dict[str, Callable[[int, float], Iterator[Turn]]] = {
    "chat": chat, "reasoning": reasoning, "shared": shared, "agents": agents
}  # fmt: skip
