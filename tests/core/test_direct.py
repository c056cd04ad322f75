"""Tiers that read straight into device memory, below one in host memory."""

import ctypes
import random
from dataclasses import replace

import pytest

from kvbm_core import Backend, Op, Reason, Region, Registry, Stack, Stageable, chain_keys, root_key
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.testing import FaultyTier, MemoryDevice

BLOCK = 4000
NAMESPACE = b"n" * 16
KEYS = chain_keys(root_key(), range(32), 1)


class StagingDevice(MemoryDevice, Stageable):
    """A device whose staging memory is plain memory too; on an accelerator it would be the device's."""

    def __init__(self, num_blocks, block_bytes, places):
        super().__init__(num_blocks, block_bytes)
        self.free = [ctypes.create_string_buffer(block_bytes + 96) for _ in range(places)]
        self.reads = 0

    def stage(self, nbytes):
        if not self.free:
            return None
        memory = self.free.pop()
        assert nbytes == len(memory)
        return Region(ctypes.addressof(memory), nbytes, on_device=True, owner=memory)

    def unstage(self, region):
        self.free.append(region.owner)

    def read(self, region):
        if not isinstance(region, Region):
            return super().read(region)
        self.reads += 1
        return memoryview(bytes(region.view()))


class DirectTier(MemoryTier):
    seen: list

    @property
    def capabilities(self):
        return replace(super().capabilities, device_direct=True)

    def submit(self, transfers):
        self.seen += [(t.op, t.region.on_device) for t in transfers if t.region]
        super().submit(transfers)


def open_stack(device, upper, *, fault=None):
    seen = []

    def open_tier(config, context):
        tier = DirectTier(config, context)
        tier.seen = seen
        return FaultyTier(tier, fault) if fault else tier

    registry = Registry()
    registry._loaded["direct"] = Backend("direct", MemoryConfig, open_tier)
    tiers = [
        *([{"backend": upper, "capacity": 4 * 8192}] if upper else []),
        {"backend": "direct", "capacity": "1MiB"},
    ]
    for block in range(32):
        device.write(block, random.Random(block).randbytes(BLOCK))
    return Stack.open({"tiers": tiers}, device, NAMESPACE, registry=registry), seen


@pytest.mark.parametrize("upper", [None, "memory", "cpu"])
def test_loads_go_from_the_tier_to_device_memory_and_past_host_memory(upper):
    stack, seen = open_stack(device := StagingDevice(64, BLOCK, places=3), upper)
    with stack:
        for at in range(0, 32, 2):
            stack.store(KEYS[at : at + 2], [at, at + 1], KEYS[:at])
            stack.wait()
        assert stack.counts["direct"].stored == 32
        above = stack.counts[upper].stored if upper else 0
        assert stack.load(KEYS, range(32, 64)) == 32
        assert [device.read(32 + at) for at in range(32)] == [device.read(at) for at in range(32)]
        loaded = stack.counts["direct"].loaded
        assert loaded >= 24
        assert device.reads == loaded, "every block was verified"
        assert seen.count((Op.LOAD, True)) == loaded
        assert (Op.LOAD, False) not in seen
        assert (Op.STORE, True) not in seen
        if upper:
            assert stack.counts[upper].stored == above, "nothing passed host memory"
    assert len(device.free) == 3


def test_a_device_that_cannot_stage_is_loaded_through_host_memory():
    stack, seen = open_stack(device := MemoryDevice(64, BLOCK), None)
    with stack:
        stack.store(KEYS, range(32))
        stack.wait()
        assert stack.load(KEYS, range(32, 64)) == 32
    assert device.read(63) == device.read(31)
    assert (Op.LOAD, True) not in seen


def test_a_wrong_bit_is_found_in_device_memory():
    fault = lambda transfer: "flip" if transfer.key == KEYS[5] else None  # noqa: E731
    stack, _ = open_stack(device := StagingDevice(64, BLOCK, places=3), None, fault=fault)
    with stack:
        stack.store(KEYS, range(32))
        stack.wait()
        assert stack.load(KEYS, range(32, 64)) == 5
        assert stack.counts["direct"].failed == {("load", Reason.CORRUPT.value): 1}
    assert len(device.free) == 3
