"""Text of any length, made of the sentences of a real one, the same for the same seed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvbm_bench._plan import Plan

Message = dict[str, str]

_SENTENCE_ENDS = re.compile(r"(?<=[.!?\"])\s+")


class Sentences:
    """Deals the sentences of a text in an order that depends on a name."""

    def __init__(self, text: str, seed: int) -> None:
        self._sentences = [part for part in _SENTENCE_ENDS.split(text) if part.strip()]
        self._seed = seed

    def passage(self, words: int, name: str) -> str:
        """Return exactly `words` words. No sentence comes again before all have come."""
        taken: list[str] = []
        deal = self._deal(name)
        while len(taken) < words:
            taken += next(deal).split()
        return " ".join(taken[:words])

    def sentence(self, name: str) -> str:
        """Return one sentence."""
        return next(self._deal(name))

    def _deal(self, name: str) -> Iterator[str]:
        # Seeded with a string, the order is the same in every process and on every machine.
        order = random.Random(f"{self._seed} {name}")
        while True:
            yield from order.sample(self._sentences, len(self._sentences))


@dataclass(frozen=True, slots=True)
class Script:
    """What each user says."""

    plan: Plan
    sentences: Sentences
    tokens_per_word: float
    """Of the model, measured."""

    def opening(self, user: int) -> list[Message]:
        """Return what stands before the first question: the system prompt, and this user's history."""
        system = self.sentences.passage(self._words(self.plan.system_tokens), "system")
        history = self.sentences.passage(self._words(self.plan.history_tokens), f"user {user}")
        opening = [{"role": "system", "content": system}] if system else []
        # The user's number comes first: from there on no two prompts are alike.
        return [*opening, {"role": "user", "content": f"User {user} has noted: {history}"}]

    def question(self, user: int, number: int) -> str:
        """Return the question of a round, counted from 1."""
        said = self.sentences.sentence(f"user {user} question {number}")
        return f"Question {number}: what came before this, and what came of it? {said}"

    def longest_tokens(self) -> int:
        """Estimate the length of the last prompt with its answer."""
        plan = self.plan
        words = sum(len(self.question(1, number).split()) + 10 for number in range(1, plan.rounds + 1))
        asked = int(words * self.tokens_per_word)
        return plan.system_tokens + plan.history_tokens + plan.rounds * plan.answer_tokens + asked

    def _words(self, tokens: int) -> int:
        return round(tokens / self.tokens_per_word)
