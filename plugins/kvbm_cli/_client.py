"""Speaks to one `vllm serve`: a streamed chat, the counters, the reset of the engine's own cache."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from kvbm_cli._errors import DemoError
from kvbm_cli._metrics import TierCounters, parse_counters

ANSWER_LIMIT_S = 600.0
"""The longest silence in an answer; a long prompt on a slow processor is silent for minutes."""
RESET_LIMIT_S = 60.0
POLL_INTERVAL_S = 0.5

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, timed from the client's side."""

    text: str
    first_token_s: float
    """From sending the request to the first piece of text."""
    total_s: float
    prompt_tokens: int
    """As the server counted them, chat template included."""
    answer_tokens: int


class Client:
    """A connection to one server. Use as a context manager."""

    def __init__(self, base_url: str, model: str) -> None:
        # Loopback only: a proxy named in the environment has no business here.
        self._http = httpx.Client(base_url=base_url, timeout=ANSWER_LIMIT_S, trust_env=False)
        self._model = model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(self, messages: Sequence[Message], max_tokens: int, on_text: Callable[[str], None]) -> Reply:
        """Send a chat and give each piece of the answer to `on_text` as it arrives.

        Raises:
            DemoError: the server refused the request (the message says why), or the answer was empty.
        """
        request = {
            "model": self._model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            # With the greedy choice the same prompt has the same answer, so that answers can be compared.
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        pieces: list[str] = []
        usage: dict[str, int] = {}
        sent_s = time.perf_counter()
        first_s = 0.0
        with self._http.stream("POST", "/v1/chat/completions", json=request) as response:
            _check(response)
            for event in _events(response.iter_lines()):
                usage = event.get("usage") or usage
                text = _text_of(event)
                if text and not pieces:
                    first_s = time.perf_counter()
                if text:
                    pieces.append(text)
                    on_text(text)
        if not pieces:
            raise DemoError("the model answered nothing; try another --model or --prompt")
        return Reply(
            text="".join(pieces),
            first_token_s=first_s - sent_s,
            total_s=time.perf_counter() - sent_s,
            prompt_tokens=usage.get("prompt_tokens", 0),
            answer_tokens=usage.get("completion_tokens", 0),
        )

    def counters(self) -> TierCounters:
        """Read what each tier has done since the server started."""
        response = self._http.get("/metrics")
        response.raise_for_status()
        return parse_counters(response.text)

    def settled_counters(self, quiet_s: float, limit_s: float, tier: str | None = None) -> TierCounters:
        """Read the counters once they have rested for `quiet_s`.

        Args:
            quiet_s: how long nothing may change.
            limit_s: the counters are returned as they are after this time.
            tier: also wait until this tier has stored or loaded something.
        """
        started_s = changed_s = time.monotonic()
        latest = self.counters()
        while True:
            time.sleep(POLL_INTERVAL_S)
            previous, latest = latest, self.counters()
            now_s = time.monotonic()
            if latest != previous:
                changed_s = now_s
            active = tier is None or tier in latest.stored_blocks or tier in latest.loaded_blocks
            if now_s - started_s > limit_s or (active and now_s - changed_s >= quiet_s):
                return latest

    def reset_prefix_cache(self) -> None:
        """Empty the engine's own prefix cache; the tiers keep what they have.

        Raises:
            DemoError: blocks were still held after `RESET_LIMIT_S`.
        """
        deadline_s = time.monotonic() + RESET_LIMIT_S
        while time.monotonic() < deadline_s:
            if _was_reset(self._http.post("/reset_prefix_cache")):
                return
            time.sleep(POLL_INTERVAL_S)
        raise DemoError(f"the engine still held blocks of its prefix cache after {RESET_LIMIT_S:.0f} s")


def _check(response: httpx.Response) -> None:
    if response.status_code != httpx.codes.OK:
        response.read()
        raise DemoError(f"the server refused the request ({response.status_code}): {response.text[:500]}")


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a server-sent event stream.

    Raises:
        DemoError: the server reported an error inside the stream.
    """
    for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise DemoError(f"the server failed while answering: {event['error']}")
        yield event


def _text_of(event: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))


def _was_reset(response: httpx.Response) -> bool:
    """Say whether a reset took place: some versions say so by the status alone, others in the body too."""
    if response.status_code != httpx.codes.OK:
        return False
    return not response.content or bool(response.json().get("success", True))
