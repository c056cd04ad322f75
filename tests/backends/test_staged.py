"""Gather and scatter on an accelerator, on a simulated one; `tests/gpu` runs the same on a real one."""

import ctypes
import mmap
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from simulated_gpu import SimulatedGpu
from test_device import BLOCKS, SHAPES, content, same

from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_core.errors import ConfigError, KvbmError
from kvbm_core.tier import Region
from kvbm_device import layout_of
from kvbm_device._calibration import calibrate
from kvbm_device._link import Method, PinnedMemory, Way, _runs
from kvbm_device._pages import make_page_mover
from kvbm_device._staged import StagedDevice

METHODS = [Method(Way.STAGED), Method(Way.DMA), Method(Way.KERNEL, 8)]

KEYS = chain_keys(root_key(), range(4), 1)
TWO_TIERS = [{"backend": "cpu", "capacity": "1MiB"}, {"backend": "memory", "capacity": "1MiB"}]


def until(condition):
    give_up_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.002)


def paged(count, nbytes):
    """Host regions as a tier lends them: on pages, not neighbours."""
    pitch = (nbytes // 4096 + 1) * 4096
    memory = mmap.mmap(-1, count * pitch)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return [Region(start + at * pitch, nbytes + 96, owner=memory) for at in range(count)]


def opened(layers, gpu, num_blocks=BLOCKS, staging_bytes=0, method=METHODS[0]):
    device = StagedDevice(gpu, layout_of(layers, num_blocks), staging_bytes)
    device.pin(0, 1 << 60)  # All host memory counts as page-locked.
    device.use(method, method)
    return device


def wait(gpu, work):
    for _ in range(10_000):
        if work.done():
            return work
        gpu.step()
    raise AssertionError("the copy never ended")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_block_moves_bit_for_bit_and_its_neighbours_stay(name, method):
    make, _ = SHAPES[name]
    source, target, gpu = make(1), make(2), SimulatedGpu(3)
    before, goal = content(source, BLOCKS), content(target, BLOCKS)
    reader, writer = opened(source, gpu, method=method), opened(target, gpu, method=method)
    pairs = [(5, 1), (0, 6), (3, 3), (1, 0)]
    regions = paged(len(pairs), reader.traits.block_bytes[0])
    random.Random(1).shuffle(regions)
    assert not wait(gpu, reader.gather([b for b, _ in pairs], regions)).given_up
    wait(gpu, writer.scatter(regions, [b for _, b in pairs]))
    moved_bytes = len(pairs) * reader.traits.block_bytes[0]
    assert (reader.counts.gathered_bytes, writer.counts.scattered_bytes) == (moved_bytes, moved_bytes)
    for read, written in pairs:
        goal[written] = before[read]
    assert all(same(a, b) for a, b in zip(content(source, BLOCKS), before, strict=True))
    assert all(same(a, b) for a, b in zip(content(target, BLOCKS), goal, strict=True))
    reader.close()
    writer.close()
    assert not gpu.pinned or gpu.pinned == [(0, 1 << 60)] * 2


@pytest.mark.parametrize("seed", range(12))
def test_an_engine_that_goes_on_never_mixes_old_and_new(seed):  # noqa: C901 - an engine does many things
    """Blocks are written, stored, claimed and written anew while copies run late, in any legal order."""
    chance, count, nbytes = random.Random(seed), 24, 512
    memory = torch.zeros(count, nbytes, dtype=torch.uint8)
    gpu = SimulatedGpu(seed, eager=chance.choice((0.0, 0.2, 0.6)))
    method = chance.choice(METHODS)
    device = opened({"layer": memory}, gpu, count, 1, method)
    device._out.piece_blocks = device._in.piece_blocks = (1 if method.way is Way.STAGED else 3,)
    stored = []  # (work, regions, what they must hold)
    kept = {}  # content to region, of stores that are complete
    loading = {}  # block to (work, region, which must live as long)
    now = [bytes(nbytes)] * count
    given_up = 0

    def settle():
        nonlocal given_up
        for each in list(stored):
            work, regions, contents = each
            if work.done():
                stored.remove(each)
                given_up += len(work.given_up)
                for at, (region, data) in enumerate(zip(regions, contents, strict=True)):
                    if at not in work.given_up:
                        assert bytes(region.view()[:nbytes]) == data
                        kept[data] = region
        for block, (work, _) in list(loading.items()):
            if work.done():
                del loading[block]

    for _ in range(250):
        settle()
        free = [b for b in range(count) if b not in loading]
        action = chance.random()
        if action < 0.4 and free:  # A step of the engine: it claims blocks, then writes them.
            blocks = chance.sample(free, min(len(free), chance.randint(1, 6)))
            device.claim(blocks)
            for block in blocks:
                data = now[block] = chance.randbytes(nbytes)
                address = memory[block].data_ptr()
                gpu.put(gpu.engine, lambda a=address, d=data: ctypes.memmove(a, d, len(d)))
        elif action < 0.7 and free:
            blocks = chance.sample(free, min(len(free), chance.randint(1, 8)))
            regions = paged(len(blocks), nbytes)
            stored.append(
                (device.gather(blocks, regions, device.claim(())), regions, [now[b] for b in blocks])
            )
        elif free and kept:
            blocks = chance.sample(free, min(len(free), chance.randint(1, 6)))
            data = [chance.choice(list(kept)) for _ in blocks]
            regions = [kept[d] for d in data]
            work = device.scatter(regions, blocks, device.claim(blocks))
            for block, each, region in zip(blocks, data, regions, strict=True):
                now[block] = each
                loading[block] = (work, region)
        for _ in range(chance.randint(0, 4)):
            gpu.step()
    while stored or loading:
        settle()
        gpu.step()
    gpu.finish()
    assert [bytes(row.numpy()) for row in memory] == now
    assert kept
    device.close()


def test_what_is_claimed_before_it_was_read_is_given_up_and_says_so():
    memory = torch.arange(8 * 4096, dtype=torch.int32).view(8, -1)
    gpu = SimulatedGpu(1, eager=0)
    device = opened({"layer": memory}, gpu, 8, 1)
    device._out.piece_blocks = (1,)
    regions = paged(8, device.traits.block_bytes[0])
    work = device.gather(range(8), regions, device.claim(()))
    device.claim(range(8))  # Nothing was read yet: two pieces of staging, one block each.
    memory_before = memory.clone()
    gpu.put(gpu.engine, lambda: memory.zero_())
    wait(gpu, work)
    assert work.given_up == set(range(2, 8))
    assert device.counts.staging_full_blocks == 6
    for at in range(2):
        assert bytes(regions[at].view()[:16384]) == bytes(memory_before[at].numpy())
    assert repr(device).endswith("0 waiting, 0 pieces on their way>")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_a_claim_reads_blocks_of_several_stores_behind_all_their_fences(seed, method):
    """A store that was claimed is started before older ones, so the fences are not in the queue's order."""
    memory = torch.zeros(8, 4096, dtype=torch.uint8)
    gpu = SimulatedGpu(seed, eager=0)
    device = opened({"layer": memory}, gpu, 8, 1 << 16, method)
    early = device.claim(())
    gpu.put(gpu.engine, lambda: memory[2].fill_(7))
    late = device.claim(())
    regions = paged(2, device.traits.block_bytes[0])
    works = [device.gather([2], regions[:1], late), device.gather([1], regions[1:], early)]
    device.claim([1, 2])
    assert not any(wait(gpu, work).given_up for work in works)
    assert bytes(regions[0].view()[:4096]) == bytes([7]) * 4096


def test_a_stack_of_host_memory_over_an_accelerator(tmp_path):
    memory = torch.zeros(64, 5000, dtype=torch.uint8)
    for block in range(32):
        memory[block] = torch.frombuffer(bytearray(random.Random(block).randbytes(5000)), dtype=torch.uint8)
    gpu = SimulatedGpu(5, eager=0.9)
    device = opened({"layer": memory}, gpu, 64, 1)
    keys = chain_keys(root_key(), range(32), 1)
    tiers = [{"backend": "cpu", "capacity": "1MiB"}, {"backend": "memory", "capacity": "1MiB"}]
    with Stack.open({"tiers": tiers}, device, make_namespace({"a": 1})) as stack:
        stack.store(keys, range(32))
        stack.wait()
        assert stack.load(keys, range(32, 64)) == 32
        assert torch.equal(memory[32:], memory[:32])
        assert {name: count.stored for name, count in stack.counts.items()} == {"cpu": 32, "memory": 32}


def test_the_calibration_measures_each_way_and_leaves_the_blocks_as_they_were(caplog):
    caplog.set_level("INFO", "kvbm_device")
    memory = torch.randint(0, 255, (16, 4096), dtype=torch.uint8)
    before = memory.clone()
    gpu = SimulatedGpu(2)
    device = StagedDevice(gpu, layout_of({"layer": memory}, 16), 1)
    rates = calibrate(gpu, device, "auto")
    assert [str(rate.method) for rate in rates] == ["staged", "dma", "kernel:8", "kernel:16", "kernel:32"]
    assert torch.equal(memory, before)
    assert not gpu.pinned or len(gpu.pinned) == 2  # What the links hold; the sample is given back.
    assert "blocks leave by" in caplog.text
    table, ways = device.counts.bytes_per_s, ("device_to_host", "host_to_device")
    assert {key[:2] for key in table} == {(str(rate.method), way) for rate in rates for way in ways}
    assert [(str(link.method), way) for link, way in zip(device.links, ways, strict=True)] == sorted(
        (key[:2] for key in table if key[2]), key=lambda key: key[1]
    )
    for way in ("staged", "dma"):
        assert [str(rate.method) for rate in calibrate(gpu, device, way)] == [way]
        assert str(device.links[0].method) == str(device.links[1].method) == way


def small_stack(gpu, **options):
    """Eight blocks on an accelerator, the first four stored in host memory."""
    memory = torch.zeros(8, 5000, dtype=torch.uint8)
    memory[:4] = torch.arange(1, 5, dtype=torch.uint8)[:, None]
    device = opened({"layer": memory}, gpu, 8, 1)
    stack = Stack.open({"tiers": TWO_TIERS, **options}, device, make_namespace({"a": 1}))
    stack.store(KEYS, range(4))
    stack.wait()
    return memory, device, stack


def test_host_memory_stays_page_locked_until_the_copies_under_way_have_ended(monkeypatch):
    gpu, pending = SimulatedGpu(5, eager=0.9), []
    pin = gpu.pin

    def watched(address, nbytes):
        undo = pin(address, nbytes)
        return lambda: (pending.append(sum(map(len, gpu.queues))), undo())

    monkeypatch.setattr(gpu, "pin", watched)
    _, device, stack = small_stack(gpu)
    gpu.eager = 0  # From here on nothing runs by itself.
    stack.store(chain_keys(root_key(), range(8, 12), 1), range(4, 8))
    until(lambda: device._pieces)
    gpu.eager = 0.9
    stack.close()
    assert pending
    assert not any(pending)


def test_a_load_that_a_bug_has_ended_is_written_no_more(monkeypatch):
    gpu = SimulatedGpu(5, eager=0.9)
    memory, _, stack = small_stack(gpu)
    mover = stack._worker._engine

    def bug():
        raise ZeroDivisionError

    monkeypatch.setattr(mover, "_end_copies", bug)
    assert stack.load(KEYS, range(4, 8)) == 0
    memory[4:] = 9  # The engine may give the blocks to others now.
    gpu.finish()
    assert bool((memory[4:] == 9).all())
    stack.close()


@pytest.mark.parametrize("way", ["gather", "scatter"])
def test_a_copy_that_fails_halfway_is_not_under_way_any_more(way, monkeypatch):
    """Its regions and blocks are free for others as soon as that is known."""
    memory = torch.zeros(8, 4096, dtype=torch.uint8)
    gpu = SimulatedGpu(1, eager=0)
    device = opened({"layer": memory}, gpu, 8, 1)
    regions, calls = paged(2, device.traits.block_bytes[0]), []
    for region in regions:
        region.view()[:] = b"\1" * region.nbytes

    def refuse(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KvbmError("out of memory")
        real(*args, **options)

    # The first piece's kernel or copy begins, the second's does not.
    name = "copy_rows" if way == "gather" else "move_pages"
    real = getattr(gpu, name)
    monkeypatch.setattr(gpu, name, refuse)
    copy = {
        "gather": lambda: wait(gpu, device.gather([0], regions[:1], device.claim(()))),
        "scatter": lambda: device.scatter(regions, [0, 1]),
    }
    with pytest.raises(KvbmError):
        copy[way]()
    assert not any(gpu.queues)


@pytest.mark.parametrize("allowed", range(4))
def test_an_accelerator_without_enough_memory_leaves_nothing_page_locked(allowed, monkeypatch):
    """Opening is tried again with less, and the same address cannot be locked twice."""
    memory = torch.zeros(8, 4096, dtype=torch.uint8)
    gpu, taken = SimulatedGpu(0), []
    take = gpu.allocate

    def full(nbytes):
        if len(taken) == allowed:
            raise MemoryError("no memory")
        taken.append(nbytes)
        return take(nbytes)

    monkeypatch.setattr(gpu, "allocate", full)
    with pytest.raises(MemoryError):
        StagedDevice(gpu, layout_of({"layer": memory}, 8), 1)
    assert len(taken) == allowed
    assert gpu.pinned == []


@pytest.mark.parametrize(
    ("room", "staging", "count"),
    [(64, 1 << 20, 64), (17, 1 << 20, 16), (0, 1 << 20, 0), (64, 8 * 8192, 8), (64, 1, 4)],
)
def test_a_device_direct_tier_makes_do_with_what_memory_there_is(room, staging, count, monkeypatch):
    memory = torch.zeros(8, 4096, dtype=torch.uint8)
    gpu = SimulatedGpu(0)
    device, take = opened({"layer": memory}, gpu, 8, staging), gpu.allocate

    def full(nbytes):
        if nbytes > room * 8192:
            raise MemoryError("no memory")
        return take(nbytes)

    monkeypatch.setattr(gpu, "allocate", full)
    places = [device.stage(4192) for _ in range(65)]
    assert [place is not None for place in places] == [True] * count + [False] * (65 - count)
    assert len({place.address for place in places if place}) == count


def test_the_calibration_goes_on_where_memory_cannot_be_page_locked(monkeypatch, caplog):
    memory = torch.randint(0, 255, (16, 4096), dtype=torch.uint8)
    before, gpu = memory.clone(), SimulatedGpu(2)
    device = StagedDevice(gpu, layout_of({"layer": memory}, 16), 1)

    def refuse(address, nbytes):
        raise KvbmError("cuMemHostRegister failed: CUDA_ERROR_NOT_SUPPORTED (801)")

    monkeypatch.setattr(gpu, "pin", refuse)
    calibrate(gpu, device, "auto")
    assert torch.equal(memory, before)
    assert "NOT_SUPPORTED" in caplog.text


def test_a_way_that_needs_a_kernel_is_refused_where_there_is_none():
    memory = torch.zeros(4, 4096, dtype=torch.uint8)
    gpu = SimulatedGpu(2, has_kernel=False)
    device = StagedDevice(gpu, layout_of({"layer": memory}, 4), 1)
    with pytest.raises(ConfigError, match=r"device_copy: 'kernel'.*triton"):
        calibrate(gpu, device, "kernel")


def test_a_kernel_is_not_sent_to_memory_that_is_not_page_locked():
    memory = torch.randint(0, 255, (4, 4096), dtype=torch.uint8)
    gpu = SimulatedGpu(2)
    device = StagedDevice(gpu, layout_of({"layer": memory}, 4), 1)
    device.use(METHODS[2], METHODS[2])
    regions = paged(4, 4096)
    addresses = np.array([region.address for region in regions])
    assert device.links[0]._method(addresses).way is Way.STAGED
    device.pin(regions[0].address, 4 * 8192)
    assert device.links[0]._method(addresses).way is Way.KERNEL


@pytest.mark.parametrize("seed", [1, 2, None])
def test_regions_in_any_order_are_copied_with_few_calls(seed, monkeypatch):
    memory = torch.randint(0, 2**31, (64, 1000), dtype=torch.int32)
    gpu, calls = SimulatedGpu(1), []
    device = opened({"layer": memory}, gpu, 64, 1 << 20)
    assert device.links[0].piece_blocks[0] >= 32
    for name in ("copy_rows", "copy_batch"):
        real = getattr(gpu, name)
        monkeypatch.setattr(
            gpu, name, lambda *a, name=name, real=real, **k: (calls.append(name), real(*a, **k))
        )
    regions = paged(32, device.traits.block_bytes[0])
    if seed is not None:
        random.Random(seed).shuffle(regions)
    wait(gpu, device.gather(range(32), regions))
    wait(gpu, device.scatter(regions, range(32, 64)))
    assert torch.equal(memory[:32], memory[32:])
    # Each way the kernel's jobs, and the blocks.
    assert sorted(calls) == ["copy_batch"] * 2 * (seed is not None) + ["copy_rows"] * (2 + 2 * (seed is None))


def test_neighbours_are_copied_together():
    memory = PinnedMemory()
    memory.add(100, 300)
    memory.add(400, 200)
    found = list(_runs([100, 200, 300, 400, 500, 1000, 900, 950], memory.end_of))
    assert found == [(100, 100, 3), (400, 100, 2), (1000, 0, 1), (900, 50, 2)]
    assert memory.remove(400)
    assert not memory.remove(400)
    assert [memory.end_of(at) for at in (99, 100, 399, 400)] == [0, 400, 400, 0]


KERNEL = """
import sys; sys.path.insert(0, {here!r})
import numpy as np, torch
from test_device import BLOCKS, SHAPES, content, same
from kvbm_device._pages import TritonMover, make_page_mover, page_table
from kvbm_device._views import page_views
mover = make_page_mover("cpu")
assert isinstance(mover, TritonMover) and mover.reaches_host
for name, (make, _) in SHAPES.items():
    source, target = make(1), make(2)
    before, goal = content(source, BLOCKS), content(target, BLOCKS)
    table = page_table(page_views(source, BLOCKS), BLOCKS)
    flat = np.zeros((3, table.block_bytes), dtype=np.uint8)
    def jobs(blocks):
        return np.array([[b, flat[at].ctypes.data] for at, b in enumerate(blocks)], dtype=np.int64)
    out, into = jobs([5, 0, 2]), jobs([1, 4, 6])
    mover(table, out.ctypes.data, 3, 0, gather=True, programs=2)
    mover(page_table(page_views(target, BLOCKS), BLOCKS), into.ctypes.data, 3, 0, gather=False, programs=0)
    for read, written in ((5, 1), (0, 4), (2, 6)):
        goal[written] = before[read]
    assert all(same(a, b) for a, b in zip(content(source, BLOCKS), before)), name
    assert all(same(a, b) for a, b in zip(content(target, BLOCKS), goal)), name
print("all shapes")
"""


def test_the_kernel_moves_the_pages_of_every_shape(request):
    """In Triton's interpreter, which reads host memory; it is chosen when Triton is imported."""
    pytest.importorskip("triton", reason="no Triton here: the kernel is tested where there is")
    code = KERNEL.format(here=str(request.path.parent))
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.stdout.strip() == "all shapes", run.stderr[-3000:]


def test_where_triton_is_missing_torch_moves_the_pages(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not make_page_mover("cpu").reaches_host


@pytest.mark.parametrize("tiers", [TWO_TIERS[:1], TWO_TIERS, TWO_TIERS[1:]], ids=len)
def test_memory_that_cannot_be_page_locked_says_what_that_costs(tiers, monkeypatch, caplog):
    memory = torch.zeros(8, 4096, dtype=torch.uint8)
    gpu = SimulatedGpu(2)
    device = opened({"layer": memory}, gpu, 8, 1)

    def refuse(address, nbytes):
        raise KvbmError("cuMemHostRegister failed: CUDA_ERROR_OUT_OF_MEMORY (2)")

    monkeypatch.setattr(gpu, "pin", refuse)
    with Stack.open({"tiers": tiers}, device, make_namespace({})) as stack:
        stack.store(chain_keys(root_key(), range(4), 1), range(4))
        stack.wait()
        assert [count.stored for count in stack.counts.values()] == [4] * len(tiers)
    assert "OUT_OF_MEMORY" in caplog.text
    assert "GB/s out and" in caplog.text


class OneTrackGpu(SimulatedGpu):
    """Goes on with the stream it is at as long as that has something to begin, as the copy engine does."""

    at = None

    def choose(self, ready):
        if not any(self.at is stream for stream in ready):
            after = next((i for i, s in enumerate(self.queues) if s is self.at), -1) + 1
            order = [*self.queues[after:], *self.queues[:after]]
            self.at = next(s for s in order if any(s is each for each in ready))
        return self.at


@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.parametrize("method", METHODS[:2], ids=str)
def test_long_copies_let_the_engines_own_in_between(method, way, monkeypatch):
    memory = torch.zeros(64, 4096, dtype=torch.uint8)
    gpu, order = OneTrackGpu(eager=0.0), []
    monkeypatch.setattr("kvbm_device._link._PIECE_BYTES", 4096)
    device = opened({"layer": memory}, gpu, 64, 12 << 12, method)
    link = device._out if way == "out" else device._in
    assert (link.pieces, link.piece_blocks) == (6, (1,))
    regions, copy, batch = paged(6, device.traits.block_bytes[0]), gpu.copy_rows, gpu.copy_batch
    for at, region in enumerate(regions):
        (memory[at] if way == "out" else torch.frombuffer(region.view(), dtype=torch.uint8)).fill_(at + 1)
    turns = [link._copies, link._other_copies]

    def noted(enqueue):
        def put(stream, *arguments, **options):
            enqueue(stream, *arguments, **options)
            if any(stream is turn for turn in turns):
                gpu.put(stream, lambda: order.append("ours"))

        return put

    monkeypatch.setattr(gpu, "copy_rows", noted(copy))
    monkeypatch.setattr(gpu, "copy_batch", noted(batch))
    fence = device.claim(())
    gpu.finish()
    ask = device.gather if way == "out" else device.scatter
    pairs = [([at], [region]) if way == "out" else ([region], [at]) for at, region in enumerate(regions)]
    works = [ask(*pair, fence) for pair in pairs]
    device.advance()
    gpu.put(gpu.engine, lambda: order.append("engine"))
    gpu.at = next(s for s in [*turns, link._kernels] if s[0][0] != "wait" or s[0][1]["passed"])
    until(lambda: gpu.step() and all(work.done() for work in works))
    gpu.finish()
    there = [int(region.view()[0]) for region in regions] if way == "out" else [int(r[0]) for r in memory[:6]]
    assert there == [1, 2, 3, 4, 5, 6]
    assert order.count("ours") >= 6
    assert order.index("engine") <= 3, order
