"""What random engines compute, and another connector that brings it from elsewhere."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
from random_groups import Part
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorTransferResults,
    SupportsHMA,
)

from kvbm_core.tier import Op


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
        self.memory = None
        """That of the worker."""
        self.overlaps = self.chance.random() < 0.5
        """Whether the next step is planned and begun before the outcome of the last has come."""
        self.counts: Counter[str] = Counter()
        self.tokens: dict[str, list[int]] = {}
        self.right: dict[tuple[str, int], np.ndarray] = {}

    def part(self, name, tables, start, end, rejected=0, **given):
        """Say what is computed of a request in a step, or brought from elsewhere."""
        tokens = np.array(self.tokens[name])
        return Part(name, tables, start, end, end - rejected, self.kv(name), tokens, **given)

    def kv(self, name):
        key = (name, self.weights)
        if key not in self.right:
            self.right[key] = kv_of(self.tokens[name], self.weights)
        return self.right[key]


world = World(0)
"""Of the engine that runs: vLLM makes the connectors, so they look here."""


class Faults:
    """Has a tier lose some objects and spoil others, of one KV group or another.

    Args:
        counts: Where to count what cannot be loaded.
        seed: Of the random choice.
    """

    def __init__(self, counts, seed):
        self.counts, self.chance = counts, random.Random(f"{seed} faults")

    def __call__(self, transfer):
        if self.chance.random() > 0.1 or transfer.op not in (Op.LOAD, Op.STORE):
            return None
        self.counts["spoilt"] += transfer.op is Op.LOAD
        return self.chance.choice(("error", "flip", "lie") if transfer.op is Op.LOAD else ("error", "full"))


class OtherMetadata(KVConnectorMetadata):
    def __init__(self, loads):
        self.loads = loads


class OtherConnector(KVConnectorBase_V1, SupportsHMA):
    """Brings KV from elsewhere, as a decoding engine gets it from a prefilling one; some loads fail."""

    requires_kv_delivery = False

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self.planned, self.offers, self.local, self.under_way = [], {}, {}, []
        self.ended, self.failed, self.failed_blocks = set(), set(), set()

    # In the scheduler.

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        name, mix = request.request_id, world.memory.mix
        offer = self.offers.setdefault(name, world.chance.choice(["none", "none", "now", "later"]))
        self.local[name] = num_computed_tokens
        units = (request.num_tokens - 1) // mix.alignment - num_computed_tokens // mix.alignment
        if offer == "none" or units < 1 or request.skip_reading_prefix_cache:
            return 0, False
        # vLLM prepares a state for its step before a load of the same step can begin.
        later = offer == "later" or mix.has_states
        self.offers[name] = "later" if later else "now"
        return world.chance.randint(1, units) * mix.alignment, later

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        name = request.request_id
        if num_external_tokens:
            load = name, blocks.get_block_ids(), self.local[name], num_external_tokens, self.offers[name]
            self.planned.append(load)
        self.offers[name] = "none"

    def build_connector_meta(self, scheduler_output):
        planned, self.planned = self.planned, []
        return OtherMetadata(planned)

    def request_finished(self, request, block_ids):
        self.offers.pop(request.request_id, None)
        return False, None

    request_finished_all_groups = request_finished

    # In the worker.

    def start_load_kv(self, forward_context, **kwargs):
        for load in self._connector_metadata.loads:
            if load[-1] == "later":
                self.under_way.append(load)
            else:
                self.bring(*load)

    def bring(self, name, tables, start, count, when):
        # Not where the step waits for the load: vLLM itself, alone with this connector, goes on with such KV.
        fails = when == "later" and world.chance.random() < 0.2
        world.counts["other"] += count
        world.memory.bring(world.part(name, tables, start, start + count), fails=fails)
        if fails and len(tables) == 1 and not world.memory.mix.is_sparse:
            size = world.memory.mix.alignment
            self.failed_blocks.update(tables[0][start // size : (start + count) // size])
        elif fails:
            self.failed.add(name)
        if when == "later":
            self.ended.add(name)

    def get_transfer_results(self, finished_req_ids):
        for load in list(self.under_way):
            if world.chance.random() < 0.5:
                self.under_way.remove(load)
                self.bring(*load)
        ended, self.ended = self.ended, set()
        failed, self.failed = self.failed, set()
        return KVConnectorTransferResults(set(), ended, failed)

    def get_block_ids_with_load_errors(self):
        failed, self.failed_blocks = self.failed_blocks, set()
        return failed

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def wait_for_save(self):
        pass
