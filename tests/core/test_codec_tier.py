"""Codecs on their way, and what goes wrong there: each ticket ends once, and no buffer is lost or shared."""

import contextlib
import ctypes
import dataclasses
import itertools
import mmap
import threading
import time

import pytest

from kvbm_core import Codec, CorruptError, QueueFullError, TierContext, TierError, UnverifiableError
from kvbm_core.layers import CodecChain, CodecTier, DeadlineTier, SealTier
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing import FaultyTier
from kvbm_core.tier import Completion, Op, Outcome, Reason, Region, Transfer

NAMESPACE = b"n" * 16
LONGEST = 5000
PATIENCE_S = 60.0


def key(number):
    return number.to_bytes(32, "big")


def content(number, nbytes=LONGEST):
    return bytes([number % 251]) * nbytes


def region(data):
    memory = mmap.mmap(-1, -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE)
    memory[: len(data)] = data
    return Region(ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(data), owner=memory)


class Mark(Codec):
    """Writes a mark before the object, and insists on it."""

    def __init__(self, mark=b"m"):
        self.mark = mark

    def max_bytes(self, nbytes):
        return nbytes + len(self.mark)

    def encode(self, key, source, target):
        nbytes = self.max_bytes(len(source))
        target[:nbytes] = self.mark + bytes(source)
        return nbytes

    def decode(self, key, source, target):
        if source[: len(self.mark)] != self.mark:
            raise CorruptError("no mark")
        nbytes = len(source) - len(self.mark)
        target[:nbytes] = source[len(self.mark) :]
        return nbytes


class Gated(Mark):
    """Encodes, or decodes, only when it is let go on."""

    def __init__(self, method):
        super().__init__()
        self.method = method
        self.go_on, self.entered = threading.Event(), threading.Semaphore(0)

    def encode(self, key, source, target):
        self._wait("encode")
        return super().encode(key, source, target)

    def decode(self, key, source, target):
        self._wait("decode")
        return super().decode(key, source, target)

    def _wait(self, method):
        if method == self.method:
            self.entered.release()
            assert self.go_on.wait(PATIENCE_S)

    def until_entered(self, times):
        for _ in range(times):
            assert self.entered.acquire(timeout=PATIENCE_S)


class Panic(BaseException):
    """As the foreign languages of codecs raise it: not an Exception."""


class Strange(Mark):
    """Raises, or gives, something strange where it is told to, for the keys that it is told."""

    def __init__(self, method="", does=None):
        super().__init__()
        self.method, self.does, self.keys = method, does, {key(1)}

    def encode(self, key, source, target):
        return self._answer("encode", key, super().encode(key, source, target))

    def decode(self, key, source, target):
        return self._answer("decode", key, super().decode(key, source, target))

    def _answer(self, method, key, right):
        if method != self.method or key not in self.keys:
            return right
        if isinstance(self.does, BaseException):
            raise self.does
        return self.does


class Bench:
    """A `CodecTier` over a memory tier that misbehaves, polled only when it says that there is a reason."""

    def __init__(self, *codecs, fault=None, longest=LONGEST, inner=None, late_s=0.05):
        self.fault, self.woken, self.asked = fault, threading.Event(), []
        self.memory = MemoryTier(
            MemoryConfig(capacity=200 * longest), TierContext(NAMESPACE, longest, wake=self.woken.set)
        )
        faulty = FaultyTier(inner or self.memory, self._fault, late_s=late_s)
        chain = CodecChain([(f"codec{at}", codec) for at, codec in enumerate(codecs or (Mark(),))], longest)
        self.tier = CodecTier(faulty, chain, longest, self.woken.set, "disk")
        self.tickets = itertools.count(1)

    def _fault(self, transfer):
        self.asked.append((transfer.op, transfer.key))
        return self.fault(transfer) if callable(self.fault) else self.fault

    def transfer(self, op, number, data=None, **more):
        data = data if data is not None else content(number) if op is Op.STORE else b"\xaa" * LONGEST
        return Transfer(next(self.tickets), op, key(number), region(data), **more)

    def wait(self, transfers):
        """Give the end of each, in their order; no other ticket ends, and none twice."""
        done = {}
        while len(done) < len(transfers):
            assert self.woken.wait(PATIENCE_S), f"{len(done)} of {len(transfers)} have ended"
            self.woken.clear()
            for end in self.tier.poll():
                assert end.ticket not in done
                done[end.ticket] = end
        assert {transfer.ticket for transfer in transfers} == set(done)
        return [done[transfer.ticket] for transfer in transfers]

    def run(self, *transfers):
        self.tier.submit(transfers)
        return self.wait(transfers)

    def store(self, *numbers):
        return self.run(*(self.transfer(Op.STORE, number) for number in numbers))

    def load(self, number):
        transfer = self.transfer(Op.LOAD, number)
        [end] = self.run(transfer)
        return end, bytes(transfer.region.view())

    @property
    def free(self):
        """The buffers that nobody has, each once."""
        addresses = [each.address for each in self.tier._buffers._free]
        assert len(addresses) == len(set(addresses))
        return len(addresses)

    @property
    def buffers(self):
        return self.tier._buffers.count


