"""Boundaries of prefixes over several KV groups, against a search that tries each."""

import itertools
import math
import random

import pytest

from kvbm_core.block import chain_keys, root_key
from kvbm_core.errors import ConfigError
from kvbm_core.groups import Coverage, KvGroup, Rule, alignment, group_keys, group_tag
from kvbm_core.leader.finding.boundaries import BoundaryFinder

ALL, STATE = Coverage(), Coverage(Rule.STATE)


def window(tokens):
    return Coverage(Rule.WINDOW, tokens)


def group(block_tokens, coverage=ALL):
    return KvGroup(block_tokens, coverage, group_tag({"tokens": block_tokens, "coverage": str(coverage)}))


class Prompt:
    """The keys of a prompt in each group."""

    def __init__(self, groups, tokens):
        self._keys = []
        size = math.gcd(*(each.block_tokens for each in groups))
        digests = chain_keys(root_key(), range(tokens), size)
        for each in groups:
            step = each.block_tokens // size
            self._keys.append(group_keys(digests[step - 1 :: step], each.tag))
        self._members = {key for keys in self._keys for key in keys}

    def __contains__(self, key):
        return key in self._members

    def slice(self, start, stop, group=0):
        assert stop <= len(self._keys[group])
        return self._keys[group][start:stop]


class Holdings:
    """Tiers as sets of keys; counts the objects that are asked for."""

    def __init__(self, *tiers):
        self.tiers = tiers
        self.asked = 0

    def where(self, key):
        self.asked += 1
        return next((at for at, tier in enumerate(self.tiers) if key in tier), -1)

    def last(self, keys):
        return max((at for at, key in enumerate(keys) if self.where(key) >= 0), default=-1)

    def scan(self, keys):
        found = []
        for key in keys:
            if (tier := self.where(key)) < 0:
                break
            found.append(tier)
        return found


def restorable(groups, prompt, start, tokens, holdings):
    """Say whether every group has what its coverage names."""
    for number, each in enumerate(groups):
        first = max(each.coverage.first_token(tokens) // each.block_tokens, start // each.block_tokens)
        keys = prompt.slice(first, tokens // each.block_tokens, number)
        if any(holdings.where(key) < 0 for key in keys):
            return False
    return True


MIXES = [
    [group(4)],
    [group(4), group(4, window(9))],
    [group(8), group(4, window(3)), group(4, window(30))],
    [group(4), group(16, STATE)],
    [group(4), group(4, Coverage(Rule.CHUNK, 20)), group(12, STATE)],
    [group(4), group(8), group(4, window(16)), group(8, STATE)],
    [group(4, window(12))],
    [group(8, STATE)],
]


@pytest.mark.parametrize("groups", MIXES)
@pytest.mark.parametrize("seed", range(40))
def test_every_boundary_is_one_and_the_longest_is_found(groups, seed):
    rng = random.Random(seed)
    step, total = alignment(groups), rng.randrange(1, 400)
    prompt = Prompt(groups, total)
    density = rng.choice((0.5, 0.9, 0.97, 1.0))
    tiers = [
        {key for number, each in enumerate(groups)
         for key in prompt.slice(0, total // each.block_tokens, number)
         if rng.random() < density}
        for _ in range(2)
    ]  # fmt: skip
    holdings = Holdings(*tiers)
    start = rng.randrange(total // step + 1) * step
    stop = rng.randrange(start, total + 1)
    found = BoundaryFinder(groups).find(prompt, start, stop, holdings)
    right = [
        tokens
        for tokens in range(stop // step * step, start, -step)
        if restorable(groups, prompt, start, tokens, holdings)
    ]
    assert set(found.tokens) <= set(right)
    assert found.tokens == sorted(found.tokens, reverse=True)
    assert found.tokens[:1] == right[:1]
    assert bool(found.tokens) == bool(right)
    # Between two that are found there is none that is more than a sixteenth away from the longer.
    part = max(step, (found.reach - start) // 16)
    for longer, shorter in itertools.pairwise([*found.tokens, start]):
        assert not [tokens for tokens in right if shorter < tokens <= longer - part]
    for tokens in found.tokens:
        for at, first, where in found.parts(tokens, groups):
            each = groups[at]
            assert first == max(each.first_block(tokens), start // each.block_tokens)
            keys = prompt.slice(first, tokens // each.block_tokens, at)
            assert where == [holdings.where(key) for key in keys]
            assert all(tier >= 0 for tier in where)


@pytest.mark.parametrize("lost", [0, 1, 7])
def test_a_search_asks_for_each_object_once(lost):
    """Also where each window lacks a block, so that no boundary is left."""
    groups = [group(4), group(4, window(64 * 4))]
    prompt = Prompt(groups, 4 * 4096)
    keys = [prompt.slice(0, 4096, number) for number in (0, 1)]
    gone = set(keys[1][lost::8])
    holdings = Holdings(set(keys[0]) | set(keys[1]) - gone)
    found = BoundaryFinder(groups).find(prompt, 0, 4 * 4096, holdings)
    assert found.tokens in ([], [4 * lost])  # Before the first that is lost the whole prefix is there.
    assert holdings.asked <= 2 * 4096


def test_coverages_name_the_tokens_that_a_prefix_needs():
    assert [ALL.first_token(n) for n in (0, 5, 100)] == [0, 0, 0]
    assert [window(9).first_token(n) for n in (0, 5, 100)] == [0, 0, 91]
    assert [Coverage(Rule.CHUNK, 20).first_token(n) for n in (5, 20, 39)] == [0, 20, 20]
    assert [STATE.first_token(n) for n in (0, 16)] == [0, 15]


def test_tags_tell_groups_apart_and_stay_the_same():
    assert group_tag({"kind": "full", "tokens": 16}) == group_tag({"tokens": 16, "kind": "full"})
    assert group_tag({"kind": "full"}) != group_tag({"kind": "window"})
    digest = bytes(range(32))
    (key,) = group_keys([digest], b"abcd")
    assert key == digest[:28] + b"abcd"


def test_groups_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ConfigError, match="each needs one of its own"):
        alignment([group(4), group(4)])
