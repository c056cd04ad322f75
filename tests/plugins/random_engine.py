"""vLLM's real scheduler over the real connector, driven at random, with arithmetic in place of a model.

The KV of a token is a number that depends on all tokens before it and on the weights, so whoever reads a slot
knows at once whether the right KV is there. Requests come, are aborted and preempted; steps overlap; caches
are reset and weights change; another connector loads into the same blocks; steps fail. What groups of KV the
model has, and what its steps read of each, is said in `random_groups`.
"""

from __future__ import annotations

import random
import time
from collections import deque

import random_world
from engines import ours as find_ours
from random_fates import Fates
from random_groups import MIXES, Memory
from random_runner import CopiedTooEarlyError, Drafting, Runner
from random_wishes import Wishes
from random_world import Faults, World
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

BLOCKS = 40
LONGEST = 96
"""Tokens of a request."""


def connectors(settings, other):
    """Make vLLM's configuration of ours, and of the other one if it says where that comes."""
    ours = {
        "kv_connector": "KvbmConnector", "kv_role": "kv_both", "kv_connector_extra_config": settings,
    }  # fmt: skip
    if other:
        theirs = {
            "kv_connector": "OtherConnector", "kv_role": "kv_both",
            "kv_connector_module_path": "random_world",
        }  # fmt: skip
        both = [theirs, ours] if other == "first" else [ours, theirs]
        ours = {
            "kv_connector": "MultiConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"connectors": both},
        }  # fmt: skip
    return KVTransferConfig(**ours, kv_load_failure_policy="recompute")


class Shape:
    """How large an engine's pool is, and the steps that it makes.

    Args:
        mix: Its groups.
        seed: Of the random choice.
        scale: The length of its requests.
    """

    def __init__(self, mix, seed, scale):
        self.chance = chance = random.Random(f"{seed} {mix.groups}")
        self.mix = mix
        self.batch, self.blocks, self.retention = 128 * scale, BLOCKS * scale, None
        if len(mix.groups) > 1 or mix.groups[0].kind != "full":
            self.batch = chance.choice((6, 16, 40, 128)) * scale
            one = sum(group.most_blocks(LONGEST * scale, self.batch) for group in mix.groups)
            self.blocks = 2 + int(one * chance.choice((1, 1.3, 2, 4)))
            dense = (None, None, 0, 2 * mix.alignment)
            self.retention = chance.choice(dense if mix.is_sparse else (None, 0))
        self.proposed = chance.randint(1, 3) if mix.drafts else 0
        self.stores = chance.choice(
            [{}, {"sparse_stores": "dense"}, {"sparse_stores_every_tokens": 2 * mix.alignment}]
        )

    def configure(self, model, transfer, *, overlaps):
        config = EngineArgs(
            model=str(model), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512, block_size=32,
            max_num_seqs=6, max_num_batched_tokens=512, async_scheduling=overlaps, enable_prefix_caching=True,
            kv_transfer_config=transfer,
        ).create_engine_config()  # fmt: skip
        config.cache_config.block_size = self.mix.alignment
        config.cache_config.num_gpu_blocks = self.blocks
        if self.mix.has_states:
            config.cache_config.mamba_cache_mode = "align"
        if self.proposed:
            config.speculative_config = Drafting(self.proposed)
        config.scheduler_config.max_num_scheduled_tokens = self.batch
        config.scheduler_config.max_num_batched_tokens = self.batch
        return config

    def cache(self):
        groups = [
            KVCacheGroupSpec(
                [f"layer.{number}"], group.spec(self.mix.page_words), is_eagle_group=group.drafts
            )
            for number, group in enumerate(self.mix.groups)
        ]
        return KVCacheConfig(self.blocks, [], groups, prefix_cache_retention_interval=self.retention)


