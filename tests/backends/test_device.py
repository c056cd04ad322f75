"""The engine's tensors as byte views, and gather and scatter over them.

Every shape is tested the same way: random bytes, some blocks gathered from one engine and scattered to
other blocks of a second one of the same geometry, then compared through the engine's own tensors.
"""

import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm_core.device import DeviceTraits, Pinnable
from kvbm_core.errors import ConfigError, KvbmError
from kvbm_core.tier import Region
from kvbm_device import HostDevice, Layout, PageView, open_device, page_views

BLOCKS = 7
LAYERS = 3


def buffer(nbytes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def laid_out(order, dtype=torch.bfloat16, seed=0, **sizes):
    """One buffer whose memory order is `order`, for example LBHNC; seen as ``(L, B, ...)`` by letters."""
    memory = [sizes[letter] for letter in order]
    count = int(np.prod(memory))
    typed = buffer(count * torch.empty(0, dtype=dtype).element_size(), seed).view(dtype).reshape(memory)
    return lambda logical: typed.permute(*(order.index(letter) for letter in logical))


def layered(order, logical="LBHNC", dtype=torch.bfloat16, seed=0, **sizes):
    """Layers of one buffer, each seen as `logical` without its L."""
    sizes = {"L": LAYERS, "B": BLOCKS, "H": 2, "N": 4, "C": 8} | sizes
    whole = laid_out(order, dtype, seed, **sizes)(logical)
    return {f"layer.{i}": whole[i] for i in range(sizes["L"])}


def separate(order, logical, dtype=torch.bfloat16, seed=0, **sizes):
    """Layers that are allocations of their own, as engines before 0.29 have them."""
    sizes = {"B": BLOCKS, "H": 2, "N": 4, "D": 8, "K": 2} | sizes
    return {f"layer.{i}": laid_out(order, dtype, seed * 100 + i, **sizes)(logical) for i in range(LAYERS)}


def mla(row, dtype, seed):
    count = BLOCKS * 4 * row * torch.empty(0, dtype=dtype).element_size()
    return {f"layer.{i}": buffer(count, seed + i).view(dtype).reshape(BLOCKS, 4, row) for i in range(LAYERS)}


def mamba_list(seed):
    """conv and ssm states of one page, of two types, with padding behind them (24 + 64 of 96 bytes)."""
    layers = {}
    for i in range(LAYERS):
        raw = buffer(BLOCKS * 96, seed * 100 + i)
        conv = raw.view(torch.bfloat16).as_strided((BLOCKS, 3, 4), (48, 4, 1))
        ssm = raw.view(torch.float32).as_strided((BLOCKS, 2, 8), (24, 8, 1), 6)
        layers[f"mamba.{i}"] = [conv, ssm]
    return layers


# By name: how to make the layers from a seed, and how many views they are.
SHAPES = {
    "separate LBHNC": (lambda s: separate("BHND", "BHND", seed=s), LAYERS),
    "separate NHD": (lambda s: separate("BNHD", "BHND", seed=s), LAYERS),
    "LBHNC": (lambda s: layered("LBHNC", seed=s), LAYERS),
    "LBNHC": (lambda s: layered("LBNHC", seed=s), LAYERS),
    "BLHNC": (lambda s: layered("BLHNC", seed=s), 1),
    "BLNHC": (lambda s: layered("BLNHC", seed=s), 1),
    "LHBNC": (lambda s: layered("LHBNC", seed=s), LAYERS * 2),
    "BLHNC float8": (lambda s: layered("BLHNC", dtype=torch.float8_e4m3fn, seed=s), 1),
    "LBHNC uint8 odd": (lambda s: layered("LBHNC", dtype=torch.uint8, seed=s, C=7, N=3), LAYERS),
    "ROCM": (lambda s: separate("KBNHD", "KBNHD", seed=s), LAYERS * 2),
    "ROCM HND": (lambda s: separate("KBHND", "KBNHD", seed=s), LAYERS * 2),
    "ROCM, blocks first in memory": (lambda s: separate("BKNHD", "KBNHD", seed=s), LAYERS),
    "HPC": (lambda s: separate("BKNHD", "BKNHD", seed=s), LAYERS),
    "HPC, K and V apart in memory": (lambda s: separate("KBNHD", "BKNHD", seed=s), LAYERS * 2),
    "MLA bf16": (lambda s: mla(576, torch.bfloat16, s), LAYERS),
    "MLA float8 rows": (lambda s: mla(656, torch.uint8, s), LAYERS),
    "Mamba list": (mamba_list, LAYERS),
    "Mamba packed": (lambda s: layered("LBHNC", dtype=torch.uint8, seed=s, H=1, N=1, C=88), LAYERS),
    "kernel blocks, layers first": (lambda s: layered("LBHNC", seed=s, B=BLOCKS * 4), LAYERS),
    "kernel blocks, blocks first": (lambda s: layered("BLHNC", seed=s, B=BLOCKS * 4), 1),
    "kernel blocks, ROCM": (lambda s: separate("KBNHD", "KBNHD", seed=s, B=BLOCKS * 2), LAYERS * 2),
}


def regions_for(device, count, extra=0):
    """Host regions at odd distances, so that nothing is aligned by chance."""
    nbytes = device.traits.block_bytes[0] + extra
    pitch = nbytes + 13
    memory = np.full(count * pitch, 0xAB, dtype=np.uint8)
    start = memory.ctypes.data
    return memory, [Region(start + i * pitch, nbytes, owner=memory) for i in range(count)]


def stored(device, blocks):
    _, regions = regions_for(device, len(blocks))
    assert device.gather(blocks, regions).done()
    return [bytes(region.view()) for region in regions]


def tensors_of(layers):
    return [t for value in layers.values() for t in (value if isinstance(value, list) else [value])]


def block_of(tensor, block, num_blocks):
    """One block of one tensor, bit for bit, found through the tensor's own indexing."""
    dim = 0 if tensor.shape[0] % num_blocks == 0 else 1
    k = tensor.shape[dim] // num_blocks
    part = tensor.narrow(dim, block * k, k)
    # `contiguous` leaves odd strides on a dimension of one element, and those cannot be seen as bytes.
    return torch.empty(part.numel(), dtype=part.dtype).copy_(part.reshape(-1)).view(torch.uint8)


def content(layers, num_blocks):
    return [[block_of(t, b, num_blocks).clone() for t in tensors_of(layers)] for b in range(num_blocks)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check_moves(source, target, num_blocks, pairs):
    """Gather from `source`, scatter into `target`; the blocks written equal, all others unchanged."""
    before, goal = content(source, num_blocks), content(target, num_blocks)
    reader, writer = open_device(source, num_blocks), open_device(target, num_blocks)
    _, regions = regions_for(reader, len(pairs))
    reader.gather([b for b, _ in pairs], regions)
    writer.scatter(regions, [b for _, b in pairs])
    for read, written in pairs:
        goal[written] = before[read]
    assert all(same(a, b) for a, b in zip(content(source, num_blocks), before, strict=True))
    assert all(same(a, b) for a, b in zip(content(target, num_blocks), goal, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_a_block_moves_bit_for_bit_and_its_neighbours_stay(name):
    make, _ = SHAPES[name]
    check_moves(make(1), make(2), BLOCKS, [(5, 1), (0, 6), (3, 3), (1, 0)])


@pytest.mark.parametrize("name", SHAPES)
def test_views_cover_each_byte_of_a_block_once(name):
    make, count = SHAPES[name]
    layers = make(1)
    views = page_views(layers, BLOCKS)
    assert len(views) == count
    total = sum(t.numel() * t.element_size() for t in tensors_of(layers))
    assert sum(v.page_bytes for v in views) * BLOCKS == total
    assert not any(v.on_device for v in views)


@pytest.mark.parametrize("name", SHAPES)
def test_the_stored_bytes_do_not_depend_on_addresses(name):
    make, _ = SHAPES[name]
    one = stored(open_device(make(4), BLOCKS), range(BLOCKS))
    _hold = [buffer(n) for n in (100, 5000, 300_000)]  # The second allocation comes to lie elsewhere.
    assert stored(open_device(make(4), BLOCKS), range(BLOCKS)) == one


def test_separate_layers_are_stored_in_the_order_of_the_layers_wherever_they_lie():
    raw = [buffer(BLOCKS * 32, i).reshape(BLOCKS, 1, 1, 32) for i in range(4)]
    raw.sort(key=lambda t: t.data_ptr())
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        layers = {f"layer.{i}": raw[place] for i, place in enumerate(order)}
        expected = b"".join(bytes(raw[place][2].numpy()) for place in order)
        assert stored(open_device(layers, BLOCKS), [2]) == [expected]


def test_the_stored_bytes_are_the_same_after_a_restart():
    code = "import sys; sys.path[:0] = ['tests/backends']; import test_device; print(test_device.digests())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert other.stdout.strip() == str(digests())


def digests():
    """A checksum of some stored blocks of every shape."""
    made = (open_device(make(4), BLOCKS) for make, _ in SHAPES.values())
    return [zlib.crc32(b"".join(stored(device, [3, 1]))) for device in made]


@st.composite
def arrangements(draw):
    order = "".join(draw(st.permutations("LBHNC")))
    split = draw(st.sampled_from([1, 1, 2, 3]))
    num_blocks = draw(st.integers(1, 6))
    sizes = {letter: draw(st.integers(1, 4)) for letter in "LHNC"}
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.float32]))
    return order, num_blocks, {**sizes, "B": num_blocks * split}, dtype


@settings(max_examples=150, deadline=None)
@given(arrangements(), st.data())
def test_any_memory_order_moves_bit_for_bit(arrangement, data):
    order, num_blocks, sizes, dtype = arrangement
    numbers = list(range(num_blocks))
    read = data.draw(st.lists(st.sampled_from(numbers), unique=True))
    written = data.draw(st.permutations(numbers))[: len(read)]
    source, target = (layered(order, dtype=dtype, seed=s, **sizes) for s in (1, 2))
    check_moves(source, target, num_blocks, list(zip(read, written, strict=True)))
    again = layered(order, dtype=dtype, seed=1, **sizes)
    assert stored(open_device(source, num_blocks), numbers) == stored(open_device(again, num_blocks), numbers)


def test_the_layout_of_vllm_0_32_on_cpu():
    raw = buffer(2 * 200 * 4 * 32 * 64 * 2).view(torch.bfloat16)
    shape, strides = (200, 4, 32, 64), (8192, 2048, 64, 1)
    layers = {f"model.layers.{i}.attn": raw.as_strided(shape, strides, i * 200 * 8192) for i in range(2)}
    views = page_views(layers, 200)
    page, start = 16_384, raw.data_ptr()
    assert views == [
        PageView(start, page, page, on_device=False),
        PageView(start + 200 * page, page, page, on_device=False),
    ]
    device = open_device(layers, 200)
    assert repr(device) == "<HostDevice 200 blocks of 32768 bytes, 2 pages in 1 copies>"
    expected = b"".join(bytes(t[77].contiguous().view(torch.uint8).numpy()) for t in layers.values())
    assert stored(device, [77]) == [expected]


def test_layers_that_share_a_tensor_are_one_page():
    layers = layered("LBHNC")
    assert page_views(layers | {"shared": layers["layer.1"]}, BLOCKS) == page_views(layers, BLOCKS)


def test_an_alias_of_another_type_is_one_page():
    tensor = layered("LBHNC", L=1)["layer.0"]
    alias = tensor.view(torch.uint8)
    assert len(page_views({"a": tensor, "b": alias, "c": tensor.transpose(1, 2)}, BLOCKS)) == 1


def test_layers_of_one_group_laid_over_each_other_are_kept_as_one_page():
    raw = buffer(BLOCKS * 96)
    attention = raw.as_strided((BLOCKS, 1, 4, 16), (96, 64, 16, 1))
    state = raw.as_strided((BLOCKS, 80), (96, 1), 8)
    assert [v.page_bytes for v in page_views({"a": attention, "m": [state]}, BLOCKS)] == [88]


def test_padding_between_pages_is_neither_read_nor_written():
    raw = buffer(BLOCKS * 64)
    device = open_device({"a": raw.as_strided((BLOCKS, 1, 1, 40), (64, 40, 40, 1))}, BLOCKS)
    assert device.traits.block_bytes == (40,)
    before = raw.clone()
    _, regions = regions_for(device, 1)
    device.scatter(regions, [2])
    assert bytes(raw[128:168].numpy()) == b"\xab" * 40
    raw[128:168] = before[128:168]
    assert torch.equal(raw, before)


def test_views_of_many_sizes_are_folded_where_they_can_be():
    layers = layered("LBHNC") | {"wide": laid_out("BHNC", B=BLOCKS, H=2, N=4, C=32)("BHNC")}
    device = open_device(layers, BLOCKS)
    assert repr(device).endswith("4 pages in 2 copies>")
    check_moves(layers, {k: v.clone() for k, v in layers.items()}, BLOCKS, [(2, 4)])


@pytest.mark.parametrize(
    ("layer", "num_blocks", "message"),
    [
        (torch.zeros(10, 2, 4, 8), 7, "neither dimension 0 nor 1"),
        (torch.zeros(2, 4, 4, 1, 8), 2, "dimension 0 and 1 may both"),
        (torch.zeros(70), 7, "one dimension"),
        (torch.zeros(7, 4), 0, "num_blocks must be at least 1"),
        (torch.zeros(100).as_strided((7, 8), (4, 1)), 7, "blocks overlap"),
        (torch.zeros(1, 8).expand(7, 8), 7, "blocks overlap"),
        (torch.zeros(2, 600, 600)[:, ::2, ::2], 2, "90000 pieces of 4 bytes"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_by_name(layer, num_blocks, message):
    with pytest.raises(ConfigError) as caught:
        page_views({"odd": layer}, num_blocks)
    assert message in str(caught.value)
    for fact in ("'odd'", str(tuple(layer.shape)), str(tuple(layer.stride())), f"num_blocks {num_blocks}"):
        assert fact in str(caught.value)


def test_layers_that_interleave_are_refused():
    raw = torch.zeros(1000, dtype=torch.uint8)
    layers = {"a": raw.as_strided((7, 8), (16, 1)), "b": raw.as_strided((7, 8), (24, 1), 8)}
    with pytest.raises(ConfigError, match=r"blocks overlap with those of layer '[ab]'"):
        page_views(layers, 7)


def test_layers_that_interleave_without_touching_are_accepted():
    raw = buffer(2000)
    layers = {"a": raw.as_strided((7, 8), (32, 1)), "b": raw.as_strided((7, 4), (64, 1), 8)}
    assert len(page_views(layers, 7)) == 2
    check_moves(layers, dict(layers), 7, [(1, 1)])


def test_a_view_of_memory_that_was_released_is_refused():
    layers = layered("LBHNC")
    layers["layer.0"].untyped_storage().resize_(100)
    with pytest.raises(ConfigError, match="was the memory released"):
        page_views(layers, BLOCKS)


def test_an_empty_state_is_skipped():
    layers, empty = layered("LBHNC"), {"m": [torch.zeros(BLOCKS, 0)]}
    assert page_views(layers | empty, BLOCKS) == page_views(layers, BLOCKS)
    with pytest.raises(ConfigError, match="no KV memory"):
        page_views(empty, BLOCKS)


class TestHostDevice:
    def test_a_longer_region_keeps_its_rest(self):
        device = open_device(layered("LBHNC"), BLOCKS)
        memory, regions = regions_for(device, 2, extra=16)
        device.gather([1, 2], regions)
        assert all(bytes(r.view())[384:] == b"\xab" * 16 for r in regions)
        assert (memory[:384] != 0xAB).any()

    def test_arguments_are_checked_before_anything_is_copied(self):
        layers = layered("LBHNC")
        device = open_device(layers, BLOCKS)
        before = content(layers, BLOCKS)
        memory, regions = regions_for(device, 2)
        short = [regions[0], regions[1].part(0, 383)]
        elsewhere = [regions[0], Region(regions[1].address, regions[1].nbytes, on_device=True)]
        for error, blocks, where in [
            (IndexError, [0, BLOCKS], regions),
            (IndexError, [0, -1], regions),
            (ValueError, [0, 1], short),
            (ValueError, [0, 1], elsewhere),
            (ValueError, [0], regions),
        ]:
            with pytest.raises(error):
                device.gather(blocks, where)
            with pytest.raises(error):
                device.scatter(where, blocks)
        assert (memory == 0xAB).all()
        assert all(same(a, b) for a, b in zip(content(layers, BLOCKS), before, strict=True))

    def test_nothing_works_after_close(self):
        device = open_device(layered("LBHNC"), BLOCKS)
        _, regions = regions_for(device, 1)
        device.close()
        device.close()
        assert repr(device) == "<HostDevice 7 blocks of 384 bytes, closed>"
        with pytest.raises(KvbmError, match="closed"):
            device.gather([0], regions)
        with pytest.raises(KvbmError, match="closed"):
            device.scatter(regions, [0])

    def test_the_memory_lives_as_long_as_the_device(self):
        layers = layered("LBHNC", seed=3)
        expected = stored(open_device(layers, BLOCKS), [4])
        device = open_device(layers, BLOCKS)
        layers.clear()
        _hold = [buffer(LAYERS * BLOCKS * 128, i) for i in range(4)]
        assert stored(device, [4]) == expected

    def test_no_blocks_are_no_work(self):
        device = open_device(layered("LBHNC"), BLOCKS)
        assert device.gather([], []).done()
        assert not isinstance(device, Pinnable)
        assert device.traits == DeviceTraits((384,), BLOCKS)

    def test_other_threads_run_while_it_copies(self):
        layers = {f"l{i}": torch.zeros(2, 1, 1, 64 << 20, dtype=torch.uint8) for i in range(2)}
        device = open_device(layers, 2)
        _, regions = regions_for(device, 1)
        ticks, stop = [], threading.Event()

        def tick():
            while not stop.is_set():
                ticks.append(time.perf_counter())
                time.sleep(0.0005)

        thread = threading.Thread(target=tick)
        thread.start()
        start = time.perf_counter()
        for _ in range(3):
            device.gather([1], regions)
        end = time.perf_counter()
        stop.set()
        thread.join()
        # Held throughout, the lock would leave room for a tick between copies only: 3 or 4.
        assert sum(start < t < end for t in ticks) > 6


def test_an_accelerator_is_refused_by_name():
    with pytest.raises(KvbmError, match="KV tensors on 'meta' are not supported; run on CUDA or on CPU"):
        open_device({"a": torch.empty(BLOCKS, 2, 4, 8, device="meta")}, BLOCKS)


def test_host_and_accelerator_together_are_refused():
    layers = {"a": torch.empty(BLOCKS, 2, 4, 8, device="meta"), "b": torch.empty(BLOCKS, 2, 4, 8)}
    with pytest.raises(KvbmError, match="in several places: cpu, meta"):
        open_device(layers, BLOCKS)
    with pytest.raises(KvbmError, match="not in host memory"):
        HostDevice(Layout(((PageView(0, 8, 8, on_device=True),),), BLOCKS))
