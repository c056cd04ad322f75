"""Codecs on the way to a tier: what is stored is encoded, what is loaded is decoded.

    store:  region ──encode──► buffer ──submit──► tier
    load:   region ◄──decode── buffer ◄──poll──── tier

A few threads encode, as many others decode. The buffers are few, and equal: an operation waits for one. Loads
go before stores, which leave half of the buffers to them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from kvbm_core.block import BlockKey
from kvbm_core.codec import Codec
from kvbm_core.errors import CorruptError, QueueFullError, TierError, UnverifiableError
from kvbm_core.layers.forward import ForwardTier
from kvbm_core.log_limit import LogLimit
from kvbm_core.staging import Staging
from kvbm_core.tier import (
    Capabilities,
    Completion,
    Op,
    Outcome,
    Reason,
    Region,
    Tier,
    Transfer,
    whole_pages,
)

__all__ = ["CodecChain", "CodecTier"]

logger = logging.getLogger("kvbm_core")

_THREADS: Final = 2
"""That encode, and again that decode: what encodes for long delays no load."""
_BUFFERS_BYTES: Final = 64 << 20
_MIN_BUFFERS: Final = 2 * _THREADS


class CodecChain:
    """Codecs one after the other, as one.

    Args:
        codecs: Names and codecs, in the order in which they encode; at least one.
        max_bytes: Length of the longest object.
    """

    def __init__(self, codecs: Sequence[tuple[str, Codec]], max_bytes: int) -> None:
        self._codecs = tuple(codec for _, codec in codecs)
        self.identities = [(name, codec.identity) for name, codec in codecs]
        """Of each codec, the name and the identity."""
        self._longest = [max_bytes]
        """Length of the longest object before each codec, and after the last."""
        for codec in self._codecs:
            self._longest.append(codec.max_bytes(self._longest[-1]))

    def __repr__(self) -> str:
        return f"<CodecChain {', '.join(name for name, _ in self.identities)}>"

    def max_bytes(self, nbytes: int) -> int:
        """Give the length that so many bytes have at most when they are encoded."""
        for codec in self._codecs:
            nbytes = codec.max_bytes(nbytes)
        return nbytes

    def encode(self, key: BlockKey, source: memoryview, target: memoryview) -> int:
        """Encode an object; give the length of the result."""
        return self._pass(key, source, target, self._longest[1:], [codec.encode for codec in self._codecs])

    def decode(self, key: BlockKey, source: memoryview, target: memoryview) -> int:
        """Undo `encode`; give the length of the object.

        Raises:
            CorruptError: If the source is not what `encode` made.
        """
        steps = [codec.decode for codec in reversed(self._codecs)]
        return self._pass(key, source, target, self._longest[-2::-1], steps)

    @staticmethod
    def _pass(
        key: BlockKey, source: memoryview, target: memoryview, longest: Sequence[int],
        steps: Sequence[Callable[[BlockKey, memoryview, memoryview], int]],
    ) -> int:  # fmt: skip
        """Take an object through some steps; `longest` bounds the length after each."""
        nbytes = len(source)
        for step, room in zip(steps, longest, strict=True):
            place = target if step is steps[-1] else memoryview(bytearray(room))
            nbytes = step(key, source, place)
            if not isinstance(nbytes, int) or not 0 < nbytes <= len(place):
                raise CorruptError(f"a codec made {nbytes!r} bytes where {len(place)} fit")
            source = place[:nbytes].toreadonly()
        return nbytes


@dataclasses.dataclass(slots=True, eq=False)
class _Way:
    """A transfer on its way through the codecs."""

    transfer: Transfer
    buffer: Region
    """Of the encoded object."""
    in_tier: bool = False
    """True from when the tier is asked until it has answered."""
    nbytes: int = 0
    """Of a store: the length of the encoded object."""


class CodecTier(ForwardTier):
    """Encodes objects before a tier stores them, and decodes them when it has loaded them.

    Behaviour:
        - A LOAD whose bytes cannot be decoded completes FAILED with reason CORRUPT.
        - A LOAD whose bytes a codec cannot judge completes MISSING: who can read them may still want them.
        - A STORE that cannot be encoded completes FAILED with reason ERROR. Other transfers go on.
        - `Completion.nbytes` of a STORE is the length of the encoded object.
        - An answer that the tier was not asked for, or a second one, is ignored.
        - A LOAD waits for no store, as long as the tier does not.

    Args:
        inner: The tier.
        chain: The codecs.
        max_bytes: Length of the longest object before it is encoded.
        wake: Called when `poll` has something to do.
        name: The tier's name, for the log.
    """

    def __init__(
        self, inner: Tier, chain: CodecChain, max_bytes: int, wake: Callable[[], None], name: str
    ) -> None:
        super().__init__(inner)
        self._chain = chain
        self._wake = wake
        self._name = name
        # Its memory holds encoded bytes, and device memory cannot be encoded.
        self._capabilities = dataclasses.replace(inner.capabilities, addressable=False, device_direct=False)
        longest = chain.max_bytes(max_bytes)
        slot_bytes = whole_pages(1, longest)
        count = min(inner.capabilities.queue_depth, max(_MIN_BUFFERS, _BUFFERS_BYTES // slot_bytes))
        self._buffers = Staging(count * slot_bytes, longest)
        self._most_stores = max(1, count // 2)
        """That have a buffer at once."""
        self._encoders = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"kvbm-{name}-encode")
        self._decoders = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"kvbm-{name}-decode")
        self._loads: deque[Transfer] = deque()
        self._stores: deque[Transfer] = deque()
        """They wait for a buffer."""
        self._ways: dict[int, _Way] = {}
        """By ticket: being encoded, in the tier, or being decoded."""
        self._encoded: deque[tuple[_Way, int | BaseException]] = deque()
        self._decoded: deque[tuple[_Way, int | BaseException]] = deque()
        """Ends that the threads have put here."""
        self._done: list[Completion] = []
        self._asked: set[int] = set()
        """Lookups in the tier."""
        self._closed = False
        self._lines = LogLimit(logger)

    @property
    def capabilities(self) -> Capabilities:
        """See `Tier.capabilities`."""
        return self._capabilities

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """See `Tier.submit`."""
        if self._closed:
            raise TierError("the tier is closed", operation="submit", tier=self._name)
        waiting = len(self._loads) + len(self._stores)
        open_now = waiting + len(self._ways) + len(self._asked) + len(self._done)
        if open_now + len(transfers) > self._capabilities.queue_depth:
            raise QueueFullError(f"{open_now} transfers are open", operation="submit", tier=self._name)
        lookups = [transfer for transfer in transfers if transfer.op is Op.LOOKUP]
        if lookups:
            self._inner.submit(lookups)
            self._asked.update(transfer.ticket for transfer in lookups)
        self._loads.extend(transfer for transfer in transfers if transfer.op is Op.LOAD)
        self._stores.extend(transfer for transfer in transfers if transfer.op is Op.STORE)
        self._start_waiting()

    def poll(self) -> Sequence[Completion]:
        """See `Tier.poll`."""
        self._take_encoded()
        for completion in self._inner.poll():
            self._take_answer(completion)
        self._take_decoded()
        self._start_waiting()
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """See `Tier.close`."""
        if self._closed:
            return
        self._closed = True
        self._encoders.shutdown(wait=True)
        self._decoders.shutdown(wait=True)
        self._take_encoded()
        self._inner.close()
        for completion in self._inner.poll():
            self._take_answer(completion)
        self._take_decoded()
        waiting = [transfer.ticket for transfer in (*self._loads, *self._stores)]
        for ticket in [*waiting, *self._ways, *self._asked]:
            self._done.append(Completion(ticket, Outcome.FAILED, Reason.ERROR, "the tier was closed"))
        self._loads.clear()
        self._stores.clear()
        self._ways.clear()
        self._asked.clear()
        self._buffers.close()
        self._lines.close()

    def _start_waiting(self) -> None:
        """Give buffers to the transfers that wait for one: have the tier load, or encode."""
        loads = []
        while self._loads and (buffer := self._buffers.take()):
            transfer = self._loads.popleft()
            self._ways[transfer.ticket] = _Way(transfer, buffer)
            loads.append(dataclasses.replace(transfer, region=buffer))
        self._send(loads)
        room = self._most_stores - sum(way.transfer.op is Op.STORE for way in self._ways.values())
        while self._stores and room > 0 and (buffer := self._buffers.take()):
            transfer = self._stores.popleft()
            way = self._ways[transfer.ticket] = _Way(transfer, buffer)
            self._encoders.submit(self._encode, way)
            room -= 1

    def _encode(self, way: _Way) -> None:
        """Run in a thread."""
        region = way.transfer.region
        assert region is not None
        try:
            source = region.view().toreadonly()
            result: int | BaseException = self._chain.encode(way.transfer.key, source, way.buffer.view())
        except BaseException as error:  # noqa: BLE001 - a stranger's code, and a panic of Rust is no Exception.
            result = error
        self._encoded.append((way, result))
        self._wake()

    def _decode(self, way: _Way, nbytes: int) -> None:
        """Run in a thread."""
        region = way.transfer.region
        assert region is not None
        try:
            source = way.buffer.view()[:nbytes].toreadonly()
            result: int | BaseException = self._chain.decode(way.transfer.key, source, region.view())
        except BaseException as error:  # noqa: BLE001 - as in `_encode`.
            result = error
        self._decoded.append((way, result))
        self._wake()

    def _take_encoded(self) -> None:
        stores = []
        while self._encoded:
            way, result = self._encoded.popleft()
            if isinstance(result, int):
                way.nbytes = result
                stores.append(dataclasses.replace(way.transfer, region=way.buffer.part(0, result)))
            else:
                self._fail_encode(way, result)
        self._send(stores)

    def _fail_encode(self, way: _Way, error: BaseException) -> None:
        why = f"{self._chain!r} could not encode it: {type(error).__name__}: {error}"
        self._lines.error("encode", "tier %s: a block is not stored, because %s", self._name, why)
        self._end(way, Completion(way.transfer.ticket, Outcome.FAILED, Reason.ERROR, why))

    def _take_answer(self, completion: Completion) -> None:
        """Take in how a transfer ended in the tier."""
        way = self._ways.get(completion.ticket)
        if completion.ticket in self._asked:
            self._asked.remove(completion.ticket)
            self._done.append(completion)
        if way is None or not way.in_tier:
            return
        way.in_tier = False
        if completion.outcome is not Outcome.DONE:
            self._end(way, completion)
        elif way.transfer.op is Op.STORE:
            self._end(way, dataclasses.replace(completion, nbytes=completion.nbytes or way.nbytes))
        elif self._closed:
            self._decode(way, completion.nbytes or way.buffer.nbytes)
        else:
            self._decoders.submit(self._decode, way, completion.nbytes or way.buffer.nbytes)

    def _take_decoded(self) -> None:
        while self._decoded:
            way, result = self._decoded.popleft()
            ticket = way.transfer.ticket
            if isinstance(result, int):
                self._end(way, Completion(ticket, Outcome.DONE, nbytes=result))
                continue
            if isinstance(result, UnverifiableError):
                self._lines.warning(
                    "unverifiable",
                    "tier %s: block %s cannot be judged here, and counts as missing: %s. If it should be "
                    "readable, look at this tier's codecs and keys",
                    self._name, way.transfer.key.hex()[:16], result,
                )  # fmt: skip
                self._end(way, Completion(ticket, Outcome.MISSING, Reason.MISSING))
                continue
            self._lines.error(
                "decode",
                "tier %s: block %s cannot be decoded (load: corrupt; %s: %s). It is dropped there and "
                "computed; look whether the codecs or their keys were changed, or the disk fails",
                self._name, way.transfer.key.hex()[:16], type(result).__name__, result,
            )  # fmt: skip
            self._end(way, Completion(ticket, Outcome.FAILED, Reason.CORRUPT, "it cannot be decoded"))

    def _send(self, transfers: Sequence[Transfer]) -> None:
        if not transfers:
            return
        for transfer in transfers:
            self._ways[transfer.ticket].in_tier = True
        try:
            self._inner.submit(transfers)
        except TierError as error:
            reason = Reason.BUSY if isinstance(error, QueueFullError) else Reason.ERROR
            for transfer in transfers:
                way = self._ways[transfer.ticket]
                self._end(way, Completion(transfer.ticket, Outcome.FAILED, reason, str(error)))
            self._wake()  # They end, and buffers are free: nothing else might call `poll`.

    def _end(self, way: _Way, completion: Completion) -> None:
        del self._ways[way.transfer.ticket]
        self._buffers.give_back(way.buffer)
        self._done.append(completion)
