"""What namespaces are made of, kept beside their objects, so that people and tools can say what differs.

A namespace is a digest: of two of them it can only be said that they differ. So a tier that keeps its objects
over restarts keeps the facts as well.

    {"format": 1, "namespace": <32 digits>, "facts": {"block_tokens": 16, ...}}

In a rank's folder on a local disk:

    <path>/rank0/namespaces/          0700
        <namespace, 32 digits>.json   0600; its time is that of the last start with it

They are for people: nothing that is served depends on them, and what cannot be written or read costs a line.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from kvbm_core.block import Namespace
from kvbm_core.errors import KvbmError
from kvbm_core.localdir import FACTS_FOLDER, HeldFolder
from kvbm_core.log_limit import Log
from kvbm_core.printable import printable
from kvbm_core.tier import PAGE_BYTES, TierContext, whole_pages
from kvbm_core.trust import open_file

__all__ = [
    "MOST_BYTES",
    "codec_facts",
    "decode_facts",
    "differences",
    "encode_facts",
    "keep_facts",
    "room_bytes",
    "why_empty",
]

MOST_BYTES: Final = 64 << 10
"""Of the facts of one namespace, as written."""
_ROOM_BYTES: Final = 1 << 20
_ROOM_PART: Final = 256
"""In a small share they take no more than this part."""
_MOST_FILES: Final = 64
_FORMAT: Final = 1
_FILE: Final = re.compile(r"[0-9a-f]{32}\.json", re.ASCII)
_MOST_NAMED: Final = 5
_LONGEST_VALUE: Final = 60
_DEEPEST: Final = 8
"""What lies deeper is compared as a whole: a file may have been made to exhaust the stack."""
_ABSENT: Final = object()
_POSITION: Final = re.compile(r"\[\d+\]")


class _Document(msgspec.Struct):
    """What is written."""

    format: int
    namespace: str
    facts: dict[str, Any]


def room_bytes(share_bytes: int) -> int:
    """Say how much of a rank's share of the capacity is set aside for facts: all that `du` counts of them."""
    return min(_ROOM_BYTES, share_bytes // _ROOM_PART)


def encode_facts(namespace: Namespace, facts: Mapping[str, Any]) -> bytes:
    """Write facts as JSON.

    Raises:
        ValueError: If that is longer than `MOST_BYTES`, or a text cannot be encoded.
        TypeError: If a key is not a text or a number.
        RecursionError: If they lie too deep.
    """
    document = _Document(_FORMAT, namespace.hex(), dict(facts))
    content = msgspec.json.encode(document, enc_hook=str) + b"\n"
    if len(content) > MOST_BYTES:
        raise ValueError(f"they take {len(content)} bytes, and at most {MOST_BYTES} are written")
    return content


def decode_facts(content: bytes) -> dict[str, Any] | None:
    """Read what `encode_facts` wrote. None if it is anything else, or of a later format."""
    try:
        document = msgspec.json.decode(content, type=_Document)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return document.facts if document.format == _FORMAT else None


def codec_facts(identities: Sequence[tuple[str, bytes]]) -> list[list[str]]:
    """Make a fact of a tier's codecs, from name and identity of each: the identity's digest, cut short."""
    return [[name, hashlib.sha256(identity).hexdigest()[:16]] for name, identity in identities]


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Say in words what differs between the facts of two namespaces.

    Args:
        here: As `decode_facts` gives them.
        there: Likewise.

    Returns:
        One text for each name, like ``block_tokens (16 here, 32 there)``. What differs alike at several
        positions of a list, as one dtype in all layers does, is told once. Empty if they are alike.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, one, other in _unlike(here, there):
        said = f"{_shown(one)} here, {_shown(other)} there"
        found.setdefault((_POSITION.sub("[]", name), said), []).append(name)
    return [
        f"{printable(names[0])} ({said})" + (f" and {len(names) - 1} alike" if len(names) > 1 else "")
        for (_, said), names in found.items()
    ]


def why_empty(here: Mapping[str, Any], others: Iterable[Mapping[str, Any] | None], place: str) -> str:
    """Say what a tier without objects of its namespace was used for before.

    Args:
        here: As `decode_facts` gives them.
        others: Of other namespaces, the latest first. None for what could not be read.
        place: For the line.

    Returns:
        The line, which names what differs from the one that is most alike, and of these the latest. Empty if
        there is none.
    """
    compared = [differences(here, other) for other in others if other is not None]
    if not compared:
        return ""
    least = min(compared, key=len)
    named = ", ".join(least[:_MOST_NAMED]) or "nothing that is written about it"
    more = f", and {len(least) - _MOST_NAMED} more" if len(least) > _MOST_NAMED else ""
    count = f"{len(compared)} other configuration{'s' if len(compared) > 1 else ''}"
    most_alike = "the most alike differs" if len(compared) > 1 else "it differs"
    return f"starts empty; {place} was used with {count} before; {most_alike} in: {named}{more}"


def keep_facts(
    folder: HeldFolder, context: TierContext, most_bytes: int, log: Log, *, starts_empty: bool
) -> None:
    """Write this namespace's facts into a rank's folder, and say what was changed if the tier starts empty.

    Behaviour:
        - Never raises for what it finds in the folder: one line says that they cannot be written.
        - Of other namespaces the latest are kept, 63 at most, as long as all fit.
        - A start like the last one says nothing.

    Args:
        folder: The rank's.
        context: The tier's. Without facts nothing is done.
        most_bytes: That all files and their folder may take, as `du` counts.
        log: Where lines go.
        starts_empty: No object of this namespace was found.
    """
    if not context.facts:
        return
    name = f"{context.namespace.hex()}.json"
    try:
        content = encode_facts(context.namespace, context.facts)
        with _opened(folder) as facts_fd:
            latest = _latest(facts_fd)
            if starts_empty and latest[:1] != [name]:
                others = (decode_facts(_read(folder, facts_fd, each)) for each in latest if each != name)
                if said := why_empty(decode_facts(content) or {}, others, str(folder.path)):
                    log.info("%s", said)
            _make_room(facts_fd, latest, most_bytes - PAGE_BYTES - whole_pages(1, len(content)))
            _write(folder, facts_fd, name, content)
    except (OSError, KvbmError, ValueError, TypeError, RecursionError) as error:
        log.warning(
            "%s: the facts of this configuration cannot be written (%s); if it starts empty one day, no line "
            "will say what was changed", folder.path / FACTS_FOLDER, error,
        )  # fmt: skip


@contextlib.contextmanager
def _opened(folder: HeldFolder) -> Iterator[int]:
    facts_fd = folder.open_folder(FACTS_FOLDER)
    try:
        yield facts_fd
    finally:
        os.close(facts_fd)


def _latest(facts_fd: int) -> list[str]:
    """List the files of namespaces, the latest first."""
    written = [
        (os.stat(name, dir_fd=facts_fd, follow_symlinks=False).st_mtime_ns, name)
        for name in os.listdir(facts_fd)
        if _FILE.fullmatch(name)
    ]
    return [name for _, name in sorted(written, reverse=True)]


def _read(folder: HeldFolder, facts_fd: int, name: str) -> bytes:
    """Read a file; nothing if it is none of this user's."""
    try:
        fd = open_file(folder.path / FACTS_FOLDER, facts_fd, name, os.O_RDONLY, folder.tier)
    except (OSError, KvbmError):
        return b""
    with open(fd, "rb") as file:
        return file.read(MOST_BYTES + 1)


def _make_room(facts_fd: int, latest: Sequence[str], left_bytes: int) -> None:
    """Delete the oldest that are too many, or take more than is left."""
    if left_bytes < 0:
        raise ValueError("the capacity is too small for them")
    for position, name in enumerate(latest):
        left_bytes -= os.stat(name, dir_fd=facts_fd, follow_symlinks=False).st_blocks * 512
        if left_bytes < 0 or position >= _MOST_FILES - 1:
            # What is no file was not made here.
            with contextlib.suppress(IsADirectoryError, PermissionError):
                os.unlink(name, dir_fd=facts_fd)


def _write(folder: HeldFolder, facts_fd: int, name: str, content: bytes) -> None:
    temporary, place = f"{name}.tmp", folder.path / FACTS_FOLDER
    # Nobody else writes here: an engine that was killed left what is there.
    for left in os.listdir(facts_fd):
        if left.endswith(".tmp") and _FILE.fullmatch(left.removesuffix(".tmp")):
            os.unlink(left, dir_fd=facts_fd)
    fd = open_file(place, facts_fd, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder.tier)
    try:
        with open(fd, "wb") as file:
            file.write(content)
        os.rename(temporary, name, src_dir_fd=facts_fd, dst_dir_fd=facts_fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=facts_fd)
        raise


def _unlike(here: Any, there: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any, Any]]:
    """Give name and both values of what differs."""
    if depth < _DEEPEST and isinstance(here, Mapping) and isinstance(there, Mapping):
        for key in {**here, **there}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _unlike(here.get(key, _ABSENT), there.get(key, _ABSENT), inner, depth + 1)
    elif depth < _DEEPEST and _are_lists_of_parts(here, there):
        for at, (one, other) in enumerate(zip(here, there, strict=True)):
            yield from _unlike(one, other, f"{name}[{at}]", depth + 1)
    elif _encoded(here) != _encoded(there):
        yield name, here, there


def _are_lists_of_parts(here: Any, there: Any) -> bool:
    """Say whether two lists are compared part by part. A shape, or a list that got longer, is told whole."""
    alike = isinstance(here, list) and isinstance(there, list) and len(here) == len(there)
    return alike and _has_parts(here) and _has_parts(there)


def _has_parts(value: Any) -> bool:
    return isinstance(value, Mapping) or any(isinstance(part, list | Mapping) for part in value)


def _encoded(value: Any) -> bytes:
    try:
        # So that 1 and 1.0 differ, as they do in the digest.
        return b"" if value is _ABSENT else msgspec.json.encode(value)
    except RecursionError:
        return b"deep"


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    if isinstance(value, list | Mapping) and _has_parts(value):
        return f"{len(value)} entries"
    text = printable(value if isinstance(value, str) else str(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