@pytest.fixture
def bench():
    with contextlib.ExitStack() as stack:

        def open_(*codecs, **settings):
            bench = Bench(*codecs, **settings)
            stack.callback(lambda: bench.tier.close())  # It may have more layers by then.
            for codec in codecs:
                if isinstance(codec, Gated):
                    stack.callback(codec.go_on.set)
            return bench

        yield open_


def test_what_is_stored_is_encoded_and_what_is_loaded_is_decoded(bench):
    one = bench()
    [end] = one.run(one.transfer(Op.STORE, 1, content(1, 1234)))
    assert (end.outcome, end.nbytes) == (Outcome.DONE, 1235)
    assert one.memory._objects == {key(1): b"m" + content(1, 1234)}
    end, got = one.load(1)
    assert (end.outcome, end.nbytes) == (Outcome.DONE, 1234)
    assert got == content(1, 1234) + b"\xaa" * (LONGEST - 1234)
    assert one.free == one.buffers


def test_the_first_codec_encodes_first_and_decodes_last(bench):
    two = bench(Mark(b"first "), Mark(b"second "))
    [end] = two.run(two.transfer(Op.STORE, 1, b"object"))
    assert two.memory._objects == {key(1): b"second first object"}
    assert end.nbytes == len("second first object")
    assert two.load(1)[1][:6] == b"object"


def test_of_several_codecs_the_longest_object_of_each_fits(bench):
    two = bench(Mark(b"a" * 300), Mark(b"b" * 4000), Mark(b"c"))
    assert two.store(1)[0].nbytes == LONGEST + 4301
    end, got = two.load(1)
    assert (end.nbytes, got) == (LONGEST, content(1))


def test_the_source_is_not_to_be_written(bench):
    class Writes(Mark):
        def encode(self, key, source, target):
            source[0] = 0

    one = bench(Writes())
    assert one.store(1)[0].reason is Reason.ERROR


def test_what_is_not_there_leaves_the_region_as_it_was_and_questions_pass_through(bench):
    one = bench()
    one.store(1)
    end, got = one.load(2)
    assert (end.outcome, got) == (Outcome.MISSING, b"\xaa" * LONGEST)
    ask = [Transfer(next(one.tickets), Op.LOOKUP, key(number)) for number in (1, 2)]
    assert [end.outcome for end in one.run(*ask)] == [Outcome.DONE, Outcome.MISSING]
    assert one.free == one.buffers


def test_a_tier_that_does_not_say_what_it_keeps_is_charged_the_encoded_length(bench):
    class Silent(MemoryTier):
        def poll(self):
            return [dataclasses.replace(end, nbytes=0) for end in super().poll()]

    one = bench()
    one.tier._inner._inner = Silent(
        MemoryConfig(capacity=10 * LONGEST), TierContext(NAMESPACE, LONGEST, wake=one.woken.set)
    )
    [end] = one.run(one.transfer(Op.STORE, 1, b"object"))
    assert end.nbytes == len("mobject")


WRONG = [ValueError("odd"), MemoryError(), Panic("rust"), SystemExit(3), CorruptError("no"), 0, -1, None, "9"]


@pytest.mark.parametrize("does", [*WRONG, LONGEST + 2], ids=repr)
def test_an_object_that_cannot_be_encoded_is_not_stored_and_the_others_are(bench, does, caplog):
    one = bench(Strange("encode", does))
    ends = one.store(0, 1, 2, 1)
    assert [end.outcome for end in ends] == [Outcome.DONE, Outcome.FAILED, Outcome.DONE, Outcome.FAILED]
    assert (ends[1].reason, ends[1].nbytes) == (Reason.ERROR, 0)
    assert "<CodecChain codec0> could not encode it: " in ends[1].detail
    assert set(one.memory._objects) == {key(0), key(2)}
    [line] = caplog.messages
    assert line.startswith("tier disk: a block is not stored, because <CodecChain codec0> could not encode")
    assert one.free == one.buffers


