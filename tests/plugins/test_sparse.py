"""Of a sparse group those blocks are stored that some boundary needs, and no others."""

import itertools
import math
import random

import pytest

from kvbm_core import load_config
from kvbm_core.groups import Coverage, KvGroup, Rule
from kvbm_engine._fences import Fences
from kvbm_engine._requests import RequestState
from kvbm_engine._sparse import SparseStores, prompt_ends, sparse_stores

WINDOW = KvGroup(16, Coverage(Rule.WINDOW, 40))
CHUNK = KvGroup(16, Coverage(Rule.CHUNK, 64))


def needed(group, boundaries, first, stop):
    """Look at each block and each boundary by itself."""
    return [
        block
        for block in range(first, stop)
        if any(
            (block + 1) * group.block_tokens > group.coverage.first_token(boundary)
            and (block + 1) * group.block_tokens <= boundary
            for boundary in boundaries
        )
    ]


@pytest.mark.parametrize("seed", range(300))
def test_the_blocks_are_those_that_some_boundary_needs(seed):
    rng = random.Random(seed)
    size = rng.choice([1, 4, 16])
    alignment = size * rng.choice([1, 2, 3])
    rule = rng.choice([Rule.WINDOW, Rule.CHUNK, Rule.STATE])
    group = KvGroup(size, Coverage(rule, 0 if rule is Rule.STATE else rng.randint(1, 12 * size)))
    every = rng.choice([None, rng.randint(1, 20 * size)])
    marks = [rng.randrange(100 * size) for _ in range(rng.randrange(5))]
    first = rng.randrange(60)
    stop = first + rng.randrange(40)
    boundaries = {mark // alignment * alignment for mark in marks}
    if every is not None:
        step = math.ceil(every / alignment) * alignment
        boundaries |= set(range(0, 300 * size, step))

    wanted = SparseStores(every).wanted(group, first, stop, marks, alignment)

    assert wanted == needed(group, boundaries, first, stop)


@pytest.mark.parametrize("seed", range(50))
def test_blocks_asked_for_in_pieces_are_the_same(seed):
    rng = random.Random(seed)
    stores = SparseStores(rng.choice([None, 48, 256]))
    group = rng.choice([WINDOW, CHUNK])
    marks = [rng.randrange(2000) for _ in range(3)]
    cuts = [0, *sorted(rng.randrange(130) for _ in range(6)), 130]

    pieces = [
        block for piece in itertools.pairwise(cuts) for block in stores.wanted(group, *piece, marks, 32)
    ]

    assert pieces == stores.wanted(group, 0, 130, marks, 32)


def test_a_boundary_ahead_of_the_blocks_known_so_far_counts():
    assert SparseStores(None).wanted(WINDOW, 0, 8, [160], 16) == [7]
    assert SparseStores(160).wanted(WINDOW, 0, 8, [], 16) == [7]


def test_marks_are_rounded_down_and_may_come_in_any_order():
    assert SparseStores(None).wanted(WINDOW, 0, 40, [335, 100], 32) == [3, 4, 5, 17, 18, 19]


def test_a_chunk_that_ends_at_a_boundary_needs_nothing():
    assert SparseStores(None).wanted(CHUNK, 0, 40, [128], 16) == []
    assert SparseStores(None).wanted(CHUNK, 0, 40, [160], 16) == [8, 9]


def test_dense_stores_every_block():
    assert SparseStores(None, dense=True).wanted(WINDOW, 3, 7, [], 16) == [3, 4, 5, 6]


def test_without_a_boundary_nothing_is_stored():
    assert SparseStores(None).wanted(WINDOW, 0, 100, [], 16) == []


def test_its_repr_says_what_it_stores():
    assert repr(SparseStores(2048)) == "<SparseStores every 2048 tokens>"
    assert repr(SparseStores(None)) == "<SparseStores at marks alone>"
    assert repr(SparseStores(None, dense=True)) == "<SparseStores dense>"


@pytest.mark.parametrize(
    ("keys", "coverages", "told"),
    [
        ({}, [Coverage(), Coverage(Rule.WINDOW, 127)], "every 2048 tokens"),
        ({}, [Coverage(Rule.WINDOW, 127), Coverage(Rule.WINDOW, 1023)], "every 4092 tokens"),
        ({}, [Coverage(), Coverage(Rule.STATE)], "every 2048 tokens"),
        ({"sparse_stores_every_tokens": 64}, [Coverage(Rule.WINDOW, 1023)], "every 64 tokens"),
        ({"sparse_stores_every_tokens": 0}, [Coverage(Rule.WINDOW, 1023)], "at marks alone"),
        ({"sparse_stores": "dense"}, [Coverage(Rule.WINDOW, 1023)], "dense"),
    ],
)
def test_the_distance_of_regular_boundaries_follows_the_longest_window(keys, coverages, told):
    config = load_config({"tiers": [{"backend": "cpu", "capacity": "1GiB"}], **keys})
    stores = sparse_stores(config, [KvGroup(16, coverage) for coverage in coverages])
    assert repr(stores) == f"<SparseStores {told}>"


def test_a_prompt_ends_ahead_of_its_last_token_and_a_boundary_earlier():
    group = KvGroup(16, Coverage(Rule.WINDOW, 16))
    wanted = SparseStores(None).wanted(group, 0, 40, prompt_ends(320, 32), 32)
    assert wanted == [15, 17]
    assert prompt_ends(1, 32) == (0, 0)


def test_a_block_that_a_request_is_given_again_at_the_same_place_is_its_own():
    """As after a load that failed: the engine takes all blocks back, and gives them to the same request."""
    fences = Fences()
    state = RequestState(None, None, blocks=[[0, 7]], offered=[0], prompt_tokens=8)
    fences.add(state, 0, 0)
    state.begin_anew([[5, 7]])
    fences.given([5, 7])
    assert state.blocks == [[5, 7]]
    fences.add(state, 0, 0)
    # Where proposed tokens are rejected the engine goes back a little, and the tables stay.
    state.begin_anew(state.blocks)
    fences.given([7])
    assert state.blocks == [[5, 0]]
