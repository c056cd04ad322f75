"""Several KV groups on an accelerator: a piece holds blocks of one, and a claim does not ask whose."""

import ctypes
import gc
import os
import random
import subprocess
import sys
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from kv_groups import GROUPS, SIZES, memory_of, move_by_hand, moves_of
from simulated_gpu import SimulatedGpu
from test_device import BLOCKS
from test_staged import METHODS, opened, paged, wait

from kvbm_core.errors import ConfigError, KvbmError
from kvbm_core.tier import Region
from kvbm_device import StagedDevice, layout_of
from kvbm_device._calibration import calibrate
from kvbm_device._link import Way
from kvbm_device._pages import TritonMover, page_table


def noted(gpu, monkeypatch):
    """The calls of a kernel: which table, and how many blocks."""
    calls, move_pages = [], gpu.move_pages

    def note(stream, table, jobs, count, flat, **options):
        calls.append((table, count))
        move_pages(stream, table, jobs, count, flat, **options)

    monkeypatch.setattr(gpu, "move_pages", note)
    return calls


@pytest.mark.parametrize("staging_bytes", [0, 2000, 1 << 20])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_the_blocks_of_each_group_move_bit_for_bit_and_every_other_byte_stays(name, method, staging_bytes):
    make, gpu = GROUPS[name], SimulatedGpu(3)
    source, target, goal = make(1), make(2), make(2)
    before = memory_of(source)
    reader, writer = (opened(each, gpu, BLOCKS, staging_bytes, method) for each in (source, target))
    assert reader.traits.block_bytes == SIZES[name]
    regions = [paged(len(moves), SIZES[name][group]) for group, moves in enumerate(moves_of(source))]
    fence = reader.claim(())
    works = [
        reader.gather([read for read, _ in moves], regions[group], fence, group)
        for group, moves in enumerate(moves_of(source))
    ]
    assert not any(wait(gpu, work).given_up for work in works)
    works = [
        writer.scatter(regions[group], [written for _, written in moves], None, group)
        for group, moves in enumerate(moves_of(source))
    ]
    for work in works:
        wait(gpu, work)
    move_by_hand(source, goal)
    assert memory_of(target) == memory_of(goal)
    assert memory_of(source) == before
    moved_bytes = sum(len(moves) * SIZES[name][group] for group, moves in enumerate(moves_of(source)))
    assert (reader.counts.gathered_bytes, writer.counts.scattered_bytes) == (moved_bytes, moved_bytes)


def test_blocks_read_into_device_memory_are_scattered_by_their_groups_table():
    source, target, goal, gpu = *(GROUPS["blocks outermost"](seed) for seed in (1, 2, 2)), SimulatedGpu(1)
    reader, writer = opened(source, gpu), opened(target, gpu)
    for group in (2, 0, 1):  # The first that is staged is the shortest.
        moves, nbytes = moves_of(source)[group], SIZES["blocks outermost"][group]
        regions = paged(len(moves), nbytes)
        wait(gpu, reader.gather([read for read, _ in moves], regions, group=group))
        places = [writer.stage(nbytes + 96) for _ in moves]
        for place, region in zip(places, regions, strict=True):
            ctypes.memmove(place.address, region.address, nbytes)
            assert bytes(writer.read(place)[:nbytes]) == bytes(region.view()[:nbytes])
        wait(gpu, writer.scatter(places, [written for _, written in moves], group=group))
        for place in places:
            writer.unstage(place)
    move_by_hand(source, goal)
    assert memory_of(target) == memory_of(goal)
    assert writer.counts.scattered_bytes == 0, "it did not come from host memory"


def test_a_place_in_device_memory_holds_a_block_of_any_group():
    groups = [{"short": torch.zeros(2, 100)}, {"long": torch.zeros(2, 5000)}, {}]
    device = opened(groups, SimulatedGpu(), 2)
    places = [device.stage(400 + 96), device.stage(20_000 + 96), device.stage(400 + 4096)]
    starts = sorted(place.address for place in places)
    assert min(np.diff(starts)) >= 20_000 + 96
    assert [start % 4096 for start in starts] == [0, 0, 0]


