"""Loads from a seed: the same description gives the same requests on every machine.

    chat:seed=1,requests=5000                one load
    chat:seed=1+scan:seed=2,per_s=0.5        two side by side; none of their blocks are equal

| name | what it is like |
|---|---|
| `zipf` | questions about documents, a few of which are asked about most of the time |
| `loop` | the same documents in the same order, again and again |
| `scan` | `zipf`, and now and then a batch of prompts that never come back |
| `phases` | `zipf`, and now and then most of the documents are replaced by others |
| `chat` | conversations: each prompt is the one before, its answer, and a new question |
| `agents` | long contexts that grow by tool calls, pause, fork into helpers and return |
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

import msgspec

from kvbm_core.config import convert
from kvbm_core.errors import ConfigError
from kvbm_replay.trace import Request, Trace, merge

__all__ = ["LOADS", "generate"]

_MAX_TOKENS: Final = 131_072
"""Of a prompt: the context of many models."""


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every load has."""

    seed: int = 0
    requests: int = 2000
    """How many requests; at least 1."""
    per_s: float = 3.0
    """Requests a second, on average; above 0."""
    block_tokens: int = 512
    """Tokens a block; at least 1."""

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if field in _SHARES and not 0 <= value <= 1:
                raise ConfigError(f"{field}: {value!r}; write a part, from 0 to 1")
            if field in ("seed", "exponent", *_SHARES):
                continue
            if not 0 < value < math.inf:
                raise ConfigError(f"{field}: {value!r}; write a number above 0")

    def arrivals(self, rng: random.Random, per_s: float) -> Iterator[float]:
        """Give times of independent arrivals."""
        now_s = 0.0
        while True:
            now_s += rng.expovariate(per_s)
            yield now_s


_SHARES: Final = ("replaced", "fork", "long_pause", "shared")


class Text:
    """Tokens of which only the number and the blocks are known.

    Two texts have equal blocks where one was forked from the other, as far as they had filled them then.
    """

    __slots__ = ("_numbers", "_size", "blocks", "tokens")

    def __init__(self, size: int, numbers: Iterator[int]) -> None:
        self._size, self._numbers = size, numbers
        self.blocks: list[int] = []
        self.tokens = 0

    def extend(self, tokens: int) -> Text:
        """Append tokens that no other text has there."""
        self.tokens += min(tokens, _MAX_TOKENS - self.tokens)
        missing = self.tokens // self._size - len(self.blocks)
        self.blocks += itertools.islice(self._numbers, missing)
        return self

    def fork(self) -> Text:
        """Begin another text with the same tokens."""
        other = Text(self._size, self._numbers)
        other.blocks, other.tokens = list(self.blocks), self.tokens
        return other

    @property
    def is_full(self) -> bool:
        """True if no context has room for more."""
        return self.tokens >= _MAX_TOKENS


def _about(rng: random.Random, tokens: int) -> int:
    """Draw a length: half are shorter than `tokens`, a twentieth longer than three times that."""
    return max(1, round(tokens * rng.lognormvariate(0, 0.67)))


class Zipf(Load, frozen=True):
    """Questions about documents; that at rank n is asked about in proportion to ``n ** -exponent``."""

    documents: int = 400
    exponent: float = 0.9
    document_tokens: int = 12_000
    question_tokens: int = 400
    answer_tokens: int = 300

    def texts(self, rng: random.Random) -> Iterator[tuple[float, Text, int]]:
        """See `_Source.texts`."""
        numbers = itertools.count()
        documents, weights = self.library(rng, numbers), self.weights()
        for at_s in self.arrivals(rng, self.per_s):
            yield self.question(rng, at_s, rng.choices(documents, cum_weights=weights)[0])

    def library(self, rng: random.Random, numbers: Iterator[int]) -> list[Text]:
        """Make the documents."""
        return [self.document(rng, numbers) for _ in range(self.documents)]

    def document(self, rng: random.Random, numbers: Iterator[int]) -> Text:
        """Make one document."""
        return Text(self.block_tokens, numbers).extend(_about(rng, self.document_tokens))

    def question(self, rng: random.Random, at_s: float, document: Text) -> tuple[float, Text, int]:
        """Ask about a document."""
        prompt = document.fork().extend(_about(rng, self.question_tokens))
        return at_s, prompt, _about(rng, self.answer_tokens)

    def weights(self) -> list[float]:
        """Give the cumulative weights of the documents."""
        return _cumulative(self.documents, self.exponent)


class Loop(Zipf, frozen=True):
    """The same documents in the same order: where they do not all fit, LRU keeps the wrong ones."""

    def texts(self, rng: random.Random) -> Iterator[tuple[float, Text, int]]:
        """See `_Source.texts`."""
        documents = itertools.cycle(self.library(rng, itertools.count()))
        for at_s, document in zip(self.arrivals(rng, self.per_s), documents, strict=False):
            yield self.question(rng, at_s, document)


