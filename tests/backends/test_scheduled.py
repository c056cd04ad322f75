"""The connector's halves and a simulated accelerator under a vLLM that schedules at random.

What an engine does in an order of its own is done here in many orders: prompts in chunks, requests that end,
are aborted or preempted, blocks given away as soon as they are free, one or two steps under way.
"""

import ctypes
import random
from collections import deque
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import test_deferred

from kvbm_core import chain_keys, load_config, root_key
from kvbm_device import CopyCounts
from kvbm_engine import Copies, Progress, Rank
from kvbm_vllm import _scheduler
from kvbm_vllm._values import Handshake, Outcomes

TOKENS = 4
SLOT_BYTES = test_deferred.BYTES // TOKENS


class FullAttentionSpec:
    block_size = TOKENS


def kv(tokens, at):
    """Give the KV of one token: it depends on all before it."""
    return random.Random(repr(tokens[: at + 1])).randbytes(SLOT_BYTES)


class Request:
    """As vLLM's, with all tokens that it will ever have."""

    lora_request = cache_salt = prompt_embeds = None
    mm_features = ()
    skip_reading_prefix_cache = False
    kv_transfer_params, max_tokens = None, 16

    def __init__(self, name, tokens, prompt):
        self.request_id, self.tokens, self.num_tokens = name, tokens, prompt
        self.blocks, self.computed, self.sampling = [], 0, 0
        self.loading = self.was_preempted = False

    @property
    def num_computed_tokens(self):
        return self.computed

    @property
    def all_token_ids(self):
        return self.tokens[: self.num_tokens]


