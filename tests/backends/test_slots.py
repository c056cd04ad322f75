"""Objects of any length in slots of one size: what the tiers `cpu` and `gds` have in common."""

import random

import pytest
from test_cpu import NAMESPACE, content, key, region, run
from test_gds import use_engine

from kvbm_core.config import ByteSize
from kvbm_core.tier import PAGE_BYTES, Completion, Op, Outcome, Reason, TierContext, Transfer
from kvbm_cpu import CpuConfig, CpuTier
from kvbm_gds import GdsConfig, GdsTier

MAX = 5 * PAGE_BYTES + 96
SLOT = 6 * PAGE_BYTES
LENGTHS = (1, 96, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 5 * PAGE_BYTES, MAX)
SENTINEL = b"\xa5"


@pytest.fixture(params=["cpu", "threads", "io_uring"])
def tier(request, tmp_path, monkeypatch):
    capacity, context = ByteSize(1 << 20), TierContext(NAMESPACE, MAX, name="upper")
    if request.param == "cpu":
        tier = CpuTier(CpuConfig(capacity=capacity), context)
    else:
        engine = use_engine(request.param, monkeypatch)
        tier = GdsTier(GdsConfig(path=str(tmp_path / "kv"), capacity=capacity, engine=engine), context)
    yield tier
    tier.close()


def store(tier, number, nbytes):
    return run(tier, [Transfer(1, Op.STORE, key(number), region(content(number, nbytes), nbytes))])[1]


def load(tier, number, nbytes=MAX):
    """Load into a region of this length; give the completion and the region's bytes."""
    target = region(SENTINEL * nbytes, nbytes)
    return run(tier, [Transfer(1, Op.LOAD, key(number), target)])[1], bytes(target.view())


def assert_holds(tier, number, nbytes):
    end, data = load(tier, number)
    assert end == Completion(1, Outcome.DONE, nbytes=nbytes)
    assert data[:nbytes] == content(number, nbytes)


def test_an_object_is_charged_a_slot_whatever_its_length(tier):
    capabilities = tier.capabilities
    assert capabilities.unit_bytes == SLOT
    assert capabilities.overhead_bytes == 0
    assert capabilities.capacity_bytes % SLOT == 0
    assert 30 * SLOT < capabilities.capacity_bytes <= 1 << 20
    assert {capabilities.charge(nbytes) for nbytes in LENGTHS} == {SLOT}


@pytest.mark.parametrize("nbytes", LENGTHS)
def test_a_longer_region_gets_the_object_and_keeps_the_rest(tier, nbytes):
    # Each slot has held a longer object before: none of its bytes may come back.
    slots = tier.capabilities.capacity_bytes // SLOT
    for number in range(slots):
        assert store(tier, 1000 + number, MAX).outcome is Outcome.DONE
    tier.discard([key(1000 + number) for number in range(slots)])
    assert store(tier, 1, nbytes) == Completion(1, Outcome.DONE, nbytes=nbytes)
    for longer in (0, 1, PAGE_BYTES, 3 * PAGE_BYTES):
        end, data = load(tier, 1, nbytes + longer)
        assert end == Completion(1, Outcome.DONE, nbytes=nbytes)
        assert data[:nbytes] == content(1, nbytes)
        # O_DIRECT fills the object's last page; host memory is copied to the byte.
        untouched = nbytes if isinstance(tier, CpuTier) else -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        assert data[untouched:] == SENTINEL * max(0, len(data) - untouched)


@pytest.mark.parametrize("nbytes", LENGTHS[1:])
@pytest.mark.parametrize("shorter", ["a byte", "half"])
def test_a_region_that_is_too_short_is_answered_corrupt_and_left_alone(tier, nbytes, shorter):
    store(tier, 1, nbytes)
    length = nbytes - 1 if shorter == "a byte" else nbytes // 2
    end, data = load(tier, 1, length)
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.CORRUPT)
    assert end.detail == f"the object has {nbytes} bytes, {length} were asked for"
    assert data == SENTINEL * length
    assert_holds(tier, 1, nbytes)


def test_a_store_and_a_lookup_say_the_length_of_what_is_kept(tier):
    assert store(tier, 1, 5000).nbytes == 5000
    assert store(tier, 1, 300) == Completion(1, Outcome.DONE, nbytes=5000), "the first is kept"
    assert run(tier, [Transfer(1, Op.LOOKUP, key(1))])[1] == Completion(1, Outcome.DONE, nbytes=5000)
    assert_holds(tier, 1, 5000)
    tier.discard([key(1)])
    assert store(tier, 1, 300).nbytes == 300
    assert_holds(tier, 1, 300)


@pytest.mark.parametrize("nbytes", [0, MAX + 1, SLOT + 1, 3 * SLOT])
def test_a_length_that_no_object_has_is_refused_and_the_slots_beside_it_stay(tier, nbytes):
    slots = tier.capabilities.capacity_bytes // SLOT
    for number in range(slots):
        store(tier, number, MAX)
    tier.discard([key(3)])
    source = region(SENTINEL * 3 * SLOT, 3 * SLOT).part(0, nbytes)
    end = run(tier, [Transfer(1, Op.STORE, key(3), source)])[1]
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.ERROR)
    assert end.detail == f"the object has {nbytes} bytes; a slot takes 1 to {MAX}"
    assert store(tier, 3, MAX).outcome is Outcome.DONE
    for number in range(slots):
        assert_holds(tier, number, MAX)


@pytest.mark.parametrize("seed", range(3))
def test_the_charges_alone_say_when_it_is_full_whatever_the_mix_of_lengths(tier, seed):
    """Ten capacities of objects come and go; never is one refused that the charges permit."""
    rng, held, number = random.Random(seed), {}, 0
    capabilities = tier.capabilities
    slots = capabilities.capacity_bytes // SLOT
    while number < 10 * slots:
        nbytes = rng.choice([rng.choice(LENGTHS), rng.randint(1, MAX)])
        taken = sum(capabilities.charge(each) for each in held.values())
        end = store(tier, number, nbytes)
        if taken + capabilities.charge(nbytes) <= capabilities.capacity_bytes:
            assert end == Completion(1, Outcome.DONE, nbytes=nbytes)
            held[number] = nbytes
        else:
            assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.FULL)
            gone = rng.sample(sorted(held), rng.randint(1, slots))
            tier.discard([key(each) for each in gone])
            for each in gone:
                del held[each]
        number += 1
        if held and number % 7 == 0:
            some = rng.choice(sorted(held))
            assert_holds(tier, some, held[some])
    for each, nbytes in held.items():
        assert_holds(tier, each, nbytes)