class Engine:
    """A scheduler, one worker that computes with arithmetic, and what happens to them.

    Args:
        model: Of which vLLM makes a configuration.
        seed: Of all that is random.
        mix: The name of the model's groups.
        faulty: A backend whose `fault` is set, for some engines with several groups. None: for none.
        bare: True for vLLM alone, with its own prefix cache.
    """

    def __init__(self, model, seed, mix="full", *, faulty=None, bare=False):
        random_world.world = self.world = World(seed)
        self.chance = chance = self.world.chance
        self.overlaps = self.world.overlaps
        self.mix = MIXES[mix]
        other = chance.choice([None, None, "first", "last"])
        names = chance.choice([("cpu",), ("cpu",), ("cpu", "shared"), ("shared",)])
        self.scale = scale = chance.choice((1, 1, 4))
        blocks = chance.choice((12, 48)) * scale * len(self.mix.groups)
        shape = Shape(self.mix, seed, scale)
        if faulty and mix != "full" and shape.chance.random() < 0.5:
            names = shape.chance.choice([("faulty",), ("faulty",), ("cpu", "faulty")])
            faulty.fault = Faults(self.world.counts, seed)
        self.tiers = [{"backend": name, "capacity": blocks * 4096} for name in names]
        self.wishes = Wishes(seed)
        settings = {
            "tiers": self.tiers, "only_faster": False, **shape.stores, **self.wishes.settings(self.tiers),
        }  # fmt: skip
        transfer = None if bare else connectors(settings, other)
        config, cache = shape.configure(model, transfer, overlaps=self.overlaps), shape.cache()
        self.memory = self.world.memory = Memory(self.mix, shape.blocks)
        kind = AsyncScheduler if self.overlaps else Scheduler
        self.scheduler = kind(
            vllm_config=config, kv_cache_config=cache, block_size=self.mix.alignment,
            hash_block_size=self.mix.hash_tokens, structured_output_manager=StructuredOutputManager(config),
        )  # fmt: skip
        self.ours = self.worker = self.engine = None
        if not bare:
            self.connect(config, cache)
        self.most_under_way = 2 if self.overlaps else 1
        self.clock_s = 100.0
        self.pauses_s = chance.choice([(0.0, 0.001, 0.002), (0.0, 0.001, 0.004, 0.02, 0.02, 3.0)])
        self.under_way, self.named = deque(), 0
        self.runner = Runner(self.world, self.memory, self.scheduler.requests, self.worker, shape.proposed)
        self.fates = Fates(self.mix, self.scheduler, self.world.counts, overlaps=self.overlaps)
        self.hasher = get_request_block_hasher(self.mix.hash_tokens, sha256)
        longest = LONGEST * scale + 4 * shape.proposed
        self.books = [[chance.randrange(2, 50) for _ in range(longest)] for _ in range(3)]

    def connect(self, config, cache):
        """Make the worker's half of the connector, and have the scheduler's know of it."""
        self.worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, cache)
        self.worker.register_kv_caches(self.memory.layers)
        self.ours = find_ours(self.scheduler.connector)
        self.half = find_ours(self.worker)._mover
        rank = self.half.rank
        rank.load_wait_s = rank.store_wait_s = 0
        self.engine = rank.worker.take_over()  # It runs when the test says so.
        metadata = self.worker.get_handshake_metadata()
        if metadata is not None:
            self.scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): metadata})

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
        pools = chance.random() < 0.1 and not self.runner.proposed
        pooling = PoolingParams(task="embed", skip_reading_prefix_cache=chance.random() < 0.5)
        sampling = SamplingParams(
            temperature=0, max_tokens=chance.randint(1, 20), ignore_eos=True, extra_args=self.wishes.of(name)
        )
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
            done = self.scheduler.reset_prefix_cache(
                reset_running_requests=preempts, reset_connector=self.ours is not None
            )
        except RuntimeError:  # Requests that have loaded and were not scheduled since.
            return
        if done:
            self.world.weights += 1
            self.world.right.clear()
            self.world.counts["resets"] += 1

    # Steps.

    def update(self):
        output, result = self.under_way.popleft()
        told = self.scheduler.update_from_output(output, result)
        for answered in (each for outputs in told.values() for each in outputs.outputs if each.finish_reason):
            self.world.counts["hints"] += self.wishes.check(answered.request_id, answered.kv_transfer_params)
        self.fates.ended(output)
        if self.runner.proposed and not self.overlaps:
            self.scheduler.update_draft_token_ids(self.runner.propose(result.req_ids))

    def fail(self):
        """Have a step fail, and all requests end with it, as vLLM's fault tolerance does."""
        while self.under_way:
            self.update()
        # Blocks that are being loaded into are freed later: the engine's own cache could not be emptied now.
        states = {r.status for r in self.scheduler.requests.values()}
        if not states <= {RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.PREEMPTED}:
            return
        output = self.scheduler.schedule()
        self.runner.execute(output, fails=True)
        self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        while not self.scheduler.reset_prefix_cache():
            self.step()
            self.update()
            self.poll()
        self.world.counts["failed"] += 1

    def step(self):
        output = self.scheduler.schedule()
        self.fates.scheduled(output)
        result, parts = self.runner.execute(output)
        self.under_way.append((output, result))
        self.fates.executed(output, parts)

    def poll(self):
        for _ in range(self.chance.choice((0, 1, 3, 50)) if self.engine else 0):
            self.engine.poll()
            if not self.engine.active:
                break
            time.sleep(0)

    def go_on(self, *, finish=False):
        chance = self.chance
        self.clock_s += chance.choice(self.pauses_s)
        if not finish:
            self.disturb()
        if self.scheduler.has_requests() or (self.ours and self.ours.has_pending_push_work()):
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
        try:
            self.happen(steps)
        except (
            CopiedTooEarlyError
        ):  # No connector is needed for that: what follows would say nothing of ours.
            self.world.counts["copied too early"] += 1

    def happen(self, steps):
        for _ in range(steps):
            self.go_on()
        for _ in range(2000):
            if not self.scheduler.has_requests() and not self.under_way:
                break
            self.go_on(finish=True)
        assert not self.scheduler.get_num_unfinished_requests(), repr(self.ours)

    def happened(self):
        """Count what has happened, and what tiers did."""
        counts = self.world.counts
        for tier in self.ours.counts.values():
            filled = {reason: nbytes for (_, reason), nbytes in tier.filled_bytes.items()}
            counts["prefetched"] += filled.get("prefetch", 0)
            counts["loaded"] += tier.loaded
            counts["stored"] += tier.stored
        return counts

    def close(self):
        if self.worker:
            self.worker.shutdown()
        self.scheduler.shutdown()
