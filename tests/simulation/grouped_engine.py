"""An engine with several KV groups on several ranks, and an oracle that is told from outside what there is.

The oracle sees the stack from two sides only: the objects that each rank's backend has said to hold, noted
between the backend and the layers of the core, and the bytes that an engine wrote.
"""

import dataclasses
import functools
import math
import os
import random
import time
from collections import Counter

from kvbm_core import Addressable, Op, Outcome, Planner, Registry, Worker, chain_keys, load_config, root_key
from kvbm_core.block import PROBE_KEY, is_of_order
from kvbm_core.groups import TAG_BYTES, Rule, group_keys
from kvbm_core.layers.forward import ForwardTier
from kvbm_core.testing import FaultyTier, MemoryDevice

NAMESPACES = [bytes([rank]) * 16 for rank in range(8)]
FAULTS = ["error", "full", "flip", "short", "lie", "late", "twice", "hang"]
DEADLINE_S, LATE_S = 0.5, 0.7
_PATIENCE_S = 60
_MOST_HANGS = 2
"""Each takes a place in a queue, and memory, for ever."""


class Prompt:
    """The keys of a prompt in each group."""

    def __init__(self, groups, tokens):
        size = math.gcd(*(each.block_tokens for each in groups))
        digests = chain_keys(root_key(), tokens, size)
        self.tokens = len(tokens)
        self._keys = []
        for each in groups:
            step = each.block_tokens // size
            self._keys.append(group_keys(digests[step - 1 :: step], each.tag))
        self._members = {key for keys in self._keys for key in keys}

    def __contains__(self, key):
        return key in self._members

    def slice(self, start, stop, group=0):
        assert 0 <= start <= stop <= len(self._keys[group])
        return self._keys[group][start:stop]


