"""vLLM's real scheduler over the real connector, driven at random, with arithmetic in place of a model.

The KV of a token is a number that depends on all tokens before it and on the weights, so whoever reads a slot
knows at once whether the right KV is there. Requests come, are aborted and preempted; steps overlap; caches
are reset and weights change; another connector loads into the same blocks; steps fail.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque

import numpy as np
import torch
from engines import ours as find_ours
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

TOKENS = 4
BLOCKS = 40
LONGEST = 96
"""Tokens of a request."""
GARBAGE = -1


def kv_of(tokens, weights):
    """Give the KV of each token: a number that names it, all before it, and the weights."""
    value, made = weights * 1_000_003 + 17, []
    for token in tokens:
        value = (value * 6364136223846793005 + 2 * token + 1442695040888963407) % (1 << 61)
        made.append(value)
    return np.array(made, np.int64)


class World:
    """What requests there are, and what is right. Both halves of the other connector look here."""

    def __init__(self, seed):
        self.chance = random.Random(seed)
        self.weights = 0
        self.overlaps = self.chance.random() < 0.5
        """Whether the next step is planned and begun before the outcome of the last has come."""
        self.counts: Counter[str] = Counter()
        self.tokens: dict[str, list[int]] = {}
        self.right: dict[tuple[str, int], np.ndarray] = {}

    def kv(self, name):
        key = (name, self.weights)
        if key not in self.right:
            self.right[key] = kv_of(self.tokens[name], self.weights)
        return self.right[key]


world: World
"""Of the engine that runs."""


class OtherMetadata(KVConnectorMetadata):
    def __init__(self, loads):
        self.loads = loads


class OtherConnector(KVConnectorBase_V1):
    """Brings KV from elsewhere, as a decoding engine gets it from a prefilling one; some loads fail."""

    requires_kv_delivery = False

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self.planned, self.offers, self.local, self.under_way = [], {}, {}, []
        self.ended, self.failed = set(), set()

    # In the scheduler.

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        name = request.request_id
        offer = self.offers.setdefault(name, world.chance.choice(["none", "none", "now", "later"]))
        self.local[name] = num_computed_tokens
        blocks = (request.num_tokens - 1) // TOKENS - num_computed_tokens // TOKENS
        if offer == "none" or blocks < 1 or request.skip_reading_prefix_cache:
            return 0, False
        return world.chance.randint(1, blocks) * TOKENS, offer == "later"

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        name = request.request_id
        if num_external_tokens:
            load = name, blocks.get_block_ids()[0], self.local[name], num_external_tokens, self.offers[name]
            self.planned.append(load)
        self.offers[name] = "none"

    def build_connector_meta(self, scheduler_output):
        planned, self.planned = self.planned, []
        return OtherMetadata(planned)

    def request_finished(self, request, block_ids):
        self.offers.pop(request.request_id, None)
        return False, None

    # In the worker.

    def register_kv_caches(self, kv_caches):
        self.memory = next(iter(kv_caches.values())).numpy()

    def start_load_kv(self, forward_context, **kwargs):
        for load in self._connector_metadata.loads:
            if load[-1] == "later":
                self.under_way.append(load)
            else:
                self.bring(*load)

    def bring(self, name, blocks, start, count, when):
        # Not where the step waits for the load: vLLM itself, alone with this connector, goes on with such KV.
        fails = when == "later" and world.chance.random() < 0.2
        world.counts["other"] += count
        right = world.kv(name)
        for at in range(start, start + count):
            self.memory[blocks[at // TOKENS], 0, at % TOKENS] = GARBAGE if fails else right[at]
        if fails:
            self.failed.update(blocks[start // TOKENS : (start + count) // TOKENS])
        if when == "later":
            self.ended.add(name)

    def get_finished(self, finished_req_ids):
        for load in list(self.under_way):
            if world.chance.random() < 0.5:
                self.under_way.remove(load)
                self.bring(*load)
        ended, self.ended = self.ended, set()
        return None, ended or None

    def get_block_ids_with_load_errors(self):
        failed, self.failed = self.failed, set()
        return failed

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def wait_for_save(self):
        pass


def configure(model, tiers, *, other, overlaps, scale):
    """Make vLLM's configuration; `other`: where the other connector comes, if there is one."""
    ours = {
        "kv_connector": "KvbmConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"tiers": tiers, "only_faster": False},
    }  # fmt: skip
    if other:
        theirs = {
            "kv_connector": "OtherConnector", "kv_role": "kv_both",
            "kv_connector_module_path": "random_engine",
        }  # fmt: skip
        connectors = [theirs, ours] if other == "first" else [ours, theirs]
        ours = {
            "kv_connector": "MultiConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"connectors": connectors},
        }  # fmt: skip
    config = EngineArgs(
        model=str(model), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512, block_size=32,
        max_num_seqs=6, max_num_batched_tokens=512, async_scheduling=overlaps, enable_prefix_caching=True,
        kv_transfer_config=KVTransferConfig(**ours, kv_load_failure_policy="recompute"),
    ).create_engine_config()  # fmt: skip
    config.cache_config.block_size = TOKENS
    config.cache_config.num_gpu_blocks = BLOCKS * scale
    config.scheduler_config.max_num_scheduled_tokens = config.scheduler_config.max_num_batched_tokens = (
        128 * scale
    )
    return config