class Scan(Zipf, frozen=True):
    """Zipf, and after every `every` requests a batch of `batch` documents that never come back."""

    every: int = 200
    batch: int = 100

    def texts(self, rng: random.Random) -> Iterator[tuple[float, Text, int]]:
        """See `_Source.texts`."""
        numbers = itertools.count()
        documents, weights = self.library(rng, numbers), self.weights()
        for at, at_s in enumerate(self.arrivals(rng, self.per_s)):
            if at % (self.every + self.batch) >= self.every:
                yield self.question(rng, at_s, self.document(rng, numbers))
            else:
                yield self.question(rng, at_s, rng.choices(documents, cum_weights=weights)[0])


class Phases(Zipf, frozen=True):
    """Zipf; after every `every` requests a part of the documents is replaced, and all change their ranks."""

    every: int = 500
    replaced: float = 0.8
    """The part of the documents that is replaced."""

    def texts(self, rng: random.Random) -> Iterator[tuple[float, Text, int]]:
        """See `_Source.texts`."""
        numbers = itertools.count()
        documents, weights = self.library(rng, numbers), self.weights()
        for at, at_s in enumerate(self.arrivals(rng, self.per_s)):
            if at and at % self.every == 0:
                rng.shuffle(documents)
                for place in range(round(self.replaced * self.documents)):
                    documents[place] = self.document(rng, numbers)
                rng.shuffle(documents)
            yield self.question(rng, at_s, rng.choices(documents, cum_weights=weights)[0])


class Chat(Load, frozen=True):
    """Conversations, which begin independently; each prompt has all that was said before."""

    turns: float = 4.0
    """Questions of a conversation, on average; at least 1. Many have one, few have many."""
    systems: int = 5
    """System prompts that conversations share, the first the most often."""
    system_tokens: int = 1500
    shared: float = 0.7
    """The part of the conversations that begin with a system prompt."""
    first_tokens: int = 4000
    """Of a first question, with the documents that come with it."""
    question_tokens: int = 300
    answer_tokens: int = 350
    think_s: float = 90.0
    """Between an answer and the next question: the median. Half of the users take longer."""

    def texts(self, rng: random.Random) -> Iterator[tuple[float, Text, int]]:
        """See `_Source.texts`."""
        numbers = itertools.count()
        weights = _cumulative(self.systems, 1.0)
        systems = [
            Text(self.block_tokens, numbers).extend(_about(rng, self.system_tokens))
            for _ in range(self.systems)
        ]

        def begin(at_s: float) -> _Visit:
            text = Text(self.block_tokens, numbers)
            if rng.random() < self.shared:
                text = rng.choices(systems, cum_weights=weights)[0].fork()
            return _Visit(at_s, text.extend(_about(rng, self.first_tokens)))

        visits = _Visits(map(begin, self.arrivals(rng, self.per_s / self.turns)))
        for visit in visits:
            answer = _about(rng, self.answer_tokens)
            yield visit.at_s, visit.text, answer
            if rng.random() >= 1 / self.turns and not visit.text.is_full:
                text = visit.text.fork().extend(answer + _about(rng, self.question_tokens))
                visits.add(visit.at_s + self.think_s * rng.lognormvariate(0, 1.0), text)


