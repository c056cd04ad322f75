"""Several KV groups on a real GPU. `tests/backends/test_staged_groups.py` has the same on a simulated one."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "backends"))
from kv_groups import GROUPS, SIZES, memory_of, move_by_hand, moves_of
from test_cuda import on_gpu, wait
from test_device import BLOCKS
from test_staged import METHODS, paged

from kvbm_device import StagedDevice, layout_of, open_device
from kvbm_device._cuda import open_cuda
from kvbm_device._pages import TorchMover

pytestmark = pytest.mark.gpu


def groups_on_gpu(groups):
    """The same geometry and bytes in GPU memory: groups that lie over each other still do."""
    moved = {}
    return [on_gpu(layers, moved) for layers in groups]


def opened(groups, method, staging_bytes=4000):
    """A device that copies one way; ``torch``: staged, by torch's indexing in place of the kernel."""
    gpu = open_cuda(0, TorchMover("cuda") if method == "torch" else None)
    device = StagedDevice(gpu, layout_of(groups, BLOCKS), staging_bytes)
    method = METHODS[0] if method == "torch" else method
    device.use(method, method)
    return device


def locked(device, regions):
    """Page-lock regions; a kernel reaches no others."""
    return [device.pin(r.address, -(-r.nbytes // 4096) * 4096) for r in regions]


@pytest.mark.parametrize("method", [*METHODS, "torch"], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_the_blocks_of_each_group_move_bit_for_bit_and_every_other_byte_stays(name, method):
    make = GROUPS[name]
    source, target = groups_on_gpu(make(1)), groups_on_gpu(make(2))
    before, here, goal = memory_of(source), make(1), make(2)
    reader, writer = opened(source, method), opened(target, method)
    assert reader.traits.block_bytes == SIZES[name]
    regions = [paged(len(moves), SIZES[name][group]) for group, moves in enumerate(moves_of(source))]
    flat = [region for each in regions for region in each]
    unpin = locked(reader, flat)
    for region in flat:
        writer._pinned.add(region.address, region.nbytes)
    fence = reader.claim(())
    works = [
        reader.gather([read for read, _ in moves], regions[group], fence, group)
        for group, moves in enumerate(moves_of(source))
    ]
    assert not any(wait(work).given_up for work in works)
    for group, moves in enumerate(moves_of(source)):
        wait(writer.scatter(regions[group], [written for _, written in moves], None, group))
    move_by_hand(here, goal)
    assert memory_of(target) == memory_of(goal)
    assert memory_of(source) == before
    reader.close()
    writer.close()
    for undo in unpin:
        undo()


@pytest.mark.parametrize("name", ["shared tensors", "blocks outermost"])
def test_blocks_read_into_device_memory_are_scattered_by_their_groups_table(name):
    make = GROUPS[name]
    source, target = groups_on_gpu(make(1)), groups_on_gpu(make(2))
    here, goal = make(1), make(2)
    reader, writer = opened(source, METHODS[0]), opened(target, METHODS[0])
    for group in reversed(range(len(source))):  # The first that is staged is the shortest.
        moves, nbytes = moves_of(source)[group], SIZES[name][group]
        regions = paged(len(moves), nbytes)
        wait(reader.gather([read for read, _ in moves], regions, None, group))
        places = [writer.stage(nbytes + 96) for _ in moves]
        for place, region in zip(places, regions, strict=True):
            stream = torch.cuda.current_stream()
            writer._gpu.copies.copy_rows(stream, place.address, 0, region.address, 0, nbytes, 1, waits=True)
            torch.cuda.synchronize()
            assert bytes(writer.read(place)[:nbytes]) == bytes(region.view()[:nbytes])
        wait(writer.scatter(places, [written for _, written in moves], None, group))
        for place in places:
            writer.unstage(place)
    move_by_hand(here, goal)
    assert memory_of(target) == memory_of(goal)
    reader.close()
    writer.close()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_engine_that_goes_on_never_mixes_groups_nor_old_and_new(method):  # noqa: C901 - as on the simulated one
    """A block that was one group's is another's next, while the engine's stream is kept busy."""
    chance, count, words = random.Random(6), 64, 16_384
    memory = torch.zeros(count, words, dtype=torch.int32, device="cuda")
    lengths = (words, 9_000, 1_001)
    groups = [{f"group {length}": memory[:, :length]} for length in lengths]
    device = StagedDevice(open_cuda(0), layout_of(groups, count), 8 * words * 4)
    device.use(method, method)
    regions = paged(512, max(device.traits.block_bytes))
    base = min(region.address for region in regions)
    last = max(region.address for region in regions)
    unpin = device.pin(base, last - base + words * 4 + 4096)
    free, now, owner = list(range(512)), [0] * count, [0] * count
    stored, kept, loading, seen = [], {}, [], set()

    def settle():
        for each in list(stored):
            work, group, places, values = each
            if not work.done():
                continue
            stored.remove(each)
            for at, (place, value) in enumerate(zip(places, values, strict=True)):
                if at in work.given_up:
                    free.append(place)
                    continue
                held = torch.frombuffer(regions[place].view()[: lengths[group] * 4], dtype=torch.int32)
                assert bool((held == value).all()), (group, value, held.unique())
                kept[place] = group, value
                seen.add(group)
        loading[:] = [each for each in loading if not each[0].done()]
        busy = {place for _, _, places in loading for place in places}
        while len(kept) > 64 and (old := next((p for p in kept if p not in busy), None)) is not None:
            del kept[old]
            free.append(old)

    for value in range(1, 600):
        settle()
        usable = sorted(set(range(count)).difference(*(blocks for _, blocks, _ in loading)))
        action, group = chance.random(), chance.randrange(3)
        if action < 0.4 and usable:
            blocks = chance.sample(usable, min(len(usable), 6))
            device.claim(blocks)
            torch.cuda._sleep(chance.choice((0, 100_000, 1_000_000)))
            for block in blocks:
                memory[block, : lengths[group]] = value
                now[block], owner[block] = value, group
        elif action < 0.7:
            mine = [block for block in usable if owner[block] == group]
            blocks = chance.sample(mine, min(len(mine), 8))
            if blocks and len(free) >= len(blocks):
                places = [free.pop() for _ in blocks]
                work = device.gather(blocks, [regions[p] for p in places], device.claim(()), group)
                stored.append((work, group, places, [now[block] for block in blocks]))
        elif usable and (mine := [place for place, (whose, _) in kept.items() if whose == group]):
            blocks = chance.sample(usable, min(len(usable), 6))
            places = [chance.choice(mine) for _ in blocks]
            work = device.scatter([regions[p] for p in places], blocks, device.claim(blocks), group)
            loading.append((work, blocks, places))
            for block, place in zip(blocks, places, strict=True):
                now[block], owner[block] = kept[place][1], group
    while stored or loading:
        settle()
    torch.cuda.synchronize()
    assert memory[:, 0].tolist() == now
    assert [int(memory[block, lengths[owner[block]] - 1]) for block in range(count)] == now
    assert seen == {0, 1, 2}
    device.close()
    unpin()


@pytest.mark.parametrize("copy", ["auto", "staged", "dma", "kernel"])
def test_a_device_over_groups_is_calibrated_and_moves(copy, caplog):
    caplog.set_level("INFO", "kvbm_device")
    raw = torch.randint(0, 2**31, (4, 256, 4096), dtype=torch.int32, device="cuda")
    before = raw.clone()
    groups = [
        {f"full.{at}": raw[at] for at in range(4)},
        {f"window.{at}": raw[at] for at in range(4)},
        {f"state.{at}": raw[at, :, :4000] for at in range(3)},
        {},
    ]
    device = open_device(groups, 256, copy=copy)
    assert torch.equal(raw, before), "the calibration leaves the blocks as they were"
    assert device.traits.block_bytes == (65_536, 65_536, 48_000, 0)
    assert "copies of 256 blocks of 65536 or 48000 bytes" in caplog.text
    for group in range(3):
        blocks = range(64 * group, 64 * group + 32)
        regions = paged(len(blocks), device.traits.block_bytes[group])
        wait(device.gather(blocks, regions, None, group))
        wait(device.scatter(regions, [block + 32 for block in blocks], None, group))
        for tensor in groups[group].values():
            assert torch.equal(tensor[blocks[0] + 32 : blocks[-1] + 33], tensor[blocks[0] : blocks[-1] + 1])
    assert torch.equal(raw[3, 160:192], before[3, 160:192]), "the states have no layer there"
    assert torch.equal(raw[:3, 160:192, 4000:], before[:3, 160:192, 4000:])
    device.close()


@pytest.mark.parametrize("method", [*METHODS, "torch"], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_blocks_are_found_where_they_are_when_the_engine_has_woken(name, method):
    make = GROUPS[name]
    asleep, source, target = (groups_on_gpu(make(seed)) for seed in (5, 1, 2))
    here, goal, before = make(1), make(2), memory_of(asleep)
    device = opened(asleep, method)
    everything = [paged(len(moves), SIZES[name][group]) for group, moves in enumerate(moves_of(source))]
    unpin = locked(device, [region for regions in everything for region in regions])
    for woken, way in ((source, 0), (target, 1)):
        device.rebind(woken)
        for group, (regions, moves) in enumerate(zip(everything, moves_of(source), strict=True)):
            blocks = [move[way] for move in moves]
            copy = (blocks, regions) if way == 0 else (regions, blocks)
            wait((device.gather, device.scatter)[way](*copy, None, group))
    move_by_hand(here, goal)
    assert memory_of(target) == memory_of(goal)
    assert memory_of(asleep) == before
    device.close()
    for undo in unpin:
        undo()
