"""What the planner finds, asks, loads and begins with, for engines with several KV groups."""

import zlib

import pytest

from kvbm_core import (
    Capabilities,
    Codec,
    CodecConfig,
    CodecKind,
    Planner,
    Reason,
    Registry,
    Report,
    TierStatus,
    Worker,
    chain_keys,
    load_config,
    root_key,
)
from kvbm_core.groups import Coverage, KvGroup, Rule, group_keys, group_tag
from kvbm_core.leader.ground.prefix_search import PrefixSearch
from kvbm_core.testing import MemoryDevice

NOW = 100.0
REMOTE = Capabilities(capacity_bytes=None, durable=True, shared=True, remote_lookup=True)
FULL = KvGroup(16, Coverage(), group_tag({"kind": "full"}))
STATE = KvGroup(32, Coverage(Rule.STATE), group_tag({"kind": "state"}))


def window(tokens, block_tokens=8):
    return KvGroup(block_tokens, Coverage(Rule.WINDOW, tokens), group_tag({"kind": "window"}))


class Prompt:
    """The keys of a prompt in each group."""

    def __init__(self, groups, tokens):
        digests = chain_keys(root_key(), range(tokens), 8)
        self.keys = []
        for each in groups:
            step = each.block_tokens // 8
            self.keys.append(group_keys(digests[step - 1 :: step], each.tag))
        self._members = {key for keys in self.keys for key in keys}

    def __contains__(self, key):
        return key in self._members

    def slice(self, start, stop, group=0):
        return self.keys[group][start:stop]


def search(planner, prompt, tokens, there):
    """Find boundaries until no answer is awaited; give the longest, the rounds, the questions."""
    match, rounds, asked = None, 0, 0
    while True:
        match = planner.find_boundaries(prompt, 0, tokens, NOW, match)
        if not match.lookups:
            return (match.tokens[:1] or [0])[0], rounds, asked
        rounds += 1
        for op in planner.take(NOW).lookups:
            assert len(op.keys) <= PrefixSearch.max_probes
            asked += len(op.keys)
            failures = {at: Reason.MISSING for at, key in enumerate(op.keys) if key not in there}
            planner.report([Report(op.op, op.tier, failures)], NOW)


