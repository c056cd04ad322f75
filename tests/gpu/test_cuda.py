"""The copies on a real GPU. `tests/backends/test_staged.py` has the same on a simulated one, for CI."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "backends"))
from test_device import BLOCKS, SHAPES, content, same
from test_staged import METHODS, paged

from kvbm_core import Stack, chain_keys, make_namespace, root_key
from kvbm_device import StagedDevice, layout_of, open_device
from kvbm_device._cuda import open_cuda
from kvbm_device._pages import TorchMover

pytestmark = pytest.mark.gpu


def on_gpu(layers, moved=None):
    """The same geometry and bytes in GPU memory; tensors of one allocation stay of one, see `moved`, too."""
    moved = {} if moved is None else moved

    def move(tensor):
        storage = tensor.untyped_storage()
        memory = moved.setdefault(storage.data_ptr(), storage.cuda())
        empty = torch.empty(0, dtype=tensor.dtype, device="cuda")
        return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())

    return {name: [move(t) for t in v] if isinstance(v, list) else move(v) for name, v in layers.items()}


def on_cpu(layers):
    return {name: [t.cpu() for t in v] if isinstance(v, list) else v.cpu() for name, v in layers.items()}


def opened(layers, method, fallback=False):
    gpu = open_cuda(0, TorchMover("cuda") if fallback else None)
    layout = layout_of(layers, BLOCKS)
    device = StagedDevice(gpu, layout, 2 * layout.block_bytes[0])
    device.use(method, method)
    return device


def wait(work):
    while not work.done():
        pass
    return work


@pytest.mark.parametrize("method", [*METHODS, "torch"], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_block_moves_bit_for_bit_and_its_neighbours_stay(name, method):
    make, _ = SHAPES[name]
    source, target = on_gpu(make(1)), on_gpu(make(2))
    before, goal = content(on_cpu(source), BLOCKS), content(on_cpu(target), BLOCKS)
    fallback, method = method == "torch", METHODS[0] if method == "torch" else method
    reader, writer = opened(source, method, fallback), opened(target, method, fallback)
    pairs = [(5, 1), (0, 6), (3, 3), (1, 0)]
    regions = paged(len(pairs), reader.traits.block_bytes[0])
    unpin = [reader.pin(r.address, -(-r.nbytes // 4096) * 4096) for r in regions]
    for r in regions:
        writer._pinned.add(r.address, r.nbytes)
    assert not wait(reader.gather([b for b, _ in pairs], regions)).given_up
    wait(writer.scatter(regions, [b for _, b in pairs]))
    for read, written in pairs:
        goal[written] = before[read]
    assert all(same(a, b) for a, b in zip(content(on_cpu(source), BLOCKS), before, strict=True))
    assert all(same(a, b) for a, b in zip(content(on_cpu(target), BLOCKS), goal, strict=True))
    reader.close()
    writer.close()
    for undo in unpin:
        undo()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_engine_that_goes_on_never_mixes_old_and_new(method):  # noqa: C901 - as on the simulated one
    """The engine's stream is kept busy, so that a copy that did not wait would see other bytes."""
    chance, count, words = random.Random(5), 64, 16_384
    memory = torch.zeros(count, words, dtype=torch.int32, device="cuda")
    device = StagedDevice(open_cuda(0), layout_of({"layer": memory}, count), 8 * words * 4)
    device.use(method, method)
    regions = paged(512, device.traits.block_bytes[0])
    base = min(r.address for r in regions)
    unpin = device.pin(base, max(r.address for r in regions) - base + device.traits.block_bytes[0])
    free, now, stored, kept, loading = list(range(512)), [0] * count, [], {}, []
    lost = 0

    def settle():
        nonlocal lost
        for each in list(stored):
            work, places, values = each
            if work.done():
                stored.remove(each)
                lost += len(work.given_up)
                for at, (place, value) in enumerate(zip(places, values, strict=True)):
                    held = torch.frombuffer(regions[place].view()[: words * 4], dtype=torch.int32)
                    if at in work.given_up:
                        free.append(place)
                        continue
                    assert bool((held == value).all()), (value, held.unique())
                    kept[place] = value
        loading[:] = [each for each in loading if not each[0].done()]
        busy = {place for _, _, places in loading for place in places}
        while len(kept) > 64 and (old := next((p for p in kept if p not in busy), None)) is not None:
            del kept[old]
            free.append(old)

    for value in range(1, 600):
        settle()
        usable = sorted(set(range(count)).difference(*(blocks for _, blocks, _ in loading)))
        action = chance.random()
        if action < 0.4 and usable:
            blocks = chance.sample(usable, min(len(usable), 6))
            device.claim(blocks)
            torch.cuda._sleep(chance.choice((0, 100_000, 1_000_000)))
            for block in blocks:
                memory[block] = value
                now[block] = value
        elif action < 0.7 and usable:
            blocks = chance.sample(usable, min(len(usable), 8))
            if len(free) >= len(blocks):
                places = [free.pop() for _ in blocks]
                work = device.gather(blocks, [regions[p] for p in places], device.claim(()))
                stored.append((work, places, [now[b] for b in blocks]))
        elif usable and kept:
            blocks = chance.sample(usable, min(len(usable), 6))
            places = [chance.choice(list(kept)) for _ in blocks]
            work = device.scatter([regions[p] for p in places], blocks, device.claim(blocks))
            loading.append((work, blocks, places))
            for block, place in zip(blocks, places, strict=True):
                now[block] = kept[place]
    while stored or loading:
        settle()
    torch.cuda.synchronize()
    assert memory[:, 0].tolist() == memory[:, -1].tolist() == now
    print(f"{lost} blocks given up")
    device.close()
    unpin()


@pytest.mark.parametrize("copy", ["auto", "staged", "dma", "kernel"])
def test_a_stack_of_host_memory_and_a_lower_tier(copy, tmp_path, caplog):
    caplog.set_level("INFO")
    layers = {
        f"l{i}": torch.randint(0, 2**31, (128, 4096), dtype=torch.int32, device="cuda") for i in range(8)
    }
    device = open_device(layers, 128, copy=copy)
    keys = chain_keys(root_key(), range(64), 1)
    tiers = [{"backend": "cpu", "capacity": "64MiB"}, {"backend": "memory", "capacity": "64MiB"}]
    with Stack.open({"tiers": tiers}, device, make_namespace({"a": copy})) as stack:
        stack.store(keys, range(64))
        stack.wait()
        assert stack.load(keys, range(64, 128)) == 64
        assert {name: count.stored for name, count in stack.counts.items()} == {"cpu": 64, "memory": 64}
    assert all(torch.equal(layer[:64], layer[64:]) for layer in layers.values())
    assert "blocks leave by" in caplog.text
    print(caplog.messages)


def test_staged_device_memory_is_read_back_for_a_checksum():
    memory = torch.randint(0, 255, (4, 8192), dtype=torch.uint8, device="cuda")
    device = open_device({"layer": memory}, 4)
    place = device.stage(8192 + 96)
    device._gpu.copies.copy_rows(torch.cuda.current_stream(), place.address, 0, memory.data_ptr(), 0, 8192, 1)
    torch.cuda.synchronize()
    assert bytes(device.read(place)[:8192]) == bytes(memory[0].cpu().numpy())
    wait(device.scatter([place], [3]))
    assert torch.equal(memory[3], memory[0])
    device.unstage(place)
    device.close()
