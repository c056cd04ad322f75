import ctypes
import threading
import time

import pytest

from kvbm_core import (
    Completion,
    Op,
    Outcome,
    QueueFullError,
    Reason,
    Region,
    TierContext,
    TierError,
    Transfer,
)
from kvbm_core.layers import SEAL_BYTES, DeadlineTier, SealTier
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing import FaultyTier

PAYLOAD = 100
NBYTES = PAYLOAD + SEAL_BYTES
NAMESPACE, KEY, OTHER = b"n" * 16, b"k" * 32, b"o" * 32


def region(fill=b""):
    memory = (ctypes.c_ubyte * NBYTES)()
    memory[: len(fill)] = list(fill)
    return Region(ctypes.addressof(memory), NBYTES, owner=memory)


def memory_tier(blocks=8):
    return MemoryTier(MemoryConfig(capacity=blocks * NBYTES), TierContext(NAMESPACE, NBYTES))


def run(tier, op, key, place=None):
    tier.submit([Transfer(1, op, key, place or region())])
    return [(completion.outcome, completion.reason) for completion in tier.poll()]


def stored(namespace=NAMESPACE, key=KEY):
    inner = memory_tier()
    tier = SealTier(inner, namespace)
    assert run(tier, Op.STORE, key, region(b"x" * PAYLOAD)) == [(Outcome.DONE, Reason.NONE)]
    return inner, tier


CORRUPT = [(Outcome.FAILED, Reason.CORRUPT)]


def test_checked_gives_back_what_was_stored():
    _, tier = stored()
    place = region()
    assert run(tier, Op.LOAD, KEY, place) == [(Outcome.DONE, Reason.NONE)]
    assert bytes(place.view()[:PAYLOAD]) == b"x" * PAYLOAD
    assert run(tier, Op.LOAD, OTHER) == [(Outcome.MISSING, Reason.MISSING)]
    assert run(tier, Op.LOOKUP, KEY) == [(Outcome.DONE, Reason.NONE)]


def test_a_damaged_block_is_said_once_with_the_tier_and_what_to_do(caplog):
    inner, _ = stored()
    inner._objects[KEY] = bytes(NBYTES)
    tier = SealTier(inner, NAMESPACE, name="disk")
    for _ in range(3):
        assert run(tier, Op.LOAD, KEY) == CORRUPT
    [line] = caplog.messages
    assert line.startswith("tier disk: block ")
    assert "smartctl" in line
    tier.close()
    assert caplog.messages[-1].startswith("2 more in the last")


def test_every_flipped_bit_is_found():
    inner, tier = stored()
    good = inner._objects[KEY]
    for byte in range(NBYTES):
        inner._objects[KEY] = good[:byte] + bytes([good[byte] ^ (1 << (byte % 8))]) + good[byte + 1 :]
        assert run(tier, Op.LOAD, KEY) == CORRUPT, byte


def test_another_keys_or_namespaces_block_is_found():
    inner, tier = stored()
    inner._objects[OTHER] = inner._objects[KEY]
    assert run(tier, Op.LOAD, OTHER) == CORRUPT
    foreign, _ = stored(namespace=b"m" * 16)
    inner._objects[KEY] = foreign._objects[KEY]
    assert run(tier, Op.LOAD, KEY) == CORRUPT


def test_a_block_of_zeros_is_found():
    inner, tier = stored()
    inner._objects[KEY] = bytes(NBYTES)
    assert run(tier, Op.LOAD, KEY) == CORRUPT


class Deadline:
    """A `DeadlineTier` over a misbehaving one."""

    def __init__(self, fault=None):
        self.fault, self.woken = fault, threading.Event()
        inner = FaultyTier(memory_tier(64), lambda transfer: self.fault)
        self.tier = DeadlineTier(inner, threading.Event(), "test", self.woken.set)
        self.place = region()
        self.deadline_s = time.monotonic() + 30

    def submit(self, *tickets, op=Op.STORE, within_s=30.0):
        deadline_s = time.monotonic() + within_s
        self.tier.submit([Transfer(t, op, t.to_bytes(32, "big"), self.place, deadline_s) for t in tickets])

    def wait(self, count):
        got = []
        while len(got) < count and time.monotonic() < self.deadline_s:
            got += self.tier.poll()
            time.sleep(0.001)
        return got

    def released(self):
        while time.monotonic() < self.deadline_s:
            if tickets := self.tier.released():
                return tickets
            time.sleep(0.001)
        return []


@pytest.fixture
def deadline():
    made = Deadline()
    yield made
    made.tier.close()


def test_transfers_pass_through(deadline):
    deadline.submit(1, 2)
    assert {c.ticket for c in deadline.wait(2)} == {1, 2}
    assert deadline.woken.is_set()


def test_a_transfer_that_hangs_fails_at_its_deadline(deadline):
    deadline.fault = "hang"
    deadline.submit(1, within_s=0.05)
    [end] = deadline.wait(1)
    assert end == Completion(1, Outcome.FAILED, Reason.DEADLINE, end.detail)
    assert "look whether its disk or its server hangs" in end.detail
    assert deadline.tier.holds(1)