@pytest.mark.parametrize("does", [*WRONG, LONGEST + 1], ids=repr)
def test_an_object_that_cannot_be_decoded_is_corrupt_and_the_others_are_loaded(bench, does, caplog):
    one = bench(Strange("decode", does))
    one.store(0, 1, 2)
    loads = [one.transfer(Op.LOAD, number) for number in (0, 1, 2, 1)]
    ends = one.run(*loads)
    assert [end.reason for end in ends] == [Reason.NONE, Reason.CORRUPT, Reason.NONE, Reason.CORRUPT]
    assert [bytes(loads[at].region.view()) for at in (0, 2)] == [content(0), content(2)]
    [line] = caplog.messages
    assert line.startswith(f"tier disk: block {key(1).hex()[:16]} cannot be decoded (load: corrupt; ")
    assert one.free == one.buffers


def test_an_object_that_a_codec_cannot_judge_is_a_miss_and_the_others_are_loaded(bench, caplog):
    one = bench(Strange("decode", UnverifiableError("it is of key 7")))
    one.store(0, 1, 2)
    ends = one.run(*[one.transfer(Op.LOAD, number) for number in (0, 1, 2, 1)])
    assert [end.outcome for end in ends] == [Outcome.DONE, Outcome.MISSING] * 2
    assert [end.reason for end in ends] == [Reason.NONE, Reason.MISSING] * 2
    [line] = caplog.messages
    assert line.startswith(
        f"tier disk: block {key(1).hex()[:16]} cannot be judged here, and counts as missing: "
    )
    assert "it is of key 7. If it should be readable" in line
    assert one.free == one.buffers


def test_a_codec_that_decodes_something_else_is_found_by_the_seal(bench, caplog):
    class Forgets(Mark):
        def decode(self, key, source, target):
            nbytes = super().decode(key, source, target)
            target[7] ^= 1
            return nbytes

    one = bench(Forgets())
    one.tier = SealTier(one.tier, NAMESPACE, name="disk")
    one.store(1)
    assert one.load(1)[0].reason is Reason.CORRUPT
    assert caplog.messages[0].startswith("tier disk: block ")


def test_a_tier_that_says_done_and_reads_nothing_serves_nothing_of_another(bench):
    """The buffer still has what was loaded before."""
    one = bench()
    one.tier = SealTier(one.tier, NAMESPACE)
    one.store(1, 2)
    assert one.load(1)[0].outcome is Outcome.DONE
    one.fault = "lie"
    assert one.load(2)[0].reason is Reason.CORRUPT


@pytest.mark.parametrize("op", [Op.STORE, Op.LOAD])
@pytest.mark.parametrize("gated", [False, True])
def test_a_tier_that_answers_twice_is_heard_once(bench, op, gated):
    codec = Gated("decode") if gated else Mark()
    one = bench(codec)
    one.store(1, 2)
    one.fault = "twice"
    transfers = [one.transfer(op, number) for number in (1, 2)]
    one.tier.submit(transfers)
    if gated and op is Op.LOAD:
        # The first answer is being decoded when the second comes.
        give_up_s = time.monotonic() + PATIENCE_S
        while one.tier._inner._inner._done and time.monotonic() < give_up_s:
            assert not one.tier.poll()
        codec.until_entered(2)
        assert not one.tier.poll()
    if gated:
        codec.go_on.set()
    assert [end.outcome for end in one.wait(transfers)] == [Outcome.DONE] * 2
    assert one.free == one.buffers
    one.fault = None
    assert [one.load(number)[1] for number in (1, 2)] == [content(1), content(2)]


def test_an_answer_that_nobody_asked_for_is_ignored(bench):
    codec = Gated("encode")
    one = bench(codec)
    store = one.transfer(Op.STORE, 1)
    one.tier.submit([store])
    codec.until_entered(1)
    # Of a ticket that nobody has given, and of one that is not in the tier yet.
    one.tier._inner._held += [(0, Completion(ticket, Outcome.DONE)) for ticket in (99, store.ticket)]
    assert one.tier.poll() == []
    codec.go_on.set()
    assert one.wait([store])[0].nbytes == LONGEST + 1