class Vllm:
    """Schedules at random over few blocks, in the order in which they were freed."""

    def __init__(self, seed):
        self.chance = chance = random.Random(seed)
        self.tiers = chance.choice([("cpu",), ("memory",), ("cpu", "memory")])
        self.engine = test_deferred.Engine(
            16, seed, tiers=self.tiers, method=chance.choice(test_deferred.METHODS),
            eager=chance.choice((0.0, 0.2, 0.6)), blocks=24,
        )  # fmt: skip
        self.clock_s = 0.0
        told = (
            load_config({"tiers": [{"backend": "cpu", "capacity": "1MiB"}], "only_faster": False}),
            SimpleNamespace(
                model_config=None, parallel_config=SimpleNamespace(rank=0, world_size=1),
                observability_config=SimpleNamespace(otlp_traces_endpoint=None),
            ),
            SimpleNamespace(
                num_blocks=16, kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec())]
            ),
        )  # fmt: skip
        self.scheduler = _scheduler.SchedulerHalf(*told)
        joins = chance.random() < 0.7
        self.scheduler.start([Handshake(0, self.engine.worker.status(), {}, joins)])
        copies = Copies(CopyCounts())
        self.rank = Rank(self.engine.worker, copies, Progress(), load_wait_s=0, store_wait_s=0)
        self.free = deque(range(16))
        self.waiting, self.running, self.aborted = [], [], {}
        self.under_way, self.most_under_way = deque(), chance.choice((1, 2))
        self.books = [[chance.randrange(50) for _ in range(40)] for _ in range(3)]
        self.preempted, self.known, self.rights = set(), {}, []
        self.settled = self.loads = self.named = 0

    def arrive(self):
        tokens = list(self.chance.choice(self.books))
        prompt = self.chance.randint(2, 26)
        if self.chance.random() < 0.3:
            tokens[prompt // 2 :] = [self.chance.randrange(50) for _ in tokens[prompt // 2 :]]
        tokens = tokens[: prompt + self.chance.randint(1, 9)]
        self.named += 1
        request = Request(f"request {self.named}", tokens, prompt)
        self.waiting.append(request)
        self.scheduler.arrived(request)
        for at, key in enumerate(chain_keys(root_key(), tokens, TOKENS)):
            self.known[key] = b"".join(kv(tokens, at * TOKENS + slot) for slot in range(TOKENS))

    def leave(self, request):
        """It has all its tokens or was aborted: its blocks are free, unless they are being loaded into."""
        self.scheduler.finished(request)
        (self.running if request in self.running else self.waiting).remove(request)
        if request.loading:
            self.aborted[request.request_id] = request
        else:
            self.give_back(request)

    def give_back(self, request):
        self.free.extend(reversed(request.blocks))
        request.blocks = []

    def grow(self, request, tokens):
        """Give a request blocks for so many tokens; None if there are not enough."""
        count = -(-tokens // TOKENS) - len(request.blocks)
        if count > len(self.free):
            return None
        new = [self.free.popleft() for _ in range(max(0, count))]
        request.blocks += new
        return new

    def preempt(self, request):
        self.running.remove(request)
        self.give_back(request)
        request.computed, request.was_preempted = 0, True
        self.preempted.add(request.request_id)
        self.waiting.insert(0, request)

    def schedule(self):
        budget, counts, cached = self.schedule_running(self.chance.choice((8, 16)))
        new = []
        # As vLLM, which gives nothing to others in a step that has preempted.
        for request in [] if self.preempted else list(self.waiting):
            # What was preempted may have a step under way that samples for it.
            if budget <= 0 or request.loading or request.sampling:
                continue
            count = self.admit(request, budget)
            if count is None:
                break
            if count:
                self.waiting.remove(request)
                self.running.append(request)
                counts[request.request_id] = count
                budget -= count
                new.append(request)
        self.start(counts, cached, new)

    def schedule_running(self, budget):
        counts, cached = {}, []
        for request in list(self.running):
            most = min(len(request.tokens) - 1, request.num_tokens + request.sampling)
            count = min(budget, most - request.computed)
            if request not in self.running or count <= 0:
                continue
            while (blocks := self.grow(request, request.computed + count)) is None:
                last = self.running[-1]
                budget += counts.pop(last.request_id, 0)
                cached = [each for each in cached if each[0] is not last]
                self.preempt(last)
                if last is request:
                    break
            if blocks is not None:
                budget -= count
                counts[request.request_id] = count
                cached.append((request, blocks))
        return budget, counts, cached

    def admit(self, request, budget):
        """Give a waiting request its first blocks, or those beyond what was loaded.

        Returns:
            The tokens to compute; 0 if it must be asked again, or waits for a load; None: no room.
        """
        found = later = 0
        if not request.blocks:
            found, later = self.scheduler.match(request, 0)
            if found is None:
                return 0
        start = found or request.computed
        count = 0 if found and later else min(budget, request.num_tokens - start)
        if self.grow(request, start + count) is None:
            return None
        request.computed, request.loading = start, bool(found and later)
        self.scheduler.allocated(request, (list(request.blocks),), found)
        return count

    def start(self, counts, cached, new):
        resumed = [request for request in new if request.was_preempted]
        output = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(
                    req_id=r.request_id, num_computed_tokens=r.computed, block_ids=(list(r.blocks),)
                )
                for r in new
                if r not in resumed
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r.request_id for r, _ in cached] + [r.request_id for r in resumed],
                num_computed_tokens=[r.computed for r, _ in cached] + [r.computed for r in resumed],
                new_block_ids=[(b,) if b else None for _, b in cached] + [(list(r.blocks),) for r in resumed],
                resumed_req_ids={r.request_id for r in resumed},
            ),
            num_scheduled_tokens=counts,
            total_num_scheduled_tokens=sum(counts.values()),
            preempted_req_ids=self.preempted,
        )
        self.preempted = set()
        told = self.scheduler.step(output)
        self.settled += bool(told.plan.stores and told.plan.blocks_final)
        self.loads += len(told.plan.loads)
        self.rank.begin(told)
        sampled = []
        for request in [*(request for request, _ in cached), *new]:
            count = counts[request.request_id]
            self.compute(request, request.computed, count)
            request.computed += count
            request.was_preempted = False
            samples = request.computed >= request.num_tokens + request.sampling
            request.sampling += samples
            sampled += [request] * samples
        self.rank.collect()
        progress = self.rank.progress
        ended, failed, outcome = (
            progress.take_finished(), progress.take_failed_blocks(), progress.take_outcome()
        )  # fmt: skip
        outcomes = outcome and Outcomes(outcome.reports, outcome.step)
        self.under_way.append((sampled, ended, failed, outcomes))

    def compute(self, request, start, count):
        """Have the engine read the KV of the tokens before, and write that of the next."""
        gpu, memory = self.engine.gpu, self.engine.memory
        for at in range(start + count):
            block, data = request.blocks[at // TOKENS], kv(request.tokens, at)
            address = memory[block].data_ptr() + at % TOKENS * SLOT_BYTES
            if at < start:
                gpu.put(
                    gpu.engine,
                    lambda a=address, d=data: self.rights.append(ctypes.string_at(a, len(d)) == d),
                )
            else:
                gpu.put(gpu.engine, lambda a=address, d=data: ctypes.memmove(a, d, len(d)))

    def update(self):
        sampled, ended, failed, outcomes = self.under_way.popleft()
        for request in self.waiting:
            wrong = [at for at, block in enumerate(request.blocks) if request.loading and block in failed]
            request.computed = min([request.computed, *(at * TOKENS for at in wrong)])
        for request in sampled:
            request.sampling -= 1
            request.num_tokens += 1
            if request.num_tokens == len(request.tokens) and (
                request in self.running or request in self.waiting
            ):
                self.leave(request)
        if outcomes:
            self.scheduler.outcomes(outcomes)
        for name in ended:
            if name in self.aborted:
                self.give_back(self.aborted.pop(name))
            for request in self.waiting:
                request.loading = request.loading and request.request_id != name
                if request.request_id == name and not request.computed:
                    self.give_back(request)

    @property
    def has_work(self):
        return bool(self.waiting or self.running or self.aborted or self.preempted or self.scheduler.busy())

    def assert_tiers_hold_their_keys_bytes(self):
        for tier in self.engine.tiers:
            if hasattr(tier, "view"):
                for key, data in self.known.items():
                    region = tier.view(key)
                    assert region is None or bytes(region.view()[: len(data)]) == data

    def go_on(self, *, finish):
        """A moment: something comes, goes, is scheduled, ends or is copied, in any order."""
        chance, gpu = self.chance, self.engine.gpu
        self.clock_s += chance.choice((0.0, 0.0005, 0.002, 0.004, 0.01))
        there = self.waiting + self.running
        if not finish and there and chance.random() < 0.04:
            self.leave(chance.choice(there))
        if self.has_work:
            self.schedule()
        if self.under_way and (len(self.under_way) >= self.most_under_way or chance.random() < 0.3):
            self.update()
        for _ in range(chance.randint(0, 2)):
            self.engine.poll()
        while sum(map(len, gpu.queues)) > 200 or chance.random() < 0.5:
            gpu.step()

    def run(self):
        for number in range(300):
            often = number // 40 % 2
            if self.chance.random() < (0.5 if often else 0.1) and len(self.waiting + self.running) < 6:
                self.arrive()
            self.go_on(finish=False)
            if number % 20 == 0:
                self.assert_tiers_hold_their_keys_bytes()
        for _ in range(3000):
            if self.has_work or self.under_way:
                self.go_on(finish=True)
        assert not self.has_work
        self.engine.gpu.finish()
        self.assert_tiers_hold_their_keys_bytes()


def run(seed, monkeypatch):
    made = Vllm(seed)
    monkeypatch.setattr(_scheduler, "time", SimpleNamespace(monotonic=lambda: made.clock_s))
    try:
        made.run()
        made.engine.assert_nothing_is_in_use()
    finally:
        made.engine.gpu.eager = 0.9
        made.engine.worker.close()
    return made


@pytest.mark.parametrize("seed", range(16))
def test_blocks_are_stored_and_loaded_as_their_keys_say_however_vllm_schedules(seed, monkeypatch):
    made = run(seed, monkeypatch)
    assert all(made.rights)
    assert len(made.rights) > 100
    assert made.loads


def test_some_of_these_stores_are_read_beside_a_step(monkeypatch):
    assert sum(run(seed, monkeypatch).settled for seed in range(4)) > 2
