"""A medium that holds less than the capacity configured: the oldest blocks make room, and it grows again."""

import logging
import time

import pytest
from test_mover import NAMESPACE, Held, Offered, config, device
from test_planner import NOW, end, keys, planner, status

from kvbm_core import Capabilities, Completion, Op, Outcome, Planner, Reason, Report, Stack, TierStatus
from kvbm_core.block import chain_keys, root_key
from kvbm_core.leader.shortage import FIRST_PAUSE_S, LONGEST_PAUSE_S

NO_SPACE = "[Errno 28] No space left on device"
LATER = NOW + FIRST_PAUSE_S


class Small(Held):
    """Its medium holds `room` blocks, whatever its capacity; other files have the rest."""

    room = 4

    def _run(self, transfer):
        if transfer.op is Op.STORE and transfer.key not in self._objects and len(self._objects) >= self.room:
            return Completion(transfer.ticket, Outcome.FAILED, Reason.FULL, NO_SPACE)
        return super()._run(transfer)


@pytest.fixture(params=[["test"], ["cpu", "test"]], ids=["alone", "below host memory"])
def stack(request):
    registry = Offered(Small)
    with Stack.open(config(*request.param), device(), NAMESPACE, registry=registry) as made:
        made.tier = registry.tiers[0]
        made.tier_name = f"test{len(request.param) - 1}"
        yield made


def fill(stack, start, stop):
    """Store blocks one after the other, each a prompt of its own."""
    for number in range(start, stop):
        [key] = chain_keys(root_key(salt=str(number).encode()), range(1), 1)
        stack.store([key], [number % 16])
        stack.wait()


def test_a_tier_whose_medium_is_full_below_its_capacity_keeps_what_is_new(stack, caplog):
    fill(stack, 0, 600)
    counts = stack.counts[stack.tier_name]
    assert counts.stored >= 590
    assert counts.failed[("store", "full")] <= 10
    assert len(stack.tier._objects) == stack.tier.room
    [key] = chain_keys(root_key(salt=b"599"), range(1), 1)
    assert key in stack.tier._objects, "the newest is there, the oldest made room"
    [line] = [message for message in caplog.messages if "full" in message]
    assert stack.tier_name in line
    assert "16KiB of the 64KiB configured" in line
    assert NO_SPACE in line
    assert "smaller capacity" in line


def test_it_grows_again_when_the_medium_has_room(stack, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "kvbm_core")
    fill(stack, 0, 20)
    stack.tier.room = 16
    real, passed_s = time.monotonic, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed_s)
    for step in range(20, 40):
        passed_s += LONGEST_PAUSE_S
        fill(stack, step, step + 1)
    assert len(stack.tier._objects) == 16
    assert "whole capacity" in caplog.text
    assert stack._planner.levels(real() + passed_s)[stack.tier_name].capacity_now_bytes == 16 * 4096


def full(made, plan, tier, positions, detail=""):
    [op] = plan.stores
    for each in op.tiers:
        failures = dict.fromkeys(positions, Reason.FULL) if each == tier else {}
        made.report([Report(op.op, each, failures, full=each == tier, detail=detail)], NOW)


def stored(made, *numbers, now_s=NOW):
    made.store(keys(*numbers), list(numbers), keys(*numbers), now_s)
    return made.take(now_s)


def test_full_shrinks_to_what_is_held_and_what_is_on_its_way_may_still_arrive():
    made = planner(status("disk", 8, found=(1, 2, 3)))
    first, second = stored(made, 4, 5), stored(made, 6)
    full(made, first, 0, [1])
    assert made.levels(NOW)["disk"].capacity_now_bytes == 5
    assert repr(made._tiers) == "disk 5/5"
    end(made, second)
    plan = stored(made, 7)
    assert plan.drops == [(0, keys(1))]
    end(made, plan)
    assert made.match(keys(6), NOW) == [0]


def test_it_grows_by_a_sixteenth_and_only_what_is_used():
    made = planner(status("disk", 32, found=range(1, 17)))
    full(made, stored(made, 17), 0, [0])
    capacity = lambda: made.levels(NOW)["disk"].capacity_now_bytes  # noqa: E731 - one line, asked six times.
    made.take(LATER - 0.1)
    assert capacity() == 16
    made.take(LATER)
    assert capacity() == 18
    made.take(LATER + 1)
    made.take(LATER + LONGEST_PAUSE_S)
    assert capacity() == 18, "nobody has shown that it holds 18"
    end(made, stored(made, 18, 19, now_s=LATER))
    made.take(LATER + LONGEST_PAUSE_S)
    assert capacity() == 20


def test_the_pause_doubles_as_long_as_there_is_no_more_room():
    made = planner(status("disk", 32, found=range(1, 17)))
    full(made, stored(made, 17), 0, [0])
    now_s, pauses = NOW, []
    for number in range(20, 30):
        began_s = now_s
        while made.levels(now_s)["disk"].capacity_now_bytes == 16:
            now_s += 0.5
            made.take(now_s)
        pauses.append(now_s - began_s)
        [op] = stored(made, number, now_s=now_s).stores
        made.report([Report(op.op, 0, {0: Reason.FULL}, full=True)], now_s)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_it_never_grows_above_the_capacity():
    made = planner(status("disk", 3, found=(1, 2)))
    full(made, stored(made, 3), 0, [0])
    for step in range(1, 10):
        made.take(NOW + step * LONGEST_PAUSE_S)
    assert made.levels(NOW)["disk"].capacity_now_bytes == 3


def test_full_of_staging_is_not_the_mediums():
    made = planner(status("disk", 8, found=(1, 2, 3)))
    [op] = stored(made, 4).stores
    made.report([Report(op.op, 0, {0: Reason.FULL})], NOW)
    assert made.levels(NOW)["disk"].capacity_now_bytes == 8


@pytest.mark.parametrize("capabilities", [Capabilities(None), Capabilities(8, shared=True)])
def test_a_tier_that_keeps_its_own_bound_is_left_as_it_is(capabilities):
    made = Planner([[TierStatus("remote", capabilities, [(each, 1) for each in keys(1, 2)])]])
    before = made.levels(NOW)["remote"].capacity_now_bytes
    full(made, stored(made, 3), 0, [0])
    assert made.levels(NOW)["remote"].capacity_now_bytes == before


def test_a_medium_that_stays_full_after_evicting_is_left_alone_before_all_is_gone():
    made = planner(status("disk", 64, found=range(1, 33)))
    for number in range(100, 110):
        plan = stored(made, number)
        if plan.stores:
            full(made, plan, 0, [0])
    assert made.occupancy["disk"] >= 28
    assert not made.levels(NOW)["disk"].usable


def test_stores_of_the_same_wave_are_no_fault_of_the_tier():
    made = planner(status("disk", 64, found=range(1, 33)))
    plans = [stored(made, number) for number in range(100, 110)]
    for plan in plans:
        full(made, plan, 0, [0])
    assert made.levels(NOW)["disk"].usable
    assert made.occupancy["disk"] == made.levels(NOW)["disk"].capacity_now_bytes == 32


def test_pins_keep_a_full_medium_from_evicting_only_while_they_last():
    made = planner(status("disk", 8, found=(1, 2)))
    made.load("r", keys(1, 2), [1, 2], [0, 0])
    loads = made.take(NOW)
    full(made, stored(made, 3), 0, [0])
    assert not stored(made, 4).stores, "all it holds is being read"
    end(made, loads)
    assert stored(made, 4).drops == [(0, keys(2))]
