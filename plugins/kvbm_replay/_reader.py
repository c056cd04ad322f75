"""Reads traces: Mooncake's format, and an engine's log, which is the same with a header and one more key.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [46, 47, ...]}    Mooncake

    {"kvbm_log": 2, "run": "c0ffee...", "block_tokens": 16, "token_bytes": 131072, "groups": [...]}   ours
    {"timestamp": 12.345, "input_length": 50, "output_length": 14, "engine_blocks": 1,
     "looks": [[12351, 16, 50]], "stores": [[45678, 48]], "ended": 45699, "hash_ids": [...]}
    {"lost": 3}

Times are milliseconds. In Mooncake's format `hash_ids` are of a prompt's blocks of 512 tokens, the last of
which may be short and is not counted. In ours they are of all complete blocks, of the prompt and the answer.
Version 1 of ours has no groups, looks and stores.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, BinaryIO, Final, Literal

import msgspec

from kvbm_core.errors import ConfigError
from kvbm_core.groups import TAG_BYTES, Coverage, KvGroup, Rule
from kvbm_replay.trace import Course, Request, Trace

__all__ = ["read_trace", "write_trace"]

MOONCAKE_BLOCK_TOKENS: Final = 512
_LOG_VERSIONS: Final = (1, 2)
_MOST: Final = 2**53
"""That a JSON reader keeps whole."""
_Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=_MOST)]


class _Group(msgspec.Struct):
    """A KV group of the engine."""

    block_tokens: _Size
    block_bytes: _Size
    rule: Rule
    rule_tokens: _Count


class _Row(msgspec.Struct):
    """Any line: a request, a header, or a note of what is missing."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, le=_MOST)] | None = None
    input_length: _Count | None = None
    output_length: _Count = 0
    hash_ids: list[int] | None = None
    engine_blocks: _Count | None = None
    turned: tuple[_Count, _Count] | None = None
    looks: list[tuple[_Count, _Count, _Count]] = []
    stores: list[tuple[_Count, _Count]] = []
    ended: _Count | None = None
    kvbm_log: int | None = None
    run: str = ""
    block_tokens: _Count = 0
    token_bytes: _Size | None = None
    groups: list[_Group] = []
    lost: _Count = 0


_OPEN: Final[Mapping[str, Callable[[Path, Literal["rb"]], BinaryIO]]] = MappingProxyType(
    {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]
)
_DECODER: Final = msgspec.json.Decoder(_Row)


def read_trace(paths: Sequence[Path]) -> Trace:
    """Read the files of one trace, also packed as ``.gz`` or ``.xz``, in the order of the requests' times.

    Raises:
        ConfigError: If a file cannot be read, or a line is not of a trace; names file, line and key.
    """
    reader = _Reader()
    for path in paths:
        try:
            with _OPEN.get(path.suffix, open)(path, "rb") as file:
                reader.read(path, file)
        except (OSError, EOFError, lzma.LZMAError) as error:
            why = getattr(error, "strerror", None) or "it is damaged"
            raise ConfigError(f"{path}: {why}; write the path of a trace") from error
    if not reader.requests:
        raise ConfigError(
            f"{', '.join(map(str, paths))}: no requests; write the path of a trace that has some"
        )
    reader.requests.sort(key=lambda request: request.at_s)
    name = paths[0].name
    groups, group_bytes = reader.groups, reader.group_bytes
    return Trace(
        name, reader.block_tokens, reader.requests, reader.token_bytes, reader.lost, groups, group_bytes
    )


