"""What is the host-memory tier's own; the contract is in `test_conformance.py`."""

import ctypes
import gc
import hashlib
import itertools
import logging
import mmap
import os
import re
import time
import weakref

import pytest

from kvbm_core.config import ByteSize, convert, parse_size
from kvbm_core.errors import ConfigError, TierOpenError, TransitionError
from kvbm_core.tier import Op, Outcome, Reason, Region, TierContext, Transfer
from kvbm_cpu import CpuConfig, CpuTier
from kvbm_cpu._memory import available_memory
from kvbm_lmdb import LmdbConfig, LmdbTier

BLOCK = 64 * 1024 + 96
NAMESPACE = b"n" * 16


def key(number):
    return hashlib.sha256(str(number).encode()).digest()


def content(number, nbytes=BLOCK):
    return hashlib.shake_128(str(number).encode()).digest(nbytes)


def region(data=None, nbytes=BLOCK):
    memory = mmap.mmap(-1, nbytes)
    if data is not None:
        memory[: len(data)] = data
    return Region(ctypes.addressof(ctypes.c_char.from_buffer(memory)), nbytes, owner=memory)


def run(tier, transfers, timeout_s=20):
    """Submit, wait, and give {ticket: completion}; each ticket exactly once."""
    tier.submit(transfers)
    done, give_up_s = [], time.monotonic() + timeout_s
    while len(done) < len(transfers):
        assert time.monotonic() < give_up_s, (tier, done)
        done += tier.poll()
        time.sleep(0.0002)
    assert sorted(c.ticket for c in done) == sorted(t.ticket for t in transfers)
    return {c.ticket: c for c in done}


def store(tier, number, ticket=1, nbytes=BLOCK):
    return run(tier, [Transfer(ticket, Op.STORE, key(number), region(content(number, nbytes), nbytes))])[
        ticket
    ]


def load(tier, number, nbytes=BLOCK):
    target = region(b"\xaa" * nbytes, nbytes)
    return run(tier, [Transfer(1, Op.LOAD, key(number), target)])[1], bytes(target.view())


def lookup(tier, number):
    return run(tier, [Transfer(1, Op.LOOKUP, key(number))])[1].outcome


def slots_of(tier):
    """Count the longest objects that a tier holds."""
    return tier.capabilities.capacity_bytes // tier.capabilities.charge(BLOCK)


@pytest.fixture(params=["cpu", "lmdb"])
def open_tier(request, tmp_path):
    opened = []

    def open_(capacity=8 << 20, **context):
        facts = TierContext(NAMESPACE, BLOCK, **context)
        if request.param == "cpu":
            tier = CpuTier(CpuConfig(capacity=ByteSize(capacity)), facts)
        else:
            tier = LmdbTier(LmdbConfig(path=str(tmp_path / "kv"), capacity=ByteSize(capacity)), facts)
        opened.append(tier)
        return tier

    yield open_
    for tier in opened:
        tier.close()


def test_a_capacity_below_one_block_is_refused_with_the_least_that_works(open_tier):
    with pytest.raises(
        TierOpenError, match=r"capacity: 4KiB over \d ranks? hold no object of 64.1KiB"
    ) as caught:
        open_tier(4096)
    least = parse_size(re.search(r"write at least (\S+)", str(caught.value))[1])
    capabilities = open_tier(least).capabilities
    assert capabilities.charge(BLOCK) <= capabilities.capacity_bytes


@pytest.fixture
def cpu():
    tier = CpuTier(CpuConfig(capacity=ByteSize(1 << 20)), TierContext(NAMESPACE, BLOCK))
    yield tier
    tier.close()


def test_a_reserved_block_is_not_loadable_before_publish(cpu):
    lent = cpu.reserve(key(1), BLOCK)
    assert lent.nbytes == BLOCK
    assert lent.address % 4096 == 0
    assert cpu.reserve(key(1), BLOCK) is None
    assert cpu.view(key(1)) is None
    assert lookup(cpu, 1) is Outcome.MISSING
    assert store(cpu, 1).reason is Reason.BUSY
    lent.view()[:] = content(1)
    cpu.publish(key(1))
    assert cpu.reserve(key(1), BLOCK) is None
    assert cpu.view(key(1)) == lent
    assert load(cpu, 1)[1] == content(1)


def test_reserve_gives_none_when_full_and_abandon_gives_the_memory_back(cpu):
    slots = slots_of(cpu)
    lent = [cpu.reserve(key(n), BLOCK) for n in range(slots)]
    assert len({r.address for r in lent}) == slots
    assert cpu.reserve(key(slots), BLOCK) is None
    cpu.abandon(key(3))
    # The memory freed last is the warmest.
    assert cpu.reserve(key(slots), BLOCK).address == lent[3].address


def test_a_reserved_region_is_as_long_as_its_object_and_owns_its_pages(cpu):
    lengths = {n: nbytes for n, nbytes in enumerate([1, 4096, 4097, BLOCK - 1, BLOCK])}
    lent = {n: cpu.reserve(key(n), nbytes) for n, nbytes in lengths.items()}
    for n, each in lent.items():
        assert (each.nbytes, each.address % 4096) == (lengths[n], 0)
        each.view()[:] = content(n, lengths[n])
        cpu.publish(key(n))
    for n, nbytes in lengths.items():
        assert cpu.view(key(n)) == lent[n]
        assert bytes(cpu.view(key(n)).view()) == content(n, nbytes)
        assert load(cpu, n)[1][:nbytes] == content(n, nbytes)
    addresses = sorted(each.address for each in lent.values())
    assert all(after - before >= 69_632 for before, after in itertools.pairwise(addresses))