def needed(group, start, tokens):
    """Give the blocks that a boundary needs beyond `start` tokens: each block's tokens are looked at."""
    rule, size = group.coverage.rule, group.block_tokens
    least = {Rule.ALL: 0, Rule.WINDOW: tokens - group.coverage.tokens, Rule.STATE: tokens - 1}[rule]
    return [block for block in range(start // size, tokens // size) if (block + 1) * size > least]


def longest_boundary(groups, prompt, start, stop, has, tiers):
    """Give the longest boundary of which some tier `has(tier, key)` each object; `start` for none."""
    step = math.lcm(*(each.block_tokens for each in groups))
    for tokens in range(stop // step * step, start, -step):
        if all(
            any(has(tier, key) for tier in tiers)
            for number, group in enumerate(groups)
            for block in needed(group, start, tokens)
            for key in prompt.slice(block, block + 1, number)
        ):
            return tokens
    return start


@functools.cache
def content(key, rank, nbytes):
    """Give the bytes that an engine computes."""
    return random.Random(key + bytes([rank])).randbytes(nbytes)


class Watched(ForwardTier):
    """Notes what a rank's backend says to hold, byte for byte, and insists on its capacity."""

    def __init__(self, inner, held, perhaps, wrong):
        super().__init__(inner)
        self._held, self._perhaps, self._wrong = held, perhaps, wrong
        self._open = {}

    def inventory(self):
        found = list(self._inner.inventory())
        for key, nbytes in found:
            if nbytes != len(self._held.get(key, b"")):
                self._wrong.append(f"{self!r} lists {key.hex()[:16]} with {nbytes} bytes")
        if not self.capabilities.remote_lookup:
            for key in set(self._held).difference(key for key, _ in found):
                self._wrong.append(f"{self!r} has lost {key.hex()[:16]}")
        return found

    def submit(self, transfers):
        content = {t.ticket: bytes(t.region.view()) for t in transfers if t.op is Op.STORE}
        self._inner.submit(transfers)
        self._open.update((t.ticket, (t, content.get(t.ticket))) for t in transfers)

    def poll(self):
        completions = self._inner.poll()
        for completion in completions:
            transfer, stored = self._open.pop(completion.ticket)
            key, done = transfer.key, completion.outcome is Outcome.DONE
            if transfer.op is Op.STORE and done:
                self._note(key, stored)
            elif transfer.op is Op.STORE and self.capabilities.shared:
                self._perhaps[key] = stored
            elif transfer.op is Op.LOAD and done:
                loaded = bytes(transfer.region.view()[: completion.nbytes or None])
                if loaded in (self._held.get(key), self._perhaps.get(key)):
                    continue
                self._wrong.append(f"{self!r} gave other bytes of {key.hex()[:16]}")
        return completions

    def discard(self, keys):
        self._inner.discard(keys)
        for key in keys:
            self._held.pop(key, None)

    def close(self):
        self._inner.close()
        self.poll()  # What was in flight may be there.

    def _note(self, key, stored):
        self._held.setdefault(key, stored)
        capacity_bytes, charge = self.capabilities.capacity_bytes, self.capabilities.charge
        taken_bytes = sum(charge(len(each)) for each in self._held.values())
        if capacity_bytes is not None and taken_bytes > capacity_bytes:
            self._wrong.append(f"{self!r} has more than its capacity")


class WatchedPool(Watched, Addressable):
    """Likewise of a tier that lends its memory."""

    def reserve(self, key, nbytes):
        return self._inner.reserve(key, nbytes)

    def publish(self, key):
        self._inner.publish(key)
        self._note(key, bytes(self._inner.view(key).nbytes))

    def abandon(self, key):
        self._inner.abandon(key)

    def view(self, key):
        return self._inner.view(key)


class Oracle(Registry):
    """The installed backends, watched; all but the host pool fail with some probability."""

    def __init__(self, groups, shapes, rng):
        super().__init__()
        self.groups, self.shapes, self.rng = groups, shapes, rng
        self.faults = self._some_fault
        """Chooses the fault of a transfer, or None, of a tier on a rank."""
        self.probability, self._hangs = 0.0, Counter()
        self.hung = set()
        """Objects whose memory a tier never lets go of: no tier forgets them until the engine ends."""
        self.wrong = []
        self.held = {}
        """Tier and rank to the objects that this rank's backend has."""
        self.perhaps = {}
        """Likewise those that a shared backend has failed to store: they may be there."""
        self._group_of = {each.tag: number for number, each in enumerate(groups)}

    def backend(self, name):
        backend = super().backend(name)

        def open_(config, context):
            tier = backend.open(config, context)
            held, perhaps = (
                each.setdefault((context.name, context.rank), {}) for each in (self.held, self.perhaps)
            )
            if tier.capabilities.addressable:
                return WatchedPool(tier, held, perhaps, self.wrong)
            fault = functools.partial(self.faults, context.name, context.rank)
            watched = Watched(tier, held, perhaps, self.wrong)
            return FaultyTier(watched, fault, self.rng.random(), late_s=LATE_S, reorder=True)

        return dataclasses.replace(backend, open=open_)

    def has(self, tier, key, perhaps=None):
        """Say whether each rank that has layers of an object's group has it in this tier."""
        group = self._group_of[key[-TAG_BYTES:]]
        places = [(tier, rank) for rank, shape in enumerate(self.shapes) if shape[group]]
        return all(key in self.held[place] or (perhaps and key in perhaps[place]) for place in places)

    def longest(self, prompt, start, stop, tiers):
        """Give the longest boundary that can be restored: from what there is, and from what there may be."""

        def may_have(tier, key):
            return self.has(tier, key, self.perhaps)

        return [
            longest_boundary(self.groups, prompt, start, stop, has, tiers) for has in (self.has, may_have)
        ]

    def strays(self, tier, index, *, shared):
        """List what the leader believes and is not so, and what a rank has that nobody knows of."""
        found = []
        for rank, shape in enumerate(self.shapes):
            known = {key for key in index if shape[self._group_of[key[-TAG_BYTES:]]]}
            there = {key for key in self.held[tier, rank] if not is_of_order(key)} - {PROBE_KEY}
            found += [("is not there", rank, key) for key in known - there - set(self.perhaps[tier, rank])]
            found += [] if shared else [("nobody knows", rank, key) for key in there - known - self.hung]
        return found

    def _some_fault(self, tier, rank, transfer):
        if self.rng.random() >= self.probability:
            return None
        fault = self.rng.choice(FAULTS)
        if fault != "hang":
            return fault
        self._hangs[tier] += 1
        if self._hangs[tier] > _MOST_HANGS:
            return None
        self.hung.add(transfer.key)
        return fault


@dataclasses.dataclass
class Request:
    """A boundary on its way into the device."""

    prompt: Prompt
    tokens: int
    blocks: list
    """Group, key and device block."""
    waiting: int
    failures: list = dataclasses.field(default_factory=list)


class Engine:
    """A leader and its ranks. The leader's clock is this object's own: hours pass at will."""

    def __init__(self, settings, oracle, num_blocks, *, now_s=0.0):
        self.oracle, self.groups, self.now_s = oracle, oracle.groups, now_s
        self._rng, self._world_size = oracle.rng, len(oracle.shapes)
        config = load_config(settings)
        self.devices = [MemoryDevice(num_blocks, shape) for shape in oracle.shapes]
        self.workers = []
        try:
            for rank, device in enumerate(self.devices):
                self.workers.append(
                    Worker(
                        config,
                        device,
                        NAMESPACES[rank],
                        rank=rank,
                        world_size=self._world_size,
                        registry=oracle,
                    )
                )
            statuses = [worker.status() for worker in self.workers]
            self.planner = Planner(
                statuses, groups=self.groups, policies=oracle.policies(config), max_store_blocks=48
            )
        except BaseException:
            self.close()
            raise
        self.tiers = [status.name for status in statuses[0]]
        self._free = list(range(num_blocks))
        self.requests = {}
        self.ended = Counter()
        self._numbers = iter(range(1 << 30))
        self._found = {}
        self._deadlines = 0

    def close(self):
        for worker in self.workers:
            worker.close()

    def store(self, prompt, blocks):
        """Write blocks through: for each group their numbers. The device's memory is used anew at once."""
        for number, places in blocks.items():
            keys = [key for at in places for key in prompt.slice(at, at + 1, number)]
            while len(keys) > len(self._free):
                self.step()
            into = self._rng.sample(self._free, len(keys))
            for rank, device in enumerate(self.devices):
                for key, block in zip(keys, into, strict=True):
                    device.write(block, content(key, rank, self.oracle.shapes[rank][number]), number)
            self.planner.store(keys, into, prompt, self.now_s, number)
            self._go()
            self._spoil(into)

    def find(self, prompt, start, stop):
        """Find boundaries; ask and wait where tiers must be asked. Remembers, as an engine does."""
        last = self._found.get(prompt)
        while True:
            last = self.planner.find_boundaries(prompt, start, stop, self.now_s, last)
            if not last.lookups:
                self._found[prompt] = last
                return last
            self.step()

    def load(self, prompt, match):
        """Start to load the best boundary of a finding. None: there is none, or too few blocks are free."""
        tokens, parts = self.planner.choose_boundary(match, self.now_s)
        wanted = {
            number: blocks
            for number, group in enumerate(self.groups)
            if (blocks := needed(group, match.start, tokens))
        }
        found = {part.group: list(range(part.first, part.first + len(part.tiers))) for part in parts}
        assert found == (wanted if tokens else {}), (tokens, found, wanted)
        if not parts or sum(map(len, wanted.values())) > len(self._free) // 2:
            return None
        name, moves = str(next(self._numbers)), []
        for part in parts:
            keys = prompt.slice(part.first, part.first + len(part.tiers), part.group)
            blocks = [self._free.pop(self._rng.randrange(len(self._free))) for _ in keys]
            moves += zip([part.group] * len(keys), keys, blocks, strict=True)
            self._spoil(blocks)
            self.planner.load(name, keys, blocks, part.tiers, group=part.group, prefix=prompt)
        request = self.requests[name] = Request(prompt, tokens, moves, len(moves))
        self._go()
        return request

    def step(self):
        """Hand over what is planned, in some order of the ranks, and take in what has ended."""
        self._go()
        for worker in self.workers:
            worker.wait(0.02)
        self.hear()

    def hear(self):
        """Take in reports: of the ranks in some order, and each rank's in some order."""
        self.now_s += 0.001
        for worker in self._rng.sample(self.workers, self._world_size):
            reports = worker.reports()
            self._rng.shuffle(reports)
            for op, failures in self.planner.report(reports, self.now_s):
                self._end(op, failures)

    def settle(self):
        """Wait until nothing is under way."""
        while self.planner.busy(self.now_s):
            self.step()
        assert not self.requests, "a request waits for something that nobody does"

    def settle_strays(self):
        """Settle until each rank has what the leader believes, and nothing else: late writes are undone."""
        give_up_s = time.monotonic() + _PATIENCE_S
        while True:
            self.settle()
            strays = [
                (state.name, *stray)
                for state in self.planner._tiers
                for stray in self.oracle.strays(state.name, state.index, shared=state.capabilities.shared)
            ]
            if not strays:
                return
            assert time.monotonic() < give_up_s, strays
            time.sleep(0.005)

    @property
    def has_been_slow(self):
        """Whether a deadline has passed at all."""
        return bool(self._count_deadlines())

    def forget_findings(self):
        """Have the leader look at everything anew."""
        self._found.clear()

    def was_too_slow(self):
        """Say whether a deadline has passed since the last call: the machine is busy, or a fault came."""
        before, self._deadlines = self._deadlines, self._count_deadlines()
        return before != self._deadlines

    def check_room(self, folders):
        """Insist on every capacity: as the leader counts, as the watchers do, and on the disk."""
        assert self.oracle.wrong == []
        for state in self.planner._tiers:
            limit = state.index.capacity_bytes
            assert limit is None or state.index.used_bytes <= limit <= state.capacity_bytes
            known = [state.index._order[key] for key in state.index]
            assert state.index.used_bytes == sum(
                [*known, *state.index._filling.values(), *state.index._leaving.values()]
            )
        for folder, capacity in folders.items():
            assert disk_bytes(folder) <= capacity

    def _count_deadlines(self):
        return sum(
            count
            for counts in self.planner.counts.values()
            for (_, why), count in counts.failed.items()
            if why == "deadline"
        )

    def _go(self):
        plan = self.planner.take(self.now_s)
        for worker in self._rng.sample(self.workers, self._world_size):
            worker.submit(plan)

    def _end(self, op, failures):
        request = self.requests[op.request]
        request.waiting -= len(op.keys)
        request.failures += failures.values()
        if request.waiting:
            return
        del self.requests[op.request]
        self.ended["failed" if request.failures else "loaded"] += 1
        for number, key, block in request.blocks:
            for rank, device in enumerate(self.devices):
                # Of a request that failed nothing is used, whatever has come.
                if not request.failures:
                    expected = content(key, rank, self.oracle.shapes[rank][number])
                    assert device.read(block, number) == expected, (op.request, number, rank)
            self._free.append(block)

    def _spoil(self, blocks):
        for device in self.devices:
            largest = max(range(len(self.groups)), key=lambda number: device.traits.block_bytes[number])
            for block in blocks:
                device.write(block, b"\xa5" * device.traits.block_bytes[largest], largest)


def disk_bytes(folder):
    """Count what ``du`` counts."""
    total = 0
    for path, _, files in os.walk(folder):
        for each in (path, *(os.path.join(path, name) for name in files)):
            try:
                total += os.stat(each).st_blocks * 512
            except FileNotFoundError:
                continue
    return total