def test_a_late_transfer_is_completed_once_and_its_region_released_later(deadline):
    deadline.fault = "late"
    deadline.submit(1, within_s=0.05)
    assert [c.reason for c in deadline.wait(1)] == [Reason.DEADLINE]
    assert deadline.released() == [1]
    assert not deadline.tier.holds(1)
    assert deadline.tier.poll() == []


def test_a_tier_that_blocks_delays_nobody_but_itself(deadline):
    deadline.fault = "block"
    deadline.submit(1, within_s=0.05)
    deadline.submit(2, within_s=0.05)
    assert {c.reason for c in deadline.wait(2)} == {Reason.DEADLINE}
    # The tier still sleeps in its first call, so it cannot have let go of anything.
    assert deadline.tier.released() == []


def test_a_tier_that_answers_twice_is_heard_once(deadline):
    deadline.fault = "twice"
    deadline.submit(1)
    assert [c.ticket for c in deadline.wait(1)] == [1]
    deadline.fault = None
    deadline.submit(2)
    assert [c.ticket for c in deadline.wait(1)] == [2]


def test_a_tier_that_raises_fails_the_batch_keeps_the_regions_and_is_left_alone_in_the_end(deadline):
    deadline.fault = "raise"
    for ticket in range(8):
        deadline.submit(ticket)
        says = "RuntimeError in submit"
        assert deadline.wait(1) == [Completion(ticket, Outcome.FAILED, Reason.ERROR, says)]
        assert deadline.tier.holds(ticket)
    with pytest.raises(TierError, match="raised too often"):
        deadline.submit(9)


def test_a_refusal_frees_the_regions():
    class Closed(MemoryTier):
        def submit(self, transfers):
            raise TierError("closed")

    inner = Closed(MemoryConfig(capacity=NBYTES), TierContext(NAMESPACE, NBYTES))
    tier = DeadlineTier(inner, threading.Event(), "closed", lambda: None)
    tier.submit([Transfer(1, Op.STORE, KEY, region(), time.monotonic() + 9)])
    while not (done := tier.poll()):
        time.sleep(0.001)
    assert [c.reason for c in done] == [Reason.ERROR]
    assert not tier.holds(1)
    tier.close()


def test_a_full_queue_refuses_the_whole_batch(deadline):
    deadline.fault = "hang"
    depth = deadline.tier.capabilities.queue_depth
    deadline.submit(*range(depth - 1))
    with pytest.raises(QueueFullError):
        deadline.submit(depth, depth + 1)
    assert not deadline.tier.holds(depth)


@pytest.mark.parametrize(
    "field", ["magic", "version", "seal bytes", "payload bytes", "namespace", "key", "checksum", "padding"]
)
def test_every_field_of_the_seal_is_proved(field):
    starts = {"magic": 0, "version": 8, "seal bytes": 12, "payload bytes": 16, "namespace": 24, "key": 40}
    at = PAYLOAD + {**starts, "checksum": 72, "padding": 88}[field]
    inner, tier = stored()
    good = inner._objects[KEY]
    for bit in range(8):
        inner._objects[KEY] = good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :]
        assert run(tier, Op.LOAD, KEY) == CORRUPT


def test_a_block_of_another_length_is_found():
    """The payload is longer, the seal at its end is whole."""
    inner, tier = stored()
    shorter = (ctypes.c_ubyte * (NBYTES - 4))()
    place = Region(ctypes.addressof(shorter), NBYTES - 4, owner=shorter)
    tier.submit([Transfer(1, Op.STORE, OTHER, place)])
    tier.poll()
    inner._objects[OTHER] = bytes(4) + inner._objects[OTHER]
    assert run(tier, Op.LOAD, OTHER) == CORRUPT


def test_a_tier_that_says_done_and_reads_nothing_is_found():
    tier = SealTier(FaultyTier(stored()[0], lambda transfer: "lie"), NAMESPACE)
    assert run(tier, Op.LOAD, KEY, region(b"y" * NBYTES)) == CORRUPT


def test_a_discard_that_raises_harms_nobody():
    class Fussy(MemoryTier):
        def discard(self, keys):
            raise RuntimeError("no")

    inner = Fussy(MemoryConfig(capacity=9 * NBYTES), TierContext(NAMESPACE, NBYTES))
    made = Deadline()
    made.tier.close()
    made.tier = DeadlineTier(inner, threading.Event(), "fussy", lambda: None)
    made.tier.discard([KEY])
    made.submit(1)
    assert [c.outcome for c in made.wait(1)] == [Outcome.DONE]
    made.tier.close()
    made.tier.close()


def test_a_ticket_nobody_gave_is_ignored(deadline):
    inner = deadline.tier._inner
    inner._held.append((0, Completion(99, Outcome.DONE)))
    deadline.submit(1)
    assert [c.ticket for c in deadline.wait(1)] == [1]
    assert deadline.tier.poll() == []
    assert deadline.tier.released() == []


def test_a_poll_that_raises_is_tried_again(deadline, monkeypatch):
    inner, raised = deadline.tier._inner, threading.Event()

    def poll():
        monkeypatch.undo()
        raised.set()
        raise RuntimeError("once")

    monkeypatch.setattr(inner, "poll", poll)
    deadline.submit(1)
    assert [(c.ticket, c.outcome) for c in deadline.wait(1)] == [(1, Outcome.DONE)]
    assert raised.is_set()