@pytest.mark.parametrize("seed", range(12))
def test_an_engine_that_goes_on_never_mixes_groups_nor_old_and_new(seed):  # noqa: C901 - as with one group
    """A block that was freed by one group is another's next: claimed, written, stored, loaded."""
    chance, count, stride = random.Random(seed), 24, 400
    raw = torch.zeros(count, stride, dtype=torch.uint8)
    sizes = (384, 208, 63)
    groups = [{f"group {size}": raw[:, :size]} for size in sizes]
    gpu = SimulatedGpu(seed, eager=chance.choice((0.0, 0.2, 0.6)))
    method = chance.choice(METHODS)
    device = opened(groups, gpu, count, chance.choice((1, 3000)), method)
    if method.way is Way.STAGED:
        device._out.piece_blocks = device._in.piece_blocks = (1, 1, 2)
    owner, now = [0] * count, [bytes(stride)] * count
    stored, kept, loading = [], {}, {}
    given_up = 0

    def settle():
        nonlocal given_up
        for each in list(stored):
            work, group, regions, contents = each
            if work.done():
                stored.remove(each)
                given_up += len(work.given_up)
                for at, (region, data) in enumerate(zip(regions, contents, strict=True)):
                    if at not in work.given_up:
                        assert bytes(region.view()[: sizes[group]]) == data
                        kept[group, data] = region
        for block, (work, _) in list(loading.items()):
            if work.done():
                del loading[block]

    def becomes(block, group, data):
        owner[block], now[block] = group, data + now[block][len(data) :]

    for _ in range(250):
        settle()
        free = [block for block in range(count) if block not in loading]
        action, group = chance.random(), chance.randrange(len(sizes))
        if action < 0.4 and free:
            blocks = chance.sample(free, min(len(free), chance.randint(1, 6)))
            device.claim(blocks)
            for block in blocks:
                data, address = chance.randbytes(sizes[group]), raw[block].data_ptr()
                becomes(block, group, data)
                gpu.put(gpu.engine, lambda a=address, d=data: ctypes.memmove(a, d, len(d)))
        elif action < 0.7:
            mine = [block for block in free if owner[block] == group]
            if not mine:
                continue
            blocks = chance.sample(mine, min(len(mine), chance.randint(1, 8)))
            regions, contents = paged(len(blocks), sizes[group]), [now[b][: sizes[group]] for b in blocks]
            work = device.gather(blocks, regions, device.claim(()), group)
            stored.append((work, group, regions, contents))
        elif free and (mine := [each for each in kept if each[0] == group]):
            blocks = chance.sample(free, min(len(free), chance.randint(1, 6)))
            chosen = [chance.choice(mine) for _ in blocks]
            regions = [kept[each] for each in chosen]
            work = device.scatter(regions, blocks, device.claim(blocks), group)
            for block, (_, data), region in zip(blocks, chosen, regions, strict=True):
                becomes(block, group, data)
                loading[block] = (work, region)
        for _ in range(chance.randint(0, 12)):
            gpu.step()
    while stored or loading:
        settle()
        gpu.step()
    gpu.finish()
    assert [bytes(row.numpy()) for row in raw] == now
    assert {group for group, _ in kept} == {0, 1, 2}
    device.close()


def test_what_waits_of_one_group_leaves_together(monkeypatch):
    """The requests of a step store blocks of every group each; a launch serves one group's table."""
    groups, gpu = GROUPS["blocks outermost"](1), SimulatedGpu(1)
    device, calls = opened(groups, gpu, BLOCKS, 1 << 20), noted(gpu, monkeypatch)
    first, second = device.claim(()), device.claim(())
    asked = [(0, 0, first), (1, 1, first), (2, 2, first), (3, 0, first), (4, 1, first), (5, 0, second)]
    regions = paged(len(asked), 192)
    works = [
        device.gather([block], [region], fence, group)
        for (block, group, fence), region in zip(asked, regions, strict=True)
    ]
    for work in works:
        assert not wait(gpu, work).given_up
    tables = [page_table(views, BLOCKS) for views in device.layout.groups]
    assert [(tables.index(table), count) for table, count in calls] == [(0, 2), (1, 2), (2, 1), (0, 1)]
    fresh = opened(groups, gpu)
    for (block, group, _), region in zip(asked, regions, strict=True):
        [again] = paged(1, 192)
        wait(gpu, fresh.gather([block], [again], None, group))
        nbytes = SIZES["blocks outermost"][group]
        assert bytes(region.view()[:nbytes]) == bytes(again.view()[:nbytes])


