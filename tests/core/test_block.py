import itertools

import pytest

from kvbm_core import TransitionError, chain_keys, make_namespace, root_key
from kvbm_core.block import TRANSITIONS, BlockEvent, BlockState, next_state


def test_keys_do_not_change_between_releases():
    """Golden values: a change of the derivation makes every stored block unreachable, so it must be meant."""
    first, second = chain_keys(root_key(), [1, 2, 3, 4, 5], 2)
    assert first.hex() == "435d35b901a6325f6eda2dabd279aaae8259d2dc73d555a3fb38468044e5b6c8"
    assert second.hex() == "56693a18e137e512e7c5e3198633ed47a38366bf3bfc8dce78f3efa5520698aa"


def test_a_key_names_everything_before_it():
    one, other = chain_keys(root_key(), [1, 2, 3, 4], 2), chain_keys(root_key(), [9, 2, 3, 4], 2)
    assert one[1] != other[1]


def test_tokens_that_do_not_fill_a_block_have_no_key():
    assert chain_keys(root_key(), [1, 2, 3], 4) == []


def test_going_on_from_a_key_equals_one_go():
    tokens = list(range(12))
    first = chain_keys(root_key(), tokens[:8], 4)
    assert first + chain_keys(first[-1], tokens[8:], 4) == chain_keys(root_key(), tokens, 4)


def test_facts_of_different_names_never_meet():
    assert len({root_key(), root_key(salt="x"), root_key(lora="x"), root_key(salt="x", lora="x")}) == 4
    assert root_key(salt=None) == root_key()


def test_extras_belong_to_one_block_and_all_after_it():
    plain, extra = chain_keys(root_key(), range(6), 2), chain_keys(root_key(), range(6), 2, {1: b"image"})
    assert [a == b for a, b in zip(plain, extra, strict=True)] == [True, False, False]


def test_a_namespace_does_not_depend_on_order():
    assert (
        make_namespace({"a": 1, "b": [2]}) == make_namespace({"b": [2], "a": 1}) != make_namespace({"a": 1})
    )


def test_a_namespace_does_not_change_between_releases():
    """As keys: a change makes every stored block unreachable, and needs another ``format`` in the facts."""
    assert make_namespace({"b": [2], "a": "x"}).hex() == "bb4a049d0a05a746d32d325a1f50ebe3"


@pytest.mark.parametrize(("state", "event"), list(itertools.product(BlockState, BlockEvent)))
def test_only_the_edges_of_the_table_are_legal(state, event):
    if (state, event) in TRANSITIONS:
        assert next_state(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(TransitionError, match=state.value):
            next_state(state, event)
