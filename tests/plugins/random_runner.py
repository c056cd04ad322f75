"""The worker of a random engine: does in a step what vLLM's model runner does, in its order."""

from __future__ import annotations

import torch
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput


class CopiedTooEarlyError(Exception):
    """vLLM 0.32 has copied a prefix out of a block that another request computes in this same step."""


class Drafting:
    """What vLLM's scheduler reads in its configuration of a drafting model.

    Args:
        tokens: How many tokens it proposes for each request.
    """

    num_speculative_tokens_per_batch_size = None
    max_num_new_slots_for_drafting = 0
    method = "eagle"

    def __init__(self, tokens):
        self.num_speculative_tokens = tokens

    def use_eagle(self):
        return True

    use_eagle_block_drop = use_eagle

    def use_multi_module_mtp(self):
        return False

    use_dflash = use_dspark = uses_draft_model = use_multi_module_mtp


class Runner:
    """Computes steps in a memory.

    Args:
        world: What is right.
        memory: Of the KV.
        requests: Those of the scheduler, by their names.
        worker: The connector's half. None: there is none.
        proposed: Tokens that a drafting model proposes, 0 if there is none.
    """

    def __init__(self, world, memory, requests, worker, proposed):
        self.world, self.memory, self.requests = world, memory, requests
        self.worker, self.proposed = worker, proposed
        self.tables, self.computed = {}, {}
        self.unsure = set()
        """Requests of which the drafting model will go over the last token again."""

    def execute(self, output, *, fails=False):
        """Compute a step; give its result, None if it fails, and what it computed."""
        preempted = output.preempted_req_ids or ()
        self.world.counts["preempted"] += len(preempted)
        for name in output.finished_req_ids:
            self.tables.pop(name, None)
        for name in (*output.finished_req_ids, *preempted):
            self.forget(name)
        worker = self.worker
        if worker:
            worker.bind_connector_metadata(output.kv_connector_metadata)
            worker.handle_preemptions(output.kv_connector_metadata)
        self.follow(output)
        self.memory.zero(output.new_block_ids_to_zero or [])
        new = {*(output.new_block_ids_to_zero or ())}
        for copy in output.kv_cache_block_copies or ():
            if copy.src_block_id in new:
                raise CopiedTooEarlyError
            self.memory.copy(copy.src_block_id, copy.dst_block_id)
            new.discard(copy.dst_block_id)
            self.world.counts["hits within blocks"] += 1
        waits = output.has_sync_kv_loads
        if worker and waits:
            worker.start_load_kv(None)
        parts = [self.part(name, output) for name in output.num_scheduled_tokens]
        self.world.counts["slots"] += self.memory.step(parts, fails=fails)
        if worker and not waits:
            worker.start_load_kv(None)
        if fails and worker:
            worker.clear_connector_metadata()
        return None if fails else self.result(output, parts), parts

    def forget(self, name):
        """Take the request to begin anew."""
        self.memory.forget(name)
        self.unsure.discard(name)

    def follow(self, output):
        """Keep the requests' blocks, and where each is to go on."""
        groups = self.memory.mix.groups
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = [list(blocks) for blocks in new.block_ids]
            self.computed[new.req_id] = new.num_computed_tokens
            self.forget(new.req_id)
            self.world.counts["hits"] += new.num_computed_tokens > 0
        cached = output.scheduled_cached_reqs
        for at, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[at]
            if name in cached.resumed_req_ids:
                self.tables[name] = [[] for _ in groups]
                self.computed[name] = cached.num_computed_tokens[at]
                self.forget(name)
            # What was rejected in steps under way is not known to the scheduler yet.
            assert self.computed[name] <= cached.num_computed_tokens[at]
            assert self.proposed or self.computed[name] == cached.num_computed_tokens[at]
            for number in range(len(groups)) if blocks else ():
                self.tables[name][number] += blocks[number]

    def part(self, name, output):
        """Give what a step computes of a request: all its tokens, or those proposed that are right."""
        start, end = self.computed[name], self.computed[name] + output.num_scheduled_tokens[name]
        drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
        rejected = self.world.chance.randint(0, drafts) if drafts else 0
        self.computed[name] = stop = end - rejected
        self.world.counts["rejected"] += rejected
        request = self.requests[name]
        goes_on = stop + 1 < request.num_prompt_tokens + request.max_tokens
        unsure = 0 < rejected < drafts and goes_on
        part = self.world.part(
            name, self.tables[name], start, end, rejected,
            ahead=max(0, self.proposed - 1), unsure=unsure, again=name in self.unsure,
        )  # fmt: skip
        (self.unsure.add if part.unsure else self.unsure.discard)(name)
        return part

    def result(self, output, parts):
        """What a step's worker says of it."""
        names, sampled, pooled = [part.name for part in parts], [], []
        for part in parts:
            request = self.requests[part.name]
            drafts = len(output.scheduled_spec_decode_tokens.get(part.name, ()))
            tokens = self.world.tokens[part.name][part.end - drafts : part.stop + 1]
            ends = not request.is_prefill_chunk
            sampled.append(tokens if ends and not request.pooling_params else [])
            pooled.append(torch.zeros(1) if ends and request.pooling_params else None)
        return ModelRunnerOutput(
            names, {name: at for at, name in enumerate(names)}, sampled, pooler_output=pooled,
            kv_connector_output=self.told(output) if self.worker else None,
        )  # fmt: skip

    def propose(self, names):
        """Propose tokens for requests of a step that has ended."""
        chance = self.world.chance
        return DraftTokenIds(list(names), [[0] * chance.randint(0, self.proposed) for _ in names])

    def told(self, output):
        """What the connector of the worker says after a step."""
        worker = self.worker
        worker.wait_for_save()
        found = worker.get_transfer_results(output.finished_req_ids)
        told = KVConnectorOutput(
            finished_sending=found.finished_sending, finished_recving=found.finished_recving,
            failed_recving=found.failed_recving, invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )  # fmt: skip
        worker.clear_connector_metadata()
        return told