def test_a_wait_that_is_cut_keeps_its_place_among_those_of_other_groups(monkeypatch):
    groups, gpu = GROUPS["blocks outermost"](1), SimulatedGpu(1)
    device, calls = opened(groups, gpu, BLOCKS), noted(gpu, monkeypatch)
    device._out.piece_blocks = (2, 2, 2)
    fence = device.claim(())
    asked = [(0, [0]), (1, [1]), (0, [2, 3, 4]), (2, [5]), (1, [6])]
    works = [device.gather(blocks, paged(len(blocks), 384), fence, group) for group, blocks in asked]
    for work in works:
        wait(gpu, work)
    tables = [page_table(views, BLOCKS) for views in device.layout.groups]
    assert [(tables.index(table), count) for table, count in calls] == [(0, 2), (1, 2), (0, 2), (2, 1)]


def test_groups_with_the_same_pages_leave_as_if_they_were_one(monkeypatch):
    """Layers outermost, as many of each kind: the groups differ in who owns a block, not in where it lies."""
    groups, gpu = GROUPS["shared tensors"](1), SimulatedGpu(1)
    device, calls = opened(groups, gpu, BLOCKS, 1 << 20), noted(gpu, monkeypatch)
    assert device.layout.alike == (0, 0, 2)
    fence, regions = device.claim(()), paged(4, 384)
    works = [device.gather([at], [regions[at]], fence, group) for at, group in enumerate((0, 1, 2, 1))]
    for work in works:
        wait(gpu, work)
    assert [count for _, count in calls] == [3, 1]
    assert device.counts.gathered_bytes == 3 * 384 + 256


@pytest.mark.parametrize("wanted", [range(7), [0, 1, 2], [6]])
def test_a_claim_reads_what_waits_in_its_blocks_of_whatever_group(wanted):
    groups, gpu = GROUPS["blocks outermost"](1), SimulatedGpu(1, eager=0)
    device = opened(groups, gpu, BLOCKS, 8000)
    assert device._out.pieces >= 3, "a claim may hit all groups"
    before, goal = GROUPS["blocks outermost"](1), {}
    regions = [paged(BLOCKS, 384) for _ in groups]
    works = []
    for group in range(3):
        blocks = [block for block in range(BLOCKS) if block % 3 == group]
        works.append(device.gather(blocks, regions[group][: len(blocks)], device.claim(()), group))
        goal[group] = blocks
    device.claim(wanted)
    for block in wanted:  # The engine writes what it has claimed.
        for tensor in groups[block % 3].values():
            part = tensor[block]
            gpu.put(gpu.engine, lambda part=part: part.zero_())
    assert not any(wait(gpu, work).given_up for work in works)
    for group, blocks in goal.items():
        for block, region in zip(blocks, regions[group], strict=False):
            expected = b"".join(bytes(t[block].contiguous().numpy()) for t in before[group].values())
            assert bytes(region.view()[: len(expected)]) == expected


def test_what_a_claim_gives_up_is_counted_and_no_other_groups_copy_is_hurt():
    groups, gpu = GROUPS["blocks outermost"](1), SimulatedGpu(1, eager=0)
    device = opened(groups, gpu)
    device._out.piece_blocks = (1, 1, 1)
    works = [device.gather([b, b + 3], paged(2, 384), device.claim(()), b) for b in range(3)]
    device.claim([0, 1, 3, 4])  # Room for two pieces of one block: those at the head, of the head's group.
    for work in works:
        wait(gpu, work)
    assert [set(work.given_up) for work in works] == [set(), {0, 1}, set()]
    assert device.counts.staging_full_blocks == 2
    assert device.counts.gathered_bytes == 2 * 192 + 2 * 63


@pytest.mark.parametrize(
    ("staging_bytes", "pieces", "piece_blocks", "piece_bytes"),
    [(0, 2, (1, 1), 64), (1000, 2, (3, 5), 240), (1 << 20, 2, (4161, 5461), 262144)],
)
def test_every_piece_begins_at_a_word_of_the_kernel(staging_bytes, pieces, piece_blocks, piece_bytes):
    device = StagedDevice(SimulatedGpu(), layout_of(GROUPS["apart"](1), BLOCKS), staging_bytes)
    link = device.links[0]
    assert (link.pieces, link.piece_blocks, link.piece_bytes) == (pieces, piece_blocks, piece_bytes)