class Timed:
    """A bench with the thread and the deadline that each tier has."""

    def __init__(self, one):
        self.one, self.event = one, threading.Event()
        one.tier = DeadlineTier(one.tier, one.woken, "disk", self.event.set)

    def ends(self, *transfers):
        self.one.tier.submit(transfers)
        done, give_up_s = {}, time.monotonic() + PATIENCE_S
        while len(done) < len(transfers):
            assert time.monotonic() < give_up_s
            done |= {end.ticket: end for end in self.one.tier.poll()}
            time.sleep(0.001)
        return [done[transfer.ticket].reason for transfer in transfers]

    def released(self, count):
        tickets, give_up_s = [], time.monotonic() + PATIENCE_S
        while len(tickets) < count:
            assert time.monotonic() < give_up_s
            tickets += self.one.tier.released()
            time.sleep(0.001)
        return set(tickets)


def test_late_tickets_end_once_and_give_region_and_buffer_back(bench):
    one = bench(late_s=0.3)
    timed = Timed(one)
    chain = one.tier._inner
    far_s, near_s = time.monotonic() + PATIENCE_S, time.monotonic() + 0.05
    assert timed.ends(one.transfer(Op.STORE, 1, deadline_s=far_s)) == [Reason.NONE]
    one.fault = "late"
    late = [one.transfer(op, 1 + (op is Op.STORE), deadline_s=near_s) for op in (Op.STORE, Op.LOAD)]
    assert timed.ends(*late) == [Reason.DEADLINE] * 2
    assert timed.released(2) == {transfer.ticket for transfer in late}
    assert one.tier.poll() == []
    assert not chain._ways
    assert len(chain._buffers._free) == one.tier._inner._buffers.count
    one.fault = None
    load = one.transfer(Op.LOAD, 2, deadline_s=time.monotonic() + PATIENCE_S)
    assert timed.ends(load) == [Reason.NONE]
    assert bytes(load.region.view()) == content(2)