class _Reader:
    """Takes in files, line by line."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.block_tokens = 0
        self.token_bytes: int | None = None
        self.groups: list[KvGroup] = []
        self.group_bytes: list[int] = []
        self.lost = 0
        self._run: str | None = None
        self._is_log = False
        self._known: dict[int, int] = {}
        """Each number to itself, so that it is in memory once."""

    def read(self, path: Path, lines: Iterable[bytes]) -> None:
        """Take in one file."""
        is_first = True
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _DECODER.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}:{number}: {_explain(error)}") from None
            try:
                self._take(row, is_first=is_first)
            except ConfigError as error:
                error.args = (f"{path}:{number}: {error}",)
                raise
            is_first = False

    def _take(self, row: _Row, *, is_first: bool) -> None:
        if row.kvbm_log is not None:
            self._begin_log(row, is_first=is_first)
        elif is_first and not self._begin_other():
            raise ConfigError("no header; a log and a trace of another kind cannot be read as one")
        elif row.hash_ids is None and row.lost:
            self.lost += row.lost
        else:
            self._take_request(row)

    def _begin_log(self, row: _Row, *, is_first: bool) -> None:
        if row.kvbm_log not in _LOG_VERSIONS:
            raise ConfigError(
                f"kvbm_log: {row.kvbm_log}; this release reads versions "
                f"{' and '.join(map(str, _LOG_VERSIONS))}: install one that fits"
            )
        if not is_first or row.block_tokens < 1:
            raise ConfigError("a header must be the first line of its file, with block_tokens of 1 or more")
        if self.requests and row.run != self._run:
            raise ConfigError(
                "this log is of another start of an engine than the one before: their hashes cannot be "
                "compared; replay each alone"
            )
        self._run, self._is_log = row.run, True
        self.block_tokens, self.token_bytes = row.block_tokens, row.token_bytes
        self.groups = [_group(at, group) for at, group in enumerate(row.groups)]
        if self.groups and math.gcd(*(group.block_tokens for group in self.groups)) != row.block_tokens:
            raise ConfigError(
                f"block_tokens: {row.block_tokens}; write the greatest common divisor of those of the groups"
            )
        self.group_bytes = [group.block_bytes for group in row.groups]

    def _begin_other(self) -> bool:
        if not self._is_log:
            self.block_tokens = MOONCAKE_BLOCK_TOKENS
        return not self._is_log

    def _take_request(self, row: _Row) -> None:
        if row.timestamp is None or row.input_length is None or row.hash_ids is None:
            keys = {"timestamp": row.timestamp, "input_length": row.input_length, "hash_ids": row.hash_ids}
            lacks = [key for key, value in keys.items() if value is None]
            raise ConfigError(f"no {', '.join(lacks)}; a request has {', '.join(keys)}")
        count = row.input_length // self.block_tokens
        if len(row.hash_ids) < count and not self._is_log:
            raise ConfigError(
                f"hash_ids: {len(row.hash_ids)}; an input_length of {row.input_length} has {count} blocks of "
                f"{self.block_tokens} tokens"
            )
        blocks = list(map(self._known.setdefault, row.hash_ids, row.hash_ids))
        request = Request(row.timestamp / 1e3, blocks[:count], row.input_length, row.output_length)
        if self._is_log:
            request.answer, request.engine_blocks = blocks[count:], row.engine_blocks
            request.asked = min(len(request.blocks), max(0, row.input_length - 1) // self.block_tokens)
            if row.looks:
                request.course = self._course(row, len(blocks))
        self.requests.append(request)

    def _course(self, row: _Row, blocks: int) -> Course:
        """Take when a request met the tiers; its tokens must be those whose hashes are there."""
        assert row.timestamp is not None
        first = [round(row.timestamp * 1e3), *(row.turned or ())[:1], row.looks[0][0]]
        later = [moment for moment, *_ in [*row.looks[1:], *row.stores]]
        if first != sorted(first) or min(later, default=first[-1]) < first[-1]:
            raise ConfigError(
                f"looks, stores: moments {[*first, *later]}; in microseconds, the timestamp comes first, "
                "then turned, then the first look"
            )
        if any(had >= tokens for _, had, tokens in row.looks):
            raise ConfigError(f"looks: {row.looks}; write more tokens than the engine's own cache had")
        most = max([tokens for _, tokens in row.stores] + [tokens - 1 for *_, tokens in row.looks])
        if (needed := most // self.block_tokens) > blocks:
            raise ConfigError(
                f"hash_ids: {blocks}; looks and stores of {most} tokens need {needed} blocks of "
                f"{self.block_tokens} tokens"
            )
        return Course(row.looks, row.stores, row.turned, row.ended)


def _group(at: int, group: _Group) -> KvGroup:
    """Give a KV group; its tag is its place, for the keys of a replay are its own."""
    if group.rule in (Rule.WINDOW, Rule.CHUNK) and not group.rule_tokens:
        raise ConfigError(f"groups: a {group.rule.value} of 0 rule_tokens; write its tokens")
    return KvGroup(group.block_tokens, Coverage(group.rule, group.rule_tokens), at.to_bytes(TAG_BYTES, "big"))


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace of blocks of 512 tokens in Mooncake's format; answers' blocks are left out.

    Raises:
        ConfigError: If the blocks have another length, or the file cannot be written.
    """
    if trace.block_tokens != MOONCAKE_BLOCK_TOKENS:
        raise ConfigError(
            f"{path}: blocks of {trace.block_tokens} tokens; the format has {MOONCAKE_BLOCK_TOKENS}: write "
            f"block_tokens={MOONCAKE_BLOCK_TOKENS}"
        )
    rows = [
        {
            "timestamp": round(request.at_s * 1e3), "input_length": request.input_tokens,
            "output_length": request.output_tokens, "hash_ids": request.blocks,
        }
        for request in trace.requests
    ]  # fmt: skip
    try:
        path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; write a path that can be written") from error


def _explain(error: msgspec.DecodeError) -> str:
    """Say what is wrong with a line: the key where there is one."""
    text, _, key = str(error).replace(" | null", "").partition(" - at `$.")
    if key:
        return f"{key.rstrip('`')}: {text[0].lower()}{text[1:]}"
    return f"not a line of a trace: {text}; write one JSON object a line"