def test_long_blocks_take_no_more_staging_than_there_shall_be():
    layers = [{f"layer {at}": torch.zeros(2, 1 << 20)} for at in range(4)]
    gpu, taken = SimulatedGpu(), []
    allocate = gpu.allocate
    gpu.allocate = lambda nbytes: taken.append(nbytes) or allocate(nbytes)
    out, into = StagedDevice(gpu, layout_of(layers, 2), 24 << 20).links
    assert (out.pieces, into.pieces) == (3, 2)
    assert [nbytes for nbytes in taken if nbytes > 1 << 20] == [12 << 20, 8 << 20]


@pytest.mark.parametrize("group", [-1, 3])
def test_a_group_that_is_not_there_is_refused_by_number(group):
    device = opened(GROUPS["shared tensors"](1), SimulatedGpu())
    regions = paged(1, 384)
    with pytest.raises(ValueError, match=f"^gather of KV group {group}; there are 3$"):
        device.gather([0], regions, None, group)
    with pytest.raises(ValueError, match=f"^scatter of KV group {group}; there are 3$"):
        device.scatter(regions, [0], None, group)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_group_without_layers_has_nothing_to_copy(method):
    groups, gpu = GROUPS["a group without layers"](1), SimulatedGpu(1)
    device, before = opened(groups, gpu, BLOCKS, 1000, method), memory_of(groups)
    nothing = [Region(0, 0), Region(4096, 0)]
    assert wait(gpu, device.gather([0, 1], nothing, None, 3)).given_up == frozenset()
    wait(gpu, device.scatter(nothing, [0, 1], None, 0))
    gpu.finish()
    assert memory_of(groups) == before
    assert repr(device).startswith("<StagedDevice 7 blocks of 384 or 256 bytes, out ")


@pytest.mark.parametrize("name", ["blocks outermost", "a group without layers"])
def test_the_calibration_measures_every_group_and_leaves_the_blocks_as_they_were(name, monkeypatch, caplog):
    caplog.set_level("INFO", "kvbm_device")
    groups, gpu = GROUPS[name](1), SimulatedGpu(2)
    before, calls = memory_of(groups), noted(gpu, monkeypatch)
    device = StagedDevice(gpu, layout_of(groups, BLOCKS), 4000)
    rates = calibrate(gpu, device, "auto")
    assert [str(rate.method) for rate in rates] == ["staged", "dma", "kernel:8", "kernel:16", "kernel:32"]
    assert memory_of(groups) == before
    blocks = Counter()
    for table, count in calls:
        blocks[table] += count
    tables = [page_table(views, BLOCKS) for views in device.layout.groups]
    # All blocks of each group, both ways, by all ways but DMA.
    rounds = 5 * 2 * 4
    assert [blocks[table] for table in tables] == [BLOCKS * rounds if t.block_bytes else 0 for t in tables]
    assert "copies of 7 blocks of " in caplog.text
    assert len(gpu.pinned) == 2, "the links' own"