@pytest.mark.parametrize("fault", ["error", "full", "late", "twice", "hang", "raise", "block"])
def test_whatever_the_tier_does_each_ticket_ends_in_time(bench, fault):
    one = bench()
    timed = Timed(one)
    ok = one.transfer(Op.STORE, 1, deadline_s=time.monotonic() + PATIENCE_S)
    assert timed.ends(ok) == [Reason.NONE]
    one.fault = fault
    deadline_s = time.monotonic() + 0.5
    count = 4 if fault == "block" else 16  # For two seconds each.
    mixed = [one.transfer((Op.STORE, Op.LOAD)[at % 2], at // 2, deadline_s=deadline_s) for at in range(count)]
    assert len(timed.ends(*mixed)) == count
    one.fault = None


def test_more_than_the_queue_takes_is_refused_and_nothing_of_it_is_started(bench):
    codec = Gated("encode")
    one = bench(codec)
    depth = one.tier.capabilities.queue_depth
    first = [one.transfer(Op.STORE, number) for number in range(depth - 1)]
    one.tier.submit(first)
    with pytest.raises(QueueFullError, match=f"{depth - 1} transfers are open"):
        one.tier.submit([one.transfer(Op.LOAD, 500), one.transfer(Op.LOAD, 501)])
    assert (Op.LOAD, key(500)) not in one.asked
    codec.go_on.set()
    assert {end.outcome for end in one.wait(first)} == {Outcome.DONE}


@pytest.mark.parametrize(
    ("error", "reason"), [(QueueFullError("poll first"), Reason.BUSY), (TierError("away"), Reason.ERROR)]
)
def test_what_the_tier_refuses_ends_at_once_and_the_next_go_on(bench, monkeypatch, error, reason):
    one = bench()
    one.store(1)
    submit, refuses = one.memory.submit, [True] * 6

    def refuse(transfers):
        if refuses and refuses.pop():
            raise error
        submit(transfers)

    monkeypatch.setattr(one.memory, "submit", refuse)
    # More than there are buffers, so that some wait for those that were refused.
    monkeypatch.setattr(one.tier._buffers, "_free", one.tier._buffers._free[:3])
    mixed = [one.transfer(Op.LOAD, 1) for _ in range(20)] + [one.transfer(Op.STORE, n) for n in range(2, 12)]
    ends = one.run(*mixed)
    assert {end.reason for end in ends} == {Reason.NONE, reason}
    assert {end.detail for end in ends if end.reason is reason} == {str(error)}
    assert one.free == 3


@pytest.mark.parametrize("where", ["encode", "decode", "tier"])
def test_close_ends_what_is_on_its_way_wherever_it_is(where):
    codec = Gated(where)
    one = Bench(codec, fault="hang" if where == "tier" else None)
    one.memory._objects[key(1)] = b"m" + content(1)
    mixed = [one.transfer((Op.STORE, Op.LOAD)[at % 2], 1 + at // 2 * (at + 1) % 2) for at in range(40)]
    mixed.append(Transfer(next(one.tickets), Op.LOOKUP, key(1)))
    one.tier.submit(mixed)
    one.tier.poll()
    closing = threading.Thread(target=one.tier.close)
    closing.start()
    codec.go_on.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    done = [end.ticket for end in one.tier.poll()]
    assert len(done) == len(set(done))
    one.tier.close()
    assert one.tier.poll() == []
    with pytest.raises(TierError, match="closed"):
        one.tier.submit([one.transfer(Op.LOAD, 1)])


def test_close_says_of_each_ticket_how_it_ended_and_what_it_says_is_done_is_stored():
    codec, kept = Gated("encode"), {}

    class Keeps(MemoryTier):
        def close(self):
            kept.update(self._objects)
            super().close()

    one = Bench(codec)
    memory = Keeps(MemoryConfig(capacity=200 * LONGEST), TierContext(NAMESPACE, LONGEST))
    one.tier._inner._inner = memory
    memory._objects[key(1)] = b"m" + content(1)
    stores = [one.transfer(Op.STORE, number) for number in range(100, 140)]
    loads = [one.transfer(Op.LOAD, 1) for _ in range(10)]
    one.tier.submit([*stores, *loads])
    codec.until_entered(2)
    threading.Timer(0.05, codec.go_on.set).start()
    one.tier.close()
    ends = {end.ticket: end for end in one.tier.poll()}
    assert set(ends) == {transfer.ticket for transfer in (*stores, *loads)}
    for store in stores:
        assert (ends[store.ticket].outcome is Outcome.DONE) is (store.key in kept)
    for load in loads:
        assert ends[load.ticket].outcome is Outcome.DONE
        assert bytes(load.region.view()) == content(1)


@pytest.mark.parametrize(
    ("longest", "count"), [(100, 64), (4096, 64), (4097, 64), (1 << 20, 63), (8 << 20, 7), (80 << 20, 4)]
)
def test_the_buffers_are_bounded_in_bytes_and_in_number(bench, longest, count):
    one = bench(longest=longest)
    assert one.buffers == count
    slot_bytes = -(-(longest + 1) // 4096) * 4096
    assert len(one.tier._buffers._memory) == count * slot_bytes <= max(64 << 20, 4 * slot_bytes)


def test_stores_leave_half_of_the_buffers_to_loads(bench):
    codec = Gated("encode")
    one = bench(codec, longest=8 << 20)
    stores = [one.transfer(Op.STORE, number) for number in range(40)]
    one.tier.submit(stores)
    codec.until_entered(2)
    assert one.free == one.buffers - one.buffers // 2 == 4
    codec.go_on.set()
    assert {end.outcome for end in one.wait(stores)} == {Outcome.DONE}
    assert one.free == one.buffers


@pytest.mark.parametrize("stuck", ["in the codec", "in the tier"])
def test_loads_are_not_starved_by_stores(bench, stuck):
    """More stores than buffers and threads are stuck, and loads come after them."""
    codec = Gated("encode")
    one = bench(codec, longest=8 << 20)
    one.memory._objects.update({key(number): b"m" + content(number) for number in range(50)})
    if stuck == "in the tier":
        codec.go_on.set()
        one.fault = lambda transfer: "hang" if transfer.op is Op.STORE else None
    stores = [one.transfer(Op.STORE, 100 + number) for number in range(50)]
    one.tier.submit(stores)
    codec.until_entered(2)
    for number in range(50):
        end, got = one.load(number)
        assert (end.outcome, got) == (Outcome.DONE, content(number))


def test_loads_that_wait_go_before_stores_that_wait(bench):
    codec = Gated("decode")
    one = bench(codec, longest=8 << 20)
    one.memory._objects[key(1)] = b"m" + content(1)
    loads = [one.transfer(Op.LOAD, 1) for _ in range(30)]
    stores = [one.transfer(Op.STORE, 100 + number) for number in range(30)]
    one.tier.submit([*loads[:10], *stores, *loads[10:]])
    one.tier.poll()
    codec.go_on.set()
    one.wait([*loads, *stores])
    ops = [op for op, _ in one.asked]
    assert ops[:30] == [Op.LOAD] * 30


def test_its_repr_shows_the_tier_inside(bench):
    assert repr(bench().tier) == "<Codec <Faulty <MemoryTier 0 objects, 0/1000000 bytes>>>"
