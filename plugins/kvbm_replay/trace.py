"""What a trace is: requests with the blocks of their prompts, as numbers, and no text.

blocks   │ 7 │ 9 │ 12 │ 13 │     equal numbers: equal tokens in the block and in all before it
prompt   ├────────────────────┤   input_tokens; the end that fills no block has no number
answer                        ├─────────┤   output_tokens; its blocks, where they are known
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvbm_core.block import KEY_BYTES, BlockKey
from kvbm_core.groups import KvGroup, is_plain

__all__ = ["Course", "Keys", "Request", "Trace"]


@dataclass(frozen=True, slots=True)
class Course:
    """When a request met the tiers, as recorded: moments in microseconds, no two of a trace alike."""

    looks: Sequence[tuple[int, int, int]]
    """Moment, the leading tokens that the engine's own cache had, and all that the request had then. One, and
    another each time that it was preempted."""
    stores: Sequence[tuple[int, int]]
    """Moment, and the leading tokens whose blocks had been offered to the tiers then."""
    turned: tuple[int, int] | None = None
    """The moment at which the engine turned to it and had no room, and the leading tokens that its own cache
    had then. None: it had room at once."""
    ended: int | None = None
    """The moment at which it ended. None: not known."""


@dataclass(slots=True)
class Request:
    """One request."""

    at_s: float
    """When it came, in seconds from any beginning."""
    blocks: list[int]
    """The complete blocks of its prompt."""
    input_tokens: int
    output_tokens: int = 0
    answer: list[int] = field(default_factory=list)
    """The blocks behind those of the prompt that were complete at its end. Empty: not known."""
    engine_blocks: int | None = None
    """Leading blocks that the engine's own prefix cache had, as recorded. None: not known."""
    asked: int = -1
    """Leading blocks that tiers may be asked for: an engine computes the last token of a prompt itself.
    -1: all."""
    course: Course | None = None
    """None: not known. Then it is computed at once when it comes."""

    def __post_init__(self) -> None:
        if self.asked < 0:
            self.asked = len(self.blocks)


@dataclass(slots=True)
class Trace:
    """Requests in the order in which they came."""

    name: str
    block_tokens: int
    requests: list[Request]
    token_bytes: int | None = None
    """Bytes of the KV of a token over all ranks, as recorded. None: not known."""
    lost: int = 0
    """Requests that the recording has not, because it could not follow."""
    groups: Sequence[KvGroup] = ()
    """The engine's KV groups; the greatest common divisor of their blocks is `block_tokens`. Empty: one, of
    which a prefix needs all blocks."""
    group_bytes: Sequence[int] = ()
    """For each group the bytes of a block over all ranks."""

    def __repr__(self) -> str:
        return f"<Trace {self.name}: {len(self.requests)} requests, {self.accesses} blocks>"

    @property
    def is_plain(self) -> bool:
        """True if a prefix needs all blocks of one KV group."""
        return not self.groups or is_plain(self.groups)

    @property
    def accesses(self) -> int:
        """Blocks that all requests may ask for."""
        return sum(request.asked for request in self.requests)

    @property
    def unique(self) -> int:
        """Different blocks."""
        return len({block for request in self.requests for block in (*request.blocks, *request.answer)})

    @property
    def duration_s(self) -> float:
        """From the first request to the last."""
        return self.requests[-1].at_s - self.requests[0].at_s if self.requests else 0.0


class Keys(dict[int, BlockKey]):
    """The keys of numbered blocks, made when they are asked for: 32 bytes that look like any other key's."""

    def __missing__(self, block: int) -> BlockKey:
        key = hashlib.blake2b(b"%d" % block, digest_size=KEY_BYTES).digest()
        self[block] = key
        return key

    def of(self, blocks: Iterable[int]) -> list[BlockKey]:
        """Give the keys of blocks, in order."""
        return [self[block] for block in blocks]


def merge(name: str, traces: Sequence[Trace]) -> Trace:
    """Put traces side by side in time, none of whose blocks are another's.

    Args:
        name: Of the whole.
        traces: At least one, of blocks of equal length.
    """
    requests: list[Request] = []
    for at, trace in enumerate(traces):
        for request in trace.requests:
            blocks = [block * len(traces) + at for block in request.blocks]
            answer = [block * len(traces) + at for block in request.answer]
            requests.append(
                Request(
                    request.at_s, blocks, request.input_tokens, request.output_tokens, answer,
                    request.engine_blocks, request.asked,
                )
            )  # fmt: skip
    requests.sort(key=lambda request: request.at_s)
    return Trace(name, traces[0].block_tokens, requests, traces[0].token_bytes)