class Agents(Load, frozen=True):
    """Agents that call tools: a prompt is the one before and what the tool gave.

    They pause, fork and return.
    """

    steps: float = 20.0
    """Calls of an agent, on average; at least 1."""
    systems: int = 3
    """Kinds of agents; those of a kind begin with the same system prompt and tools."""
    system_tokens: int = 9000
    task_tokens: int = 2000
    tool_tokens: int = 1200
    """That a tool's result has."""
    answer_tokens: int = 150
    tool_s: float = 4.0
    """That a tool takes: the median."""
    long_pause: float = 0.05
    """The part of the calls behind which a person is asked, or a long job runs."""
    pause_s: float = 240.0
    """That this takes: the median."""
    fork: float = 0.04
    """The part of the calls that start helpers, which begin with the whole context. The agent waits for
    them and goes on with a summary."""
    helpers: int = 3
    helper_steps: float = 5.0

    def texts(self, rng: random.Random) -> Iterator[tuple[float, Text, int]]:
        """See `_Source.texts`."""
        numbers = itertools.count()
        systems = [
            Text(self.block_tokens, numbers).extend(_about(rng, self.system_tokens))
            for _ in range(self.systems)
        ]
        each = self.steps * (1 + self.fork * self.helpers * self.helper_steps)

        def begin(at_s: float) -> _Visit:
            return _Visit(at_s, rng.choice(systems).fork().extend(_about(rng, self.task_tokens)))

        visits = _Visits(map(begin, self.arrivals(rng, self.per_s / each)))
        for visit in visits:
            answer = _about(rng, self.answer_tokens)
            yield visit.at_s, visit.text, answer
            steps = self.helper_steps if visit.is_helper else self.steps
            if rng.random() < 1 / steps or visit.text.is_full:
                continue
            self._go_on(rng, visits, visit, answer)

    def _go_on(self, rng: random.Random, visits: _Visits, visit: _Visit, answer: int) -> None:
        """Have an agent call a tool, wait for somebody, or start helpers."""
        forks = not visit.is_helper and rng.random() < self.fork
        waits = self.pause_s if forks or rng.random() < self.long_pause else self.tool_s
        resumes_s = visit.at_s + waits * rng.lognormvariate(0, 0.7)
        for _ in range(self.helpers if forks else 0):
            task = visit.text.fork().extend(answer + _about(rng, self.task_tokens // 4))
            visits.add(visit.at_s + rng.random(), task, is_helper=True)
        text = visit.text.fork().extend(answer + _about(rng, self.tool_tokens))
        visits.add(resumes_s, text, is_helper=visit.is_helper)


class _Visit:
    """The next request of a conversation."""

    __slots__ = ("at_s", "is_helper", "text")

    def __init__(self, at_s: float, text: Text, is_helper: bool = False) -> None:
        self.at_s, self.text, self.is_helper = at_s, text, is_helper


class _Visits:
    """The requests to come of many conversations, in the order of time.

    Args:
        begins: The first of each conversation, in the order of time; without an end.
    """

    def __init__(self, begins: Iterator[_Visit]) -> None:
        self._begins = begins
        self._ties = itertools.count()
        self._heap: list[tuple[float, int, _Visit]] = []
        self._begin_next()

    def __iter__(self) -> Iterator[_Visit]:
        while True:
            visit = heapq.heappop(self._heap)[2]
            if visit is self._newest:
                self._begin_next()
            yield visit

    def add(self, at_s: float, text: Text, is_helper: bool = False) -> None:
        """Have a conversation go on at a time to come."""
        heapq.heappush(self._heap, (at_s, next(self._ties), _Visit(at_s, text, is_helper)))

    def _begin_next(self) -> None:
        self._newest = next(self._begins)
        heapq.heappush(self._heap, (self._newest.at_s, next(self._ties), self._newest))


def _cumulative(count: int, exponent: float) -> list[float]:
    """Give cumulative weights of ranks 1 to `count`."""
    return list(itertools.accumulate(rank**-exponent for rank in range(1, count + 1)))


class _Source(Protocol):
    """A load that can be made."""

    @property
    def seed(self) -> int: ...
    @property
    def requests(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...

    def texts(self, rng: random.Random) -> Iterator[tuple[float, Text, int]]:
        """Give requests for ever, in the order of time: when, the prompt, and the tokens of the answer."""


LOADS: Final[Mapping[str, type[_Source]]] = {
    "zipf": Zipf, "loop": Loop, "scan": Scan, "phases": Phases, "chat": Chat, "agents": Agents,
}  # fmt: skip


def generate(description: str) -> Trace:
    """Make a trace from a description like ``chat:seed=1,requests=5000`` or several, joined by ``+``.

    Raises:
        ConfigError: For a load or a key that is unknown (with the nearest), or a value that it cannot have.
    """
    traces = [_one(part) for part in description.split("+")]
    sizes = {trace.block_tokens for trace in traces}
    if len(sizes) > 1:
        raise ConfigError(
            f"--generate {description}: block_tokens is {sorted(sizes)}; write the same for all loads"
        )
    return traces[0] if len(traces) == 1 else merge(description, traces)


def _one(text: str) -> Trace:
    name, _, written = text.strip().partition(":")
    if name not in LOADS:
        raise ConfigError(f"--generate {text}: unknown load {name!r}; write one of {', '.join(LOADS)}")
    settings: dict[str, Any] = {}
    for pair in filter(None, written.split(",")):
        key, mark, value = pair.partition("=")
        if not mark:
            raise ConfigError(f"--generate {text}: {pair!r} has no value; write {key}=NUMBER")
        settings[key.strip()] = _number(value)
    load = convert(settings, LOADS[name], f"--generate {name}")
    requests = [
        Request(at_s, list(prompt.blocks), prompt.tokens, answer)
        for at_s, prompt, answer in itertools.islice(load.texts(random.Random(load.seed)), load.requests)
    ]
    return Trace(text.strip(), load.block_tokens, requests)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