def test_the_next_object_in_a_slot_has_a_length_of_its_own(cpu):
    store(cpu, 1, nbytes=BLOCK)
    where = cpu.view(key(1))
    cpu.discard([key(1)])
    lent = cpu.reserve(key(2), 700)
    assert (lent.address, lent.nbytes) == (where.address, 700)
    cpu.abandon(key(2))
    assert store(cpu, 3, nbytes=900).nbytes == 900
    assert (cpu.view(key(3)).address, cpu.view(key(3)).nbytes) == (where.address, 900)
    assert where.nbytes == BLOCK


@pytest.mark.parametrize("nbytes", [0, BLOCK + 1, 1 << 30])
def test_no_memory_is_reserved_for_a_length_that_no_object_has(cpu, nbytes):
    assert cpu.reserve(key(1), nbytes) is None
    assert cpu.reserve(key(1), BLOCK).nbytes == BLOCK


@pytest.mark.parametrize("call", ["publish", "abandon"])
def test_a_block_that_is_not_reserved_cannot_be_published_or_abandoned(cpu, call):
    with pytest.raises(TransitionError, match="is not reserved"):
        getattr(cpu, call)(key(1))


def test_more_memory_than_there_is_is_refused_with_both_sizes():
    config = CpuConfig(capacity=ByteSize(1 << 50))
    with pytest.raises(TierOpenError, match=r"1024TiB.*are available .*; write a smaller capacity"):
        CpuTier(config, TierContext(NAMESPACE, BLOCK))


def test_what_the_kernel_refuses_is_said_in_sizes(monkeypatch):
    # The kernel itself promises more than there is, and what it has not is refused before.
    monkeypatch.setattr("kvbm_cpu._tier.require_memory", lambda *_: None)
    said = r"capacity: 1048576TiB over 1 ranks: the kernel refused 104857\d.*TiB of memory \(Cannot allocate"
    with pytest.raises(TierOpenError, match=said):
        CpuTier(CpuConfig(capacity=ByteSize(1 << 60)), TierContext(NAMESPACE, BLOCK))


def test_available_memory_obeys_every_enclosing_cgroup(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemFree: 1 kB\nMemAvailable:   1000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/x\n0::/outer/inner\n")
    for name, limit, used in (("outer", "600000", 200000), ("outer/inner", "max", 100)):
        folder = tmp_path / "cgroup" / name
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 30000\nactive_file 20000\n")
    assert available_memory(tmp_path / "proc", tmp_path / "cgroup")[0] == 600000 - 200000 + 50000
    (tmp_path / "cgroup/outer/memory.max").write_text("max\n")
    assert available_memory(tmp_path / "proc", tmp_path / "cgroup")[0] == 1000 * 1024


def test_the_arena_is_resident_from_open():
    def resident_bytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident_bytes()
    tier = CpuTier(CpuConfig(capacity=ByteSize(64 << 20)), TierContext(NAMESPACE, BLOCK))
    assert resident_bytes() - before > 60 << 20
    tier.close()


def test_the_arena_is_pinned_until_close():
    calls = []

    def pin(address, nbytes):
        calls.append((address, nbytes))
        return lambda: calls.remove((address, nbytes))

    cpus = frozenset(os.sched_getaffinity(0))
    tier = CpuTier(CpuConfig(capacity=ByteSize(1 << 20)), TierContext(NAMESPACE, BLOCK, pin=pin, cpus=cpus))
    assert "pinned" in repr(tier)
    # Side by side, each of whole slots, and together the arena.
    calls.sort()
    assert len(calls) == min(len(cpus), 15)
    assert all(nbytes % 69632 == 0 for _, nbytes in calls)
    ends = [address + nbytes for address, nbytes in calls]
    assert [address for address, _ in calls] == [tier._address, *ends[:-1]]
    assert ends[-1] == tier._address + 15 * 69632
    assert frozenset(os.sched_getaffinity(0)) == cpus
    tier.close()
    tier.close()
    assert calls == []


def test_one_part_that_cannot_be_pinned_gives_all_back():
    pinned = []

    def pin(address, nbytes):
        if pinned:
            raise RuntimeError("no more")
        pinned.append(address)
        return lambda: pinned.remove(address)

    tier = CpuTier(CpuConfig(capacity=ByteSize(8 << 20)), TierContext(NAMESPACE, BLOCK, pin=pin))
    assert "pageable" in repr(tier) or len(os.sched_getaffinity(0)) == 1
    tier.close()
    assert pinned == []


def test_refused_pinning_is_said_loudly_and_the_tier_works(caplog):
    def pin(address, nbytes):
        raise RuntimeError("cudaHostRegister: out of memory")

    with caplog.at_level(logging.WARNING):
        tier = CpuTier(CpuConfig(capacity=ByteSize(1 << 20)), TierContext(NAMESPACE, BLOCK, pin=pin))
    assert "cannot page-lock 1020KiB of host memory (RuntimeError: cudaHostRegister: out" in caplog.text
    assert "pageable" in repr(tier)
    assert store(tier, 1).outcome is Outcome.DONE
    tier.close()


def test_the_memory_goes_with_close_but_not_under_a_lent_region():
    tier = CpuTier(CpuConfig(capacity=ByteSize(1 << 20)), TierContext(NAMESPACE, BLOCK))
    arena = weakref.ref(tier._arena)
    lent = tier.reserve(key(1), BLOCK)
    tier.close()
    lent.view()[:] = content(1)
    del lent
    gc.collect()
    assert arena() is None


def test_the_state_in_one_line(cpu):
    store(cpu, 1)
    cpu.reserve(key(2), BLOCK)
    assert repr(cpu) == "<CpuTier 1/15 objects, 1 reserved, pageable>"


def test_a_capacity_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"capacity: 0.*like 8GiB"):
        convert({"capacity": 0}, CpuConfig, "tiers[0] (cpu)")