class TestRebind:
    """An engine that slept has the same tensors elsewhere when it wakes."""

    @pytest.mark.parametrize("method", METHODS, ids=str)
    @pytest.mark.parametrize("name", GROUPS)
    def test_blocks_are_found_where_they_are_then(self, name, method):
        make, gpu = GROUPS[name], SimulatedGpu(4)
        asleep, source, target, goal = (make(seed) for seed in (5, 1, 2, 2))
        device = opened(asleep, gpu, BLOCKS, 1000, method)
        before, regions = memory_of(asleep), []
        device.rebind(source)
        for group, moves in enumerate(moves_of(source)):
            regions.append(paged(len(moves), SIZES[name][group]))
            wait(gpu, device.gather([read for read, _ in moves], regions[group], None, group))
        device.rebind(target)
        for group, moves in enumerate(moves_of(source)):
            wait(gpu, device.scatter(regions[group], [written for _, written in moves], None, group))
        move_by_hand(source, goal)
        assert memory_of(target) == memory_of(goal)
        assert memory_of(asleep) == before
        assert [str(link.method) for link in device.links] == [str(method)] * 2

    def test_groups_that_shared_memory_and_do_no_more_are_told_apart(self):
        make, gpu = GROUPS["shared tensors"], SimulatedGpu(1)
        device = opened(make(1), gpu, BLOCKS, 1 << 20)
        assert device.layout.alike == (0, 0, 2)
        woken = [make(seed)[group] for group, seed in enumerate((2, 3, 4))]
        device.rebind(woken)
        assert device.layout.alike == (0, 1, 2)
        fence, regions = device.claim(()), paged(3, 384)
        works = [device.gather([5], [regions[group]], fence, group) for group in range(3)]
        for group, (work, region) in enumerate(zip(works, regions, strict=True)):
            wait(gpu, work)
            expected = b"".join(bytes(t[5].view(torch.uint8).numpy()) for t in woken[group].values())
            assert bytes(region.view()[: len(expected)]) == expected

    def test_what_is_under_way_is_ended_first(self):
        layers, woken, gpu = {"a": torch.zeros(4, 256)}, {"a": torch.ones(4, 256)}, SimulatedGpu(1, eager=0)
        device = opened(layers, gpu, 4)
        works, regions = [device.gather([0], paged(1, 1024))], paged(1, 1024)
        with pytest.raises(KvbmError, match=r"rebind of .* 1 waiting, 0 pieces on their way>; end what"):
            device.rebind(woken)
        device.advance()
        with pytest.raises(KvbmError, match=r"rebind of .* 0 waiting, 1 pieces on their way>; end what"):
            device.rebind(woken)
        wait(gpu, works[0])
        regions[0].view()[:] = b"\7" * regions[0].nbytes
        load = device.scatter(regions, [2])
        device.rebind(woken)
        assert load.done()
        assert bytes(layers["a"][2].numpy()) == b"\7" * 1024
        assert bool((woken["a"] == 1).all())

    def test_the_tensors_before_live_until_then(self):
        layers, gpu = {"a": torch.zeros(4, 256)}, SimulatedGpu(1)
        before = weakref.ref(layers["a"])
        device = StagedDevice(gpu, layout_of(layers, 4), 1)
        layers.clear()
        gc.collect()
        assert before() is not None
        with pytest.raises(ConfigError, match="the KV tensors have changed"):
            device.rebind({"a": torch.zeros(4, 128)})
        assert before() is not None
        device.rebind({"a": torch.zeros(4, 256)})
        gc.collect()
        assert before() is None

    def test_a_closed_device_stays_closed(self):
        layers = {"a": torch.zeros(4, 256)}
        device = StagedDevice(SimulatedGpu(), layout_of(layers, 4), 1)
        device.close()
        with pytest.raises(KvbmError, match=r"rebind of .*closed"):
            device.rebind(layers)


KERNEL = """
import sys; sys.path.insert(0, {here!r})
import test_staged_groups
test_staged_groups.check_kernel()
print("all groups")
"""


def check_kernel():
    mover = TritonMover("cpu")
    for make in GROUPS.values():
        source, target, goal = make(1), make(2), make(2)
        layouts = [layout_of(each, BLOCKS) for each in (source, target)]
        for group, moves in enumerate(moves_of(source)):
            out, into = (page_table(layout.groups[group], BLOCKS) for layout in layouts)
            flat = np.zeros((len(moves), out.block_bytes + 64), dtype=np.uint8)
            starts = [-(-row.ctypes.data // 16) * 16 for row in flat]
            jobs = [
                np.array([[move[end], at] for move, at in zip(moves, starts, strict=True)], dtype=np.int64)
                for end in (0, 1)
            ]
            mover(out, jobs[0].ctypes.data, len(moves), 0, gather=True, programs=2)
            mover(into, jobs[1].ctypes.data, len(moves), 0, gather=False, programs=0)
        move_by_hand(source, goal)
        assert memory_of(target) == memory_of(goal)
    del out, into
    assert not mover._tables, "a table lives as long as the pages it names"


def test_the_kernel_moves_the_pages_of_each_group(request):
    """As `test_staged.test_the_kernel_moves_the_pages_of_every_shape`."""
    pytest.importorskip("triton", reason="no Triton here: the kernel is tested where there is")
    run = subprocess.run(
        [sys.executable, "-c", KERNEL.format(here=str(request.path.parent))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.stdout.strip() == "all groups", run.stderr[-3000:]
