"""Speaks to one OpenAI-compatible server: its models, a streamed chat, and vLLM's counters if it has them."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from kvbm_bench._errors import BenchError
from kvbm_bench._text import Message
from kvbm_metrics import read_page

SILENCE_LIMIT_S = 600.0
"""The longest pause in an answer; a long prompt on a slow processor is silent for minutes."""
CONNECT_LIMIT_S = 10.0
KEEP_ALIVE_S = 2.0
"""Less than uvicorn, under vLLM, keeps an idle connection: else a request meets one that is being closed."""
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_TOKENS_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
"""vLLM's own counter of where a prompt's tokens came from."""


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long one answer took, seen from the client's side."""

    launched_s: float
    """The wall clock's time of sending the request."""
    first_token_s: float
    """From sending the request to the first piece of the answer."""
    generation_s: float
    """From the first piece to the end."""
    gaps_s: tuple[float, ...]
    """Between one piece and the next. vLLM sends a piece for every token."""
    prompt_tokens: int
    """As the server counted them, chat template included."""
    answer_tokens: int

    @property
    def finished_s(self) -> float:
        """The wall clock's time of the end."""
        return self.launched_s + self.first_token_s + self.generation_s


class Client:
    """Connections to one server. Use as an async context manager."""

    def __init__(self, url: str) -> None:
        self.url = url
        key = os.environ.get("OPENAI_API_KEY")
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(SILENCE_LIMIT_S, connect=CONNECT_LIMIT_S),
            # The load decides how many requests there are at once.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S),
            # A proxy named in the environment has no business on the way to this machine.
            trust_env=httpx.URL(url).host not in _LOOPBACK,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def models(self) -> dict[str, int | None]:
        """Return the models served, each with the longest prompt it takes, where the server says so.

        Raises:
            BenchError: no such server answers there.
        """
        try:
            response = await self._http.get("/v1/models", timeout=CONNECT_LIMIT_S)
            response.raise_for_status()
            return {str(model["id"]): model.get("max_model_len") for model in response.json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise BenchError(
                f"--url {self.url}: no OpenAI-compatible server answers there "
                f"({type(error).__name__}: {error}); start the server, or write its address"
            ) from error

    async def ask(
        self, model: str, messages: Sequence[Message], max_tokens: int, *, exact: bool
    ) -> tuple[str, Timing]:
        """Send a chat, take the answer as a stream, and return it with its times.

        Raises:
            BenchError: the server refused the request, failed in the middle, or answered nothing.
        """
        request = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            # With the greedy choice two runs have the same conversations, as far as arithmetic allows.
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if exact else {}),
        }
        text = ""
        usage: dict[str, int] = {}
        times_s: list[float] = []
        launched_s, sent_s = time.time(), time.perf_counter()
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=request) as response:
                await _check(response)
                async for event in _events(response.aiter_lines()):
                    usage = event.get("usage") or usage
                    thought, said = _pieces_of(event)
                    if thought or said:
                        times_s.append(time.perf_counter() - sent_s)
                    text += said
        except httpx.HTTPError as error:
            raise BenchError(f"the connection to the server failed ({error!r})") from error
        except (ValueError, KeyError) as error:
            raise BenchError(f"the server's answer is no stream of OpenAI's kind ({error!r})") from error
        if not times_s:
            raise BenchError("the model answered nothing; --exact makes it answer in full length")
        if not usage:
            raise BenchError("the server does not count tokens in a stream (stream_options.include_usage)")
        return text, Timing(
            launched_s=launched_s,
            first_token_s=times_s[0],
            generation_s=time.perf_counter() - sent_s - times_s[0],
            gaps_s=tuple(round(later - earlier, 5) for earlier, later in itertools.pairwise(times_s)),
            prompt_tokens=usage["prompt_tokens"],
            answer_tokens=usage["completion_tokens"],
        )

    async def counters(self) -> Counter[str]:
        """Read where prompt tokens came from, by `label name`; empty where the server does not tell."""
        counts: Counter[str] = Counter()
        try:
            response = await self._http.get("/metrics", timeout=CONNECT_LIMIT_S)
            samples = read_page(response.text).samples if response.is_success else []
        except (httpx.HTTPError, ValueError):
            return counts
        for sample in samples:
            if sample.name == _TOKENS_BY_SOURCE:
                counts[f"source {sample.labels.get('source')}"] += int(sample.value)
            elif sample.metric and sample.metric.name == "loaded_blocks":
                counts[f"tier {sample.labels['tier']}"] += int(sample.value)
        return counts


async def _check(response: httpx.Response) -> None:
    if response.is_error:
        await response.aread()
        raise BenchError(f"the server refused the request ({response.status_code}): {response.text[:500]}")


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON objects of a server-sent event stream.

    Raises:
        BenchError: the server reported an error inside the stream.
    """
    async for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise BenchError(f"the server failed while answering: {event['error']}")
        yield event


def _pieces_of(event: Mapping[str, Any]) -> tuple[str, str]:
    """Return what the model thought and what it said; servers name the former in two ways."""
    deltas = [choice["delta"] for choice in event.get("choices", ())]
    thought = "".join(delta.get("reasoning") or delta.get("reasoning_content") or "" for delta in deltas)
    return thought, "".join(delta.get("content") or "" for delta in deltas)
