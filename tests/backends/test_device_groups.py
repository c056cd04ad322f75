"""Several KV groups in one pool, in host memory: each has its own pages, and a block is of one at a time."""

import ctypes
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_groups import GROUPS, SIZES, memory_of, move_by_hand, moves_of
from test_device import BLOCKS, buffer, layered

from kvbm_core.errors import ConfigError, KvbmError
from kvbm_core.tier import Region
from kvbm_device import open_device
from kvbm_device._views import group_views


def regions_of(count, nbytes):
    memory = (ctypes.c_ubyte * max(1, count * nbytes))()
    start = ctypes.addressof(memory)
    return [Region(start + at * nbytes, nbytes, owner=memory) for at in range(count)]


def stored(device, group, blocks):
    regions = regions_of(len(blocks), device.traits.block_bytes[group])
    assert device.gather(blocks, regions, group=group).done()
    return [bytes(region.view()) for region in regions]


@pytest.mark.parametrize("name", GROUPS)
def test_the_blocks_of_each_group_move_bit_for_bit_and_every_other_byte_stays(name):
    make = GROUPS[name]
    source, target, goal = make(1), make(2), make(2)
    before = memory_of(source)
    reader, writer = open_device(source, BLOCKS), open_device(target, BLOCKS)
    assert reader.traits.block_bytes == SIZES[name]
    moved_bytes = 0
    for group, moves in enumerate(moves_of(source)):
        regions = regions_of(len(moves), SIZES[name][group])
        assert reader.gather([read for read, _ in moves], regions, group=group).done()
        assert writer.scatter(regions, [written for _, written in moves], group=group).done()
        moved_bytes += len(moves) * SIZES[name][group]
    move_by_hand(source, goal)
    assert memory_of(target) == memory_of(goal)
    assert memory_of(source) == before
    assert (reader.counts.gathered_bytes, writer.counts.scattered_bytes) == (moved_bytes, moved_bytes)


@pytest.mark.parametrize("name", GROUPS)
def test_what_is_stored_of_a_group_does_not_depend_on_the_others(name):
    groups = GROUPS[name](3)
    together = open_device(groups, BLOCKS)
    for number, layers in enumerate(groups):
        if layers:
            alone = open_device(layers, BLOCKS)
            assert stored(together, number, range(BLOCKS)) == stored(alone, 0, range(BLOCKS))


def test_one_group_is_named_or_not():
    layers = layered("LBHNC")
    assert open_device(layers, BLOCKS).traits == open_device([layers], BLOCKS).traits
    assert stored(open_device([layers], BLOCKS), 0, [4]) == stored(open_device(layers, BLOCKS), 0, [4])


def test_a_device_says_what_its_groups_blocks_take():
    device = open_device(GROUPS["a group without layers"](0), BLOCKS)
    assert repr(device) == "<HostDevice 7 blocks of 384 or 256 bytes, 5 pages in 2 copies>"


def test_a_group_without_layers_has_nothing_to_copy():
    groups = GROUPS["a group without layers"](0)
    device, before = open_device(groups, BLOCKS), memory_of(groups)
    nothing = [Region(0, 0), Region(4096, 0)]
    assert device.gather([0, 1], nothing, group=0).done()
    assert device.scatter(nothing, [0, 1], group=3).done()
    assert memory_of(groups) == before
    with pytest.raises(ConfigError, match="no KV memory"):
        open_device([{}, {}], BLOCKS)


@pytest.mark.parametrize("group", [-1, 3, 99])
def test_a_group_that_is_not_there_is_refused_by_number(group):
    device = open_device(GROUPS["shared tensors"](0), BLOCKS)
    regions = regions_of(1, 384)
    with pytest.raises(ValueError, match=f"^gather of KV group {group}; there are 3$"):
        device.gather([0], regions, group=group)
    with pytest.raises(ValueError, match=f"^scatter of KV group {group}; there are 3$"):
        device.scatter(regions, [0], group=group)


def test_a_region_is_as_long_as_its_groups_block():
    device = open_device(GROUPS["shared tensors"](0), BLOCKS)
    regions = regions_of(1, 256)
    assert device.gather([0], regions, group=2).done()
    with pytest.raises(ValueError, match="needs 384 bytes of host memory"):
        device.gather([0], regions, group=1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (((BLOCKS, 64), (64, 1), 0), ((4, 96), (96, 1), 0)),  # Other strides.
        (((BLOCKS, 64), (64, 1), 0), ((BLOCKS, 64), (64, 1), 32)),  # Across two blocks.
        (((BLOCKS, 8), (64, 1), 0), ((BLOCKS, 80), (80, 1), 0)),  # Only later blocks meet.
    ],
)
def test_groups_of_which_a_block_shares_bytes_with_another_block_are_refused(one, other):
    raw = buffer(2000)
    count = min(one[0][0], other[0][0])
    groups = [{"a": raw.as_strided(*one)[:count]}, {"b": raw.as_strided(*other)[:count]}]
    with pytest.raises(ConfigError, match=r"layer '[ab]' .*: blocks overlap with those of layer '[ab]'"):
        open_device(groups, count)
    for layers in groups:
        assert open_device(layers, count).traits.num_blocks == count


