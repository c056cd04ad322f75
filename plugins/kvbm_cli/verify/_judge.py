"""Proves the bytes of an object: through its tier's codecs, by its seal."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from kvbm_core.block import Namespace, make_namespace
from kvbm_core.codec import CodecContext
from kvbm_core.config import TierEntry, convert
from kvbm_core.contents import Found
from kvbm_core.errors import CorruptError, KvbmError, UnverifiableError
from kvbm_core.layers import CodecChain, why_damaged
from kvbm_core.namespace_facts import codec_facts
from kvbm_core.registry import Registry

__all__ = ["Judge", "NotJudgedError"]

_LEAST_ROOM_BYTES: Final = 1 << 20
_MOST_ROOM_BYTES: Final = 1 << 30
_USUAL: Final = 4
_EXTREME: Final = 16
"""So many times shorter a codec makes an object; and 16 times as short at most."""
_NO_NAMESPACE: Final = bytes(16)
_NO_CODECS: Final = "it was stored through codecs: give the configuration in place of the path"


class NotJudgedError(KvbmError):
    """Of an object or a namespace it cannot be told whether it is damaged. The message says why."""


@dataclass(slots=True)
class _Reading:
    """How objects of one namespace and rank are read."""

    namespace: Namespace
    """The engine's: that of the seals."""
    coded: bool
    room_bytes: int = _LEAST_ROOM_BYTES
    """Into so much the longest object so far was decoded."""


class Judge:
    """Proves objects of one part of a place. Any thread may call `why`.

    Args:
        entry: The tier as configured; None: nothing is known but its place.
        facts: What its namespaces are made of.
    """

    def __init__(
        self, entry: TierEntry | None, facts: Mapping[tuple[Namespace, int], Mapping[str, Any] | None]
    ) -> None:
        self._entry = entry
        self._facts = facts
        self._readings: dict[tuple[Namespace, int], _Reading | NotJudgedError] = {}
        self._chains: dict[tuple[Namespace, int], CodecChain] = {}
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Judge of {len(self._facts)} namespaces>"

    def knows(self, namespace: Namespace) -> bool:
        """Say whether it is written what a namespace is made of."""
        return any(name == namespace for name, _ in self._facts)

    def beside_bytes(self, found: Found) -> int:
        """Say how much memory decoding an object takes, beside its bytes."""
        return 0 if self._entry is None else len(self._entry.codecs) * _usual_bytes(found.nbytes)

    def why(self, found: Found, content: memoryview) -> str:
        """Say what is wrong with an object; empty if it is whole.

        Raises:
            NotJudgedError: That cannot be told of any object of the namespace.
            UnverifiableError: A codec cannot tell it of this one.
        """
        reading = self._reading(found)
        if len(content) < found.nbytes:
            return f"it is cut short: {len(content)} of {found.nbytes} bytes are there"
        if reading.coded:
            try:
                content = self._decode(reading, found, content.toreadonly())
            except UnverifiableError:
                # Of this object alone: its key is not given, or the bytes that name it are damaged.
                raise
            except KvbmError as error:
                return f"it cannot be decoded: {error}"
        return why_damaged(content, found.key, reading.namespace)

    def _reading(self, found: Found) -> _Reading:
        with self._lock:
            name = found.namespace, found.rank
            if name not in self._readings:
                try:
                    self._readings[name] = self._find_reading(*name)
                except NotJudgedError as error:
                    self._readings[name] = error
            reading = self._readings[name]
        if isinstance(reading, NotJudgedError):
            raise reading
        return reading

    def _find_reading(self, namespace: Namespace, rank: int) -> _Reading:
        facts = self._facts.get((namespace, rank))
        stored_with: Sequence[Any] = (facts or {}).get("codecs") or ()
        codecs = self._entry.codecs if self._entry else ()
        if self._entry and self._entry.checked is False:
            raise NotJudgedError("its tier has checked: false, so its objects have no seals")
        if not codecs or (facts and not stored_with):
            if stored_with:
                raise NotJudgedError(_NO_CODECS)
            return _Reading(namespace, coded=False)
        if not facts:
            raise NotJudgedError("nobody wrote what it is made of, so its codecs cannot be opened")
        identities = self._chain(_NO_NAMESPACE, _LEAST_ROOM_BYTES).identities
        if codec_facts(identities) != list(stored_with):
            raise NotJudgedError("it was stored through other codecs, or codecs with other settings")
        engine = make_namespace({name: value for name, value in facts.items() if name != "codecs"})
        if make_namespace({"namespace": engine, "codecs": identities}) != namespace:
            raise NotJudgedError("its engine's namespace cannot be told from what is written about it")
        return _Reading(engine, coded=True)

    def _decode(self, reading: _Reading, found: Found, content: memoryview) -> memoryview:
        """Decode an object whose length nobody tells: into what others took, or more, or much more."""
        usual = max(reading.room_bytes, _usual_bytes(len(content)))
        for nbytes in sorted({reading.room_bytes, usual}):
            with suppress(CorruptError):
                return self._decode_into(reading, found, content, nbytes)
        # One at a time: it is a lot of memory.
        with self._lock:
            return self._decode_into(reading, found, content, min(_MOST_ROOM_BYTES, _EXTREME * usual))

    def _decode_into(self, reading: _Reading, found: Found, content: memoryview, nbytes: int) -> memoryview:
        target = memoryview(bytearray(nbytes))
        got = self._chain(reading.namespace, nbytes).decode(found.key, content, target)
        reading.room_bytes = max(reading.room_bytes, nbytes)
        return target[:got]

    def _chain(self, namespace: Namespace, nbytes: int) -> CodecChain:
        entry = self._entry
        assert entry is not None
        with self._lock:
            if (namespace, nbytes) in self._chains:
                return self._chains[namespace, nbytes]
            # Looks through what is installed, which takes longer than a read.
            codecs, longest, registry = [], nbytes, Registry()
            for part in entry.codecs:
                kind = registry.codec(part.name)
                settings = convert(part.settings, kind.config_type, f"tier {entry.name}: {part.name}")
                codec = kind.open(settings, CodecContext(namespace, longest, entry.name))
                longest = codec.max_bytes(longest)
                codecs.append((part.name, codec))
            chain = self._chains[namespace, nbytes] = CodecChain(codecs, nbytes)
        return chain


def _usual_bytes(nbytes: int) -> int:
    """Give the room that an object has when it is decoded, if none so far was longer."""
    return max(_LEAST_ROOM_BYTES, 1 << (_USUAL * nbytes - 1).bit_length())
