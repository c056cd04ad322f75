"""What is the host-memory tier's own; the contract is in `test_conformance.py`."""

import ctypes
import gc
import hashlib
import logging
import mmap
import os
import time
import weakref

import pytest

from kvbm_core.config import ByteSize, convert
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
    with pytest.raises(TierOpenError, match="capacity: 4096 bytes") as caught:
        open_tier(4096)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert open_tier(least).capabilities.capacity_blocks >= 1


@pytest.fixture
def cpu():
    tier = CpuTier(CpuConfig(capacity=ByteSize(1 << 20)), TierContext(NAMESPACE, BLOCK))
    yield tier
    tier.close()


def test_a_reserved_block_is_not_loadable_before_publish(cpu):
    lent = cpu.reserve(key(1))
    assert lent.nbytes == BLOCK
    assert lent.address % 4096 == 0
    assert cpu.reserve(key(1)) is None
    assert cpu.view(key(1)) is None
    assert lookup(cpu, 1) is Outcome.MISSING
    assert store(cpu, 1).reason is Reason.BUSY
    lent.view()[:] = content(1)
    cpu.publish(key(1))
    assert cpu.reserve(key(1)) is None
    assert cpu.view(key(1)) == lent
    assert load(cpu, 1)[1] == content(1)


def test_reserve_gives_none_when_full_and_abandon_gives_the_memory_back(cpu):
    slots = cpu.capabilities.capacity_blocks
    lent = [cpu.reserve(key(n)) for n in range(slots)]
    assert len({r.address for r in lent}) == slots
    assert cpu.reserve(key(slots)) is None
    cpu.abandon(key(3))
    # The memory freed last is the warmest.
    assert cpu.reserve(key(slots)).address == lent[3].address


@pytest.mark.parametrize("call", ["publish", "abandon"])
def test_a_block_that_is_not_reserved_cannot_be_published_or_abandoned(cpu, call):
    with pytest.raises(TransitionError, match="is not reserved"):
        getattr(cpu, call)(key(1))


def test_more_memory_than_there_is_is_refused_with_both_sizes():
    config = CpuConfig(capacity=ByteSize(1 << 50))
    with pytest.raises(TierOpenError, match=r"1024TiB.*are available .*; write a smaller capacity"):
        CpuTier(config, TierContext(NAMESPACE, BLOCK))


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
    assert "cudaHostRegister: out of memory" in caplog.text
    assert "pageable" in repr(tier)
    assert store(tier, 1).outcome is Outcome.DONE
    tier.close()


def test_the_memory_goes_with_close_but_not_under_a_lent_region():
    tier = CpuTier(CpuConfig(capacity=ByteSize(1 << 20)), TierContext(NAMESPACE, BLOCK))
    arena = weakref.ref(tier._arena)
    lent = tier.reserve(key(1))
    tier.close()
    lent.view()[:] = content(1)
    del lent
    gc.collect()
    assert arena() is None


def test_the_state_in_one_line(cpu):
    store(cpu, 1)
    cpu.reserve(key(2))
    assert repr(cpu) == "<CpuTier 1/15 blocks, 1 reserved, pageable>"


def test_a_capacity_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"capacity: 0.*like 8GiB"):
        convert({"capacity": 0}, CpuConfig, "tiers[0] (cpu)")