def test_of_many_groups_those_are_named_whose_blocks_share_bytes():
    raw = buffer(1000)
    places = {"a": (100, 200, 0), "b": (10, 200, 10), "c": (10, 20, 30)}  # Bytes, stride, start.
    groups = [{name: raw.as_strided((2, n), (stride, 1), at)} for name, (n, stride, at) in places.items()]
    with pytest.raises(ConfigError, match=r"layer 'a' .*: blocks overlap with those of layer 'c'"):
        open_device(groups, 2)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.data())
def test_groups_are_refused_if_two_blocks_share_a_byte_and_only_then(num_blocks, data):
    raw, groups, owners, shares = torch.zeros(400, dtype=torch.uint8), [], {}, False
    for number in range(data.draw(st.integers(1, 4))):
        nbytes = data.draw(st.integers(1, 24))
        stride = data.draw(st.integers(nbytes, 36))
        start = data.draw(st.integers(0, 400 - num_blocks * stride))
        groups.append({f"layer {number}": raw.as_strided((num_blocks, nbytes), (stride, 1), start)})
        for block in range(num_blocks):
            for byte in range(start + block * stride, start + block * stride + nbytes):
                shares = shares or owners.setdefault(byte, block) != block
    if shares:
        with pytest.raises(ConfigError, match="blocks overlap"):
            group_views(groups, num_blocks)
    else:
        assert len(group_views(groups, num_blocks)) == len(groups)


class TestRebind:
    """An engine that slept has the same tensors elsewhere when it wakes."""

    @pytest.mark.parametrize("name", GROUPS)
    def test_blocks_are_found_where_they_are_then(self, name):
        groups, woken = GROUPS[name](1), GROUPS[name](2)
        device = open_device(groups, BLOCKS)
        device.rebind(woken)
        fresh = open_device(woken, BLOCKS)
        for number, nbytes in enumerate(SIZES[name]):
            if nbytes:
                assert stored(device, number, range(BLOCKS)) == stored(fresh, number, range(BLOCKS))
        assert device.traits == fresh.traits
        assert repr(device) == repr(fresh)

    def test_the_tensors_before_live_until_then_and_those_after_from_then_on(self):
        layers, woken = {"a": torch.zeros(BLOCKS, 64)}, {"a": torch.ones(BLOCKS, 64)}
        before, after = weakref.ref(layers["a"]), weakref.ref(woken["a"])
        device = open_device(layers, BLOCKS)
        layers.clear()
        gc.collect()
        assert before() is not None
        device.rebind(woken)
        woken.clear()
        gc.collect()
        assert before() is None
        assert stored(device, 0, [3]) == [after()[3].numpy().tobytes()]
        device.close()
        gc.collect()
        assert after() is None

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda first: {}, "layer 'full.0' of group 0, .* and there is layer 'window.0' of group 1"),
            (lambda first: first | {"new": torch.zeros(7, 8)}, "and there is layer 'new' of group 0"),
            (lambda first: dict(reversed(first.items())), "layer 'full.0' .* there is layer 'full.2'"),
            (
                lambda first: first | {"full.0": first["full.0"].clone()},
                "layer 'full.1' .* of allocation 1 on",
            ),
            (lambda first: {k: t.view(torch.float16) for k, t in first.items()}, "and .* torch.float16 of"),
            (lambda first: {k: t[:, :1] for k, t in first.items()}, r"\(7, 2, 4, 8\).* and .*\(7, 1, 4, 8\)"),
        ],
        ids=["a layer less", "a layer more", "other order", "other allocations", "other type", "other shape"],
    )
    def test_other_tensors_are_refused_and_the_device_stays_as_it_was(self, change, said):
        groups = GROUPS["shared tensors"](1)
        device = open_device(groups, BLOCKS)
        before = stored(device, 0, range(BLOCKS))
        first, *rest = GROUPS["shared tensors"](2)
        with pytest.raises(ConfigError, match=f"KV tensors have changed: .*{said}.*; open the tiers anew"):
            device.rebind([change(first), *rest])
        assert stored(device, 0, range(BLOCKS)) == before

    def test_other_groups_are_refused(self):
        groups = GROUPS["shared tensors"](1)
        device = open_device(groups, BLOCKS)
        with pytest.raises(ConfigError, match=r"layer 'chunk.0' of group 2, .* and there is no tensor"):
            device.rebind(groups[:2])
        with pytest.raises(ConfigError, match="was no tensor, and there is layer 'new' of group 3"):
            device.rebind([*groups, {"new": torch.zeros(BLOCKS, 8)}])
        with pytest.raises(ConfigError, match="there were 3 KV groups, and there are 4"):
            device.rebind([*groups, {}])

    def test_a_closed_device_stays_closed(self):
        device = open_device(layered("LBHNC"), BLOCKS)
        device.close()
        with pytest.raises(KvbmError, match="closed"):
            device.rebind(layered("LBHNC"))