@pytest.mark.parametrize("blocks", [1, 4, 64, 65, 200])
@pytest.mark.parametrize("boundary", [0, 32, 96, 1600, 1920, 2016])
def test_a_remote_tier_is_asked_until_the_longest_boundary_is_found(blocks, boundary):
    """Windows of many blocks, of blocks shorter than the boundaries are apart, and states, all asked for."""
    groups = [FULL, window(8 * blocks), STATE]
    prompt = Prompt(groups, 2048)
    there = {*prompt.keys[0]}
    if boundary:
        there.update(prompt.keys[1][max(0, boundary // 8 - blocks) : boundary // 8])
        there.add(prompt.keys[2][boundary // 32 - 1])
    planner = Planner([[TierStatus("remote", REMOTE, [], (1, 1, 1), (1, 1, 1))]], groups=groups)
    found, rounds, asked = search(planner, prompt, 2048, there)
    # At most so many of the longest boundaries are asked for.
    assert found == (boundary if boundary > 2048 - 32 * 64 else 0)
    assert asked <= 128 + 256 + blocks + 64
    assert rounds <= 3 + asked // 64


def test_what_the_host_pool_keeps_of_one_group_does_not_push_out_another_of_the_request():
    groups = [FULL, STATE]
    prompt = Prompt(groups, 160)
    # The states are the oldest of all that the host pool has.
    host = [(key, 1) for key in prompt.keys[1]] + [(bytes([at]) * 32, 1) for at in range(5)]
    disk = [(key, 1) for key in prompt.keys[0]]
    tiers = [
        TierStatus("host", Capabilities(capacity_bytes=10, addressable=True), host, (1, 1), (1, 1)),
        TierStatus("disk", Capabilities(capacity_bytes=100), disk, (1, 1), (1, 1)),
    ]
    planner = Planner([tiers], groups=groups)
    match = planner.find_boundaries(prompt, 0, 160, NOW)
    tokens, parts = planner.choose_boundary(match, NOW)
    assert tokens == 160
    assert [(part.group, set(part.tiers)) for part in parts] == [(0, {1}), (1, {0})]
    for part in parts:
        keys = prompt.slice(part.first, part.first + len(part.tiers), part.group)
        planner.load("r", keys, list(range(len(keys))), part.tiers, group=part.group, prefix=prompt)
    for part in parts:
        keys = prompt.slice(part.first, part.first + len(part.tiers), part.group)
        assert all(planner.is_ready(key, tier) for key, tier in zip(keys, part.tiers, strict=True))


@pytest.mark.parametrize("without", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_a_rank_without_layers_of_a_group_need_not_have_found_its_objects(without):
    """After a restart, whichever rank and group that is; what a rank should have and has not is dropped."""
    rank_without, group_without = without
    groups = [FULL, STATE]
    prompt = Prompt(groups, 64)
    lost = prompt.keys[1 - group_without][0]
    kind = Capabilities(capacity_bytes=1000, durable=True)
    ranks = []
    for rank in (0, 1):
        has = [group for group in (0, 1) if (rank, group) != without]
        found = [(key, 5 + rank) for group in has for key in prompt.keys[group] if (rank, key) != (1, lost)]
        charges = tuple(10 if group in has else 0 for group in (0, 1))
        ranks.append([TierStatus("disk", kind, found, charges, charges)])
    planner = Planner(ranks, groups=groups)
    ready = {key for keys in prompt.keys for key in keys if planner.is_ready(key, 0)}
    assert ready == {key for keys in prompt.keys for key in keys} - {lost}
    assert planner.take(NOW).drops == [(0, [lost])]
    only = len(prompt.keys[group_without]) * (6 - rank_without)
    both = (len(prompt.keys[1 - group_without]) - 1) * 6
    assert planner.levels(NOW)["disk"].used_bytes == (only + both) * 2


class Zlib(Codec):
    """Makes zeros shorter."""

    identity = b""

    def max_bytes(self, nbytes):
        return nbytes + 64

    def encode(self, key, source, target):
        made = zlib.compress(source)
        target[: len(made)] = made
        return len(made)

    def decode(self, key, source, target):
        made = zlib.decompress(source)
        target[: len(made)] = made
        return len(made)


class WithZlib(Registry):
    """The installed backends and a codec."""

    def codec(self, name):
        return CodecKind("zlib", CodecConfig, lambda config, context: Zlib())


@pytest.mark.parametrize("without", [0, 1])
def test_a_rank_without_layers_of_a_group_does_not_hide_what_a_codec_saves(without):
    """Whichever rank reports first: the room counted is that of the rank which has the objects."""
    groups, shapes = [FULL, STATE], [[3000, 9000], [3000, 9000]]
    shapes[without][1] = 0
    config = load_config({"tiers": [{"backend": "memory", "capacity": "1MiB", "codecs": ["zlib"]}]})
    devices = [MemoryDevice(8, tuple(shape)) for shape in shapes]
    workers = [
        Worker(config, device, b"n" * 16, rank=rank, world_size=2, registry=WithZlib())
        for rank, device in enumerate(devices)
    ]
    try:
        planner = Planner([worker.status() for worker in workers], groups=groups)
        prompt = Prompt(groups, 128)
        planner.store(prompt.keys[1], [0, 1, 2, 3], prompt, NOW, 1)
        plan = planner.take(NOW)
        for worker in workers:
            worker.submit(plan)
        while planner.busy(NOW):
            workers[1 - without].wait(0.05)
            for worker in workers:
                planner.report(worker.reports(), NOW)
        assert all(planner.is_ready(key, 0) for key in prompt.keys[1])
        assert 0 < planner.levels(NOW)["memory"].used_bytes < 2 * 4 * 500
    finally:
        for worker in workers:
            worker.close()
