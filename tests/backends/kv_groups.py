"""Engines with several KV groups in one pool, as vLLM lays them out, and moves of their blocks by hand."""

import itertools

import torch
from test_device import BLOCKS, buffer, tensors_of


def sliced(raw, layers, shape, strides, starts, dtype=torch.uint8):
    """Layers over one buffer; strides and starts in elements."""
    typed = raw.view(dtype)
    return {f"{name}": typed.as_strided(shape, strides, at) for name, at in zip(layers, starts, strict=True)}


def shared_tensors(seed):
    """Layers outermost: layer i of each group lies in tensor i. The last group has one layer fewer."""
    raw, shape, strides = buffer(3 * BLOCKS * 128, seed), (BLOCKS, 2, 4, 8), (64, 32, 8, 1)
    starts = [at * BLOCKS * 64 for at in range(3)]
    return [
        sliced(raw, [f"{kind}.{at}" for at in range(count)], shape, strides, starts[:count], torch.bfloat16)
        for kind, count in (("full", 3), ("window", 3), ("chunk", 2))
    ]


def padded_states(seed):
    """A recurrent state of 88 bytes in a page of 96, beside attention that needs all of it."""
    raw, starts = buffer(2 * BLOCKS * 96, seed), [0, BLOCKS * 96]
    halves = [at // 2 for at in starts]
    attention = sliced(raw, ["full.0", "full.1"], (BLOCKS, 1, 4, 12), (48, 48, 12, 1), halves, torch.bfloat16)
    return [attention, sliced(raw, ["state.0", "state.1"], (BLOCKS, 1, 1, 88), (96, 96, 96, 1), starts)]


def blocks_outermost(seed):
    """All pages of a block are neighbours, as many as its group has; the rest of the stride is nobody's."""
    raw = buffer(BLOCKS * 400, seed)
    return [
        sliced(raw, ["full.0", "full.1", "full.2"], (BLOCKS, 1, 4, 16), (400, 64, 16, 1), [0, 64, 128]),
        sliced(raw, ["wide.0", "wide.1"], (BLOCKS, 1, 4, 20), (400, 80, 20, 1), [0, 80]),
        sliced(raw, ["odd.0"], (BLOCKS, 1, 3, 21), (400, 63, 21, 1), [0]),
    ]


def kernel_blocks(seed):
    """The kernel of one group works on a quarter of the engine's block."""
    raw = buffer(2 * BLOCKS * 128, seed)
    return [
        sliced(raw, ["full.0", "full.1"], (BLOCKS * 4, 1, 4, 8), (32, 32, 8, 1), [0, BLOCKS * 128]),
        sliced(raw, ["window.0", "window.1"], (BLOCKS, 1, 4, 32), (128, 128, 32, 1), [0, BLOCKS * 128]),
    ]


def apart(seed):
    """Each group in an allocation of its own; no multiple of a word, then many words."""
    odd, even = buffer(BLOCKS * 63, seed), buffer(BLOCKS * 48, seed + 50)
    return [
        sliced(odd, ["odd.0"], (BLOCKS, 1, 3, 21), (63, 63, 21, 1), [0]),
        sliced(even, ["even.0"], (BLOCKS, 1, 3, 16), (48, 48, 16, 1), [0]),
    ]


GROUPS = {
    "shared tensors": shared_tensors,
    "padded states": padded_states,
    "blocks outermost": blocks_outermost,
    "kernel blocks": kernel_blocks,
    "apart": apart,
    "a group without layers": lambda seed: [{}, *shared_tensors(seed)[1:], {}],
    "one group": lambda seed: blocks_outermost(seed)[:1],
}
"""By name: how to make the layers of each group from a seed."""

SIZES = {
    "shared tensors": (384, 384, 256),
    "padded states": (192, 176),
    "blocks outermost": (192, 160, 63),
    "kernel blocks": (256, 256),
    "apart": (63, 48),
    "a group without layers": (0, 384, 256, 0),
    "one group": (192,),
}
"""Bytes of a block of each group."""

MOVES = [(5, 1), (0, 6), (3, 3), (1, 0), (2, 4), (6, 5), (4, 2)]
"""A block of one engine, and one of another. Each belongs to the group of its place, see `moves_of`."""


def moves_of(groups):
    """Divide the moves over groups, in turn: a block belongs to one of them."""
    return [MOVES[number :: len(groups)] for number in range(len(groups))]


def block_of(tensor, block):
    """One block of one tensor, to be read and written."""
    dim = 0 if tensor.shape[0] % BLOCKS == 0 else 1
    count = tensor.shape[dim] // BLOCKS
    return tensor.narrow(dim, block * count, count)


def move_by_hand(source, target):
    """Do the moves of all groups through the tensors' own indexing."""
    for ours, theirs, moves in zip(source, target, moves_of(source), strict=True):
        pairs = list(zip(tensors_of(ours), tensors_of(theirs), strict=True))
        for (one, other), (read, written) in itertools.product(pairs, moves):
            block_of(other, written).copy_(block_of(one, read))


def memory_of(groups):
    """Every byte of every allocation, padding and all."""
    storages = {}
    for tensor in (tensor for layers in groups for tensor in tensors_of(layers)):
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)
    return [bytes(torch.empty(0, dtype=torch.uint8).set_(each.cpu()).numpy()) for each in storages.values()]