class Engine:
    """A scheduler, one worker that computes with arithmetic, and what happens to them."""

    def __init__(self, model, seed):
        global world
        world = self.world = World(seed)
        self.chance = chance = world.chance
        self.overlaps = world.overlaps
        other = chance.choice([None, None, "first", "last"])
        names = chance.choice([("cpu",), ("cpu",), ("cpu", "shared"), ("shared",)])
        self.scale = scale = chance.choice((1, 1, 4))
        blocks = chance.choice((12, 48)) * scale
        self.tiers = [{"backend": name, "capacity": blocks * 4096} for name in names]
        config = configure(model, self.tiers, other=other, overlaps=self.overlaps, scale=scale)
        spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=2, dtype=torch.int64)
        cache = KVCacheConfig(BLOCKS * scale, [], [KVCacheGroupSpec(["layer"], spec)])
        self.memory = torch.zeros(BLOCKS * scale, 1, TOKENS, 1, dtype=torch.int64)
        self.kv = self.memory.numpy()[:, 0, :, 0]
        kind = AsyncScheduler if self.overlaps else Scheduler
        self.scheduler = kind(
            vllm_config=config, kv_cache_config=cache, block_size=TOKENS,
            structured_output_manager=StructuredOutputManager(config),
        )  # fmt: skip
        self.worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, cache)
        self.worker.register_kv_caches({"layer": self.memory})
        self.ours = find_ours(self.scheduler.connector)
        self.half = find_ours(self.worker)._mover
        rank = self.half.rank
        rank.load_wait_s = rank.store_wait_s = 0
        self.engine = rank.worker._engine
        rank.worker._thread.start = lambda: None  # It runs when the test says so.
        metadata = self.worker.get_handshake_metadata()
        if metadata is not None:
            self.scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): metadata})
        self.most_under_way = 2 if self.overlaps else 1
        self.clock_s = 100.0
        self.pauses_s = chance.choice([(0.0, 0.001, 0.002), (0.0, 0.001, 0.004, 0.02, 0.02, 3.0)])
        self.under_way, self.tables, self.named = deque(), {}, 0
        self.hasher = get_request_block_hasher(TOKENS, sha256)
        self.books = [[chance.randrange(2, 50) for _ in range(LONGEST * scale)] for _ in range(3)]

    # Requests.

    def arrive(self):
        chance = self.chance
        tokens = list(chance.choice(self.books))
        prompt = chance.randint(2, 72 * self.scale)
        if chance.random() < 0.3:
            tokens[prompt // 2 :] = [chance.randrange(2, 50) for _ in tokens[prompt // 2 :]]
        self.named += 1
        name = f"request {self.named}"
        self.world.tokens[name] = tokens
        pools = chance.random() < 0.1
        pooling = PoolingParams(task="embed", skip_reading_prefix_cache=chance.random() < 0.5)
        sampling = SamplingParams(temperature=0, max_tokens=chance.randint(1, 20), ignore_eos=True)
        self.scheduler.add_request(
            Request(
                name, tokens[:prompt], None if pools else sampling, pooling if pools else None,
                block_hasher=self.hasher,
            )
        )  # fmt: skip

    def abort(self):
        if names := list(self.scheduler.requests):
            self.scheduler.finish_requests(self.chance.choice(names), RequestStatus.FINISHED_ABORTED)

    def reset(self):
        """Change the weights, as soon as vLLM says that it has forgotten all that it has computed."""
        waits = any(
            r.status is RequestStatus.WAITING_FOR_REMOTE_KVS for r in self.scheduler.requests.values()
        )
        preempts = not waits and self.chance.random() < 0.7
        try:
            done = self.scheduler.reset_prefix_cache(reset_running_requests=preempts, reset_connector=True)
        except RuntimeError:  # Requests that have loaded and were not scheduled since.
            return
        if done:
            self.world.weights += 1
            self.world.right.clear()
            self.world.counts["resets"] += 1

    # Steps.

    def execute(self, output, *, fails=False):
        """Do what a worker does in a step; give its output."""
        worker = self.worker
        for name in output.finished_req_ids:
            self.tables.pop(name, None)
        worker.bind_connector_metadata(output.kv_connector_metadata)
        worker.handle_preemptions(output.kv_connector_metadata)
        starts = self.follow(output)
        worker.start_load_kv(None)
        names, sampled, pooled = [], [], []
        for name, count in output.num_scheduled_tokens.items():
            self.compute(name, starts[name], count, fails=fails)
            request, total = self.scheduler.requests[name], starts[name] + count
            names.append(name)
            ends = not request.is_prefill_chunk
            sampled.append([self.world.tokens[name][total]] if ends and not request.pooling_params else [])
            pooled.append(torch.zeros(1) if ends and request.pooling_params else None)
        if fails:
            worker.clear_connector_metadata()
            return None
        worker.wait_for_save()
        sending, received = worker.get_finished(output.finished_req_ids)
        told = KVConnectorOutput(
            finished_sending=sending, finished_recving=received,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )  # fmt: skip
        worker.clear_connector_metadata()
        return ModelRunnerOutput(
            names, {name: at for at, name in enumerate(names)}, sampled, pooler_output=pooled,
            kv_connector_output=told,
        )  # fmt: skip

    def follow(self, output):
        """Keep the requests' blocks, as a model runner does; give where each is to go on."""
        starts = {}
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for at, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[at]
            if name in cached.resumed_req_ids:
                self.tables[name] = []
            if blocks is not None:
                self.tables[name] += blocks[0]
            starts[name] = cached.num_computed_tokens[at]
        return starts

    def compute(self, name, start, count, *, fails):
        """Read the KV of the tokens before, and write that of the next."""
        right = self.world.kv(name)
        at = np.arange(start + count)
        table = np.array(self.tables[name])
        blocks, slots = table[at // TOKENS], at % TOKENS
        read, written = blocks[:start], blocks[start:]
        wrong = np.flatnonzero(self.kv[read, slots[:start]] != right[:start])
        self.world.counts["slots"] += start
        if wrong.size and not fails:
            raise AssertionError(f"{name} reads wrong KV at {wrong.tolist()} of {start}")
        self.kv[written, slots[start:]] = GARBAGE if fails else right[start : start + count]

    def update(self):
        self.scheduler.update_from_output(*self.under_way.popleft())

    def fail(self):
        """Have a step fail, and all requests end with it, as vLLM's fault tolerance does."""
        while self.under_way:
            self.update()
        # Blocks that are being loaded into are freed later: the engine's own cache could not be emptied now.
        states = {r.status for r in self.scheduler.requests.values()}
        if not states <= {RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.PREEMPTED}:
            return
        output = self.scheduler.schedule()
        self.execute(output, fails=True)
        self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        while not self.scheduler.reset_prefix_cache():
            self.step()
            self.update()
            self.poll()
        self.world.counts["failed"] += 1

    def step(self):
        output = self.scheduler.schedule()
        self.under_way.append((output, self.execute(output)))

    def poll(self):
        for _ in range(self.chance.choice((0, 1, 3, 50))):
            self.engine.poll()
            if not self.engine.active:
                break
            time.sleep(0)

    def go_on(self, *, finish=False):
        chance = self.chance
        self.clock_s += chance.choice(self.pauses_s)
        if not finish:
            self.disturb()
        if self.scheduler.has_requests() or self.ours.has_pending_push_work():
            self.step()
        if self.under_way and (len(self.under_way) >= self.most_under_way or chance.random() < 0.4):
            self.update()
        self.poll()

    def disturb(self):
        chance = self.chance
        if chance.random() < 0.3 and len(self.scheduler.requests) < 10:
            self.arrive()
        if chance.random() < 0.02:
            self.abort()
        if chance.random() < 0.02:
            self.reset()
        if chance.random() < 0.005:
            self.fail()

    def run(self, steps):
        for _ in range(steps):
            self.go_on()
        for _ in range(2000):
            if not self.scheduler.has_requests() and not self.under_way:
                break
            self.go_on(finish=True)
        assert not self.scheduler.get_num_unfinished_requests(), repr(self.ours)

    def close(self):
        self.worker.shutdown()
        self.scheduler.shutdown()
