"""The load: users who talk, each with a conversation of its own, and ask again when it is time."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from kvbm_bench._client import Client
from kvbm_bench._errors import BenchError
from kvbm_bench._plan import Plan
from kvbm_bench._report import Failure, Request
from kvbm_bench._text import Script, Sentences

TELL_INTERVAL_S = 0.5
LATE_S = 0.1
"""A request that much behind its time counts as late."""
_PROBE_WORDS = (40, 140)


@dataclass(slots=True)
class Load:
    """A run in progress, and what has come of it so far."""

    plan: Plan
    model: str = ""
    """The one that is asked."""
    requests: list[Request] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    running: int = 0
    counted: Counter[str] = field(default_factory=Counter)
    """What the server counted during the run."""


Tell = Callable[[Load], None]
"""Called several times a second while a run goes on."""


async def choose_model(client: Client, wanted: str | None) -> tuple[str, int | None]:
    """Return the model to ask, and the longest prompt it takes.

    Raises:
        BenchError: the server does not have it, or none was named and it has several.
    """
    models = await client.models()
    if wanted is None and len(models) == 1:
        return next(iter(models.items()))
    if wanted is None or wanted not in models:
        named = f"--model {wanted}" if wanted else "--model is missing"
        raise BenchError(f"{named}: the server has {', '.join(models) or 'none'}; write one of these")
    return wanted, models[wanted]


async def write_script(client: Client, load: Load, limit: int | None, text: str) -> Script:
    """Measure how many tokens a word has, and check that the longest conversation fits.

    The two prompts sent for that are what warms the server up.

    Raises:
        BenchError: it does not fit, or the server does not answer as it should.
    """
    plan = load.plan
    sentences = Sentences(text, plan.seed)
    counts = []
    for words in _PROBE_WORDS:
        message = {"role": "user", "content": sentences.passage(words, "probe")}
        _, timing = await client.ask(load.model, [message], max_tokens=8, exact=plan.exact)
        counts.append(timing.prompt_tokens)
    # The difference of two lengths: what the chat template adds falls out.
    tokens_per_word = (counts[1] - counts[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
    if tokens_per_word <= 0:
        raise BenchError(f"the server counted {counts} tokens for prompts of {_PROBE_WORDS} words")
    script = Script(plan, sentences, tokens_per_word)
    if limit is not None and script.longest_tokens() > limit:
        raise BenchError(
            f"--history {plan.history_tokens} --rounds {plan.rounds}: the last prompt would have about "
            f"{script.longest_tokens()} tokens, and the model takes {limit}; write smaller numbers"
        )
    return script


async def run_load(load: Load, client: Client, script: Script, tell: Tell) -> None:
    """Let all users talk until they have finished; `load` is filled as answers come."""
    before = await client.counters()
    start_s = time.monotonic()
    ids = itertools.count(1)
    teller = asyncio.create_task(_keep_telling(load, tell))
    try:
        async with asyncio.TaskGroup() as users:
            for place in range(load.plan.users):
                seat = _Seat(load, client, script, start_s, place)
                users.create_task(seat.occupy(ids))
    finally:
        teller.cancel()
        tell(load)
        load.counted = await client.counters() - before


async def _keep_telling(load: Load, tell: Tell) -> None:
    while True:
        tell(load)
        await asyncio.sleep(TELL_INTERVAL_S)


@dataclass(slots=True)
class _Seat:
    """The place of one user, and of those who come after it."""

    load: Load
    client: Client
    script: Script
    start_s: float
    place: int
    due_s: float = 0.0

    async def occupy(self, ids: itertools.count[int]) -> None:
        plan = self.load.plan
        self.due_s = self.start_s + plan.first_s(self.place)
        await self._converse(next(ids), plan.rounds_of(self.place, first=True))
        while plan.duration_s is not None and not self._over():
            await self._converse(next(ids), plan.rounds_of(self.place, first=False))

    async def _converse(self, user: int, rounds: int) -> None:
        """Ask `rounds` questions, each with all that was said before it."""
        messages = self.script.opening(user)
        for number in range(1, rounds + 1):
            await asyncio.sleep(self.due_s - time.monotonic())
            if self._over():
                return
            question = self.script.question(user, number)
            if number == 1:
                messages[-1]["content"] += f"\n{question}"
            else:
                messages.append({"role": "user", "content": question})
            late = time.monotonic() - self.due_s > LATE_S
            self.due_s = time.monotonic() + self.load.plan.gap_s
            self.load.running += 1
            try:
                text, timing = await self.client.ask(
                    self.load.model, messages, self.load.plan.answer_tokens, exact=self.load.plan.exact
                )
            except BenchError as error:
                # Without its answer the conversation cannot go on; the others do.
                self.load.failures.append(Failure(user, number, str(error)))
                return
            finally:
                self.load.running -= 1
            self.load.requests.append(
                Request(user=user, number=number, late=late, **msgspec.structs.asdict(timing))
            )
            messages.append({"role": "assistant", "content": text})

    def _over(self) -> bool:
        limit_s = self.load.plan.duration_s
        return limit_s is not None and time.monotonic() - self.start_s > limit_s
