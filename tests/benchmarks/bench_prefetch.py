"""What reading ahead saves: from a request's turn to its first token, its blocks being in a slowed store.

    python tests/benchmarks/bench_prefetch.py [--brief] [--delay-ms 5]

One engine with SmolLM2 that runs one request at a time, over host memory and a real S3 server behind a proxy
that holds each chunk of bytes back. A request runs, and another one waits behind it while so many tokens are
computed; then the first is aborted, which is the other one's turn. With and without reading ahead in turn, in
one run. Answers are compared with those of the engine before anything was loaded.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

from vllm import SamplingParams

for place in ("..", "../plugins"):
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), place))
from engines import connector, drain, forget, make_engine, story_tokens  # noqa: E402
from servers import FaultProxy, S3Server  # noqa: E402

BLOCK_TOKENS = 32


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


class Queue:
    """The engine, and prompts whose blocks are in the store alone.

    Args:
        llm: Of vLLM.
        wait_steps: Tokens that the running request computes while the other one waits.
    """

    def __init__(self, llm: Any, wait_steps: int) -> None:
        self.llm, self.engine, self.wait_steps = llm, llm.llm_engine, wait_steps
        self.session = connector(llm)._leader.session
        self.chunk_blocks = self.session._prefetch._chunk_blocks
        self.block_bytes = self.session.planner.tiers[0].block_bytes[0]
        self.number = 0

    def forget(self) -> None:
        """Empty vLLM's own cache and host memory."""
        forget(self.llm)
        tiers = self.session.planner.tiers
        for key in list(tiers[0].index):
            tiers.drop(0, key)
        drain(self.llm)

    def serve(self, prompt: list[int], *, ahead: bool) -> tuple[float, tuple[int, ...], int]:
        """Give the seconds from a prompt's turn to its first token, its answer, and the blocks read ahead."""
        self.forget()
        self.session._prefetch._chunk_blocks = self.chunk_blocks if ahead else 0
        self.number += 1
        runs, waits = f"runs {self.number}", f"waits {self.number}"
        before = self.read_ahead_bytes()
        self.engine.add_request(runs, {"prompt_token_ids": prompt[-20:]}, params(4000))  # No block.
        self.engine.step()
        self.engine.add_request(waits, {"prompt_token_ids": prompt}, params(4))
        for _ in range(self.wait_steps):
            self.engine.step()
        self.engine.abort_request([runs], internal=False)
        began_s, first_s, answer = time.perf_counter(), 0.0, ()
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                answer = tuple(output.outputs[0].token_ids)
                first_s = first_s or time.perf_counter() - began_s
        drain(self.llm)
        return first_s, answer, (self.read_ahead_bytes() - before) // self.block_bytes

    def read_ahead_bytes(self) -> int:
        """Give the bytes read from the store into host memory so far, for requests that waited."""
        return self.session.planner.counts["cpu"].filled_bytes[1, "prefetch"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--brief", action="store_true", help="few rounds: does it run at all?")
    parser.add_argument("--delay-ms", type=float, default=5.0, help="added to each chunk of bytes")
    options = parser.parse_args()
    model, tokens = story_tokens()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"command: python {' '.join(sys.argv)}")
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, threads: {threads}")
    with S3Server() as server, FaultProxy(server, delay_s=options.delay_ms / 1e3) as proxy:
        os.environ |= server.env
        with tempfile.TemporaryDirectory() as name:
            place = {"url": f"s3://kvbm-test/{os.path.basename(name)}"}
            place["storage_options"] = {"endpoint_url": proxy.endpoint}
            tiers = [{"backend": "cpu", "capacity": "512MiB"}, {"backend": "remote", **place}]
            extra = {"lookup_deadline_s": 30, "load_deadline_s": 60, "prefetch_fraction": 0.5}
            llm = make_engine(model, tiers, extra=extra, max_num_seqs=1, dtype="float32", max_model_len=4096)
            queue = Queue(llm, wait_steps=20 if options.brief else 40)
            print(f"{'tokens':>8}{'':4}{'without, ms':>24}{'with, ms':>24}{'read ahead':>12}")
            for length in (129,) if options.brief else (129, 513):
                prompt = tokens[:length]
                answer = tuple(
                    llm.generate([{"prompt_token_ids": prompt}], params(4), use_tqdm=False)[0]
                    .outputs[0].token_ids
                )  # fmt: skip
                drain(llm)
                proxy.mode = "slow"
                taken: dict[bool, list[float]] = {False: [], True: []}
                for _ in range(2 if options.brief else 5):
                    for ahead in (False, True):
                        first_s, got, read = queue.serve(prompt, ahead=ahead)
                        assert got == answer, "not the tokens of before"
                        assert ahead or not read
                        taken[ahead].append(first_s * 1e3)
                proxy.mode = "pass"
                cells = [
                    f"{statistics.median(each):.0f} ({min(each):.0f} to {max(each):.0f})"
                    for each in taken.values()
                ]
                blocks = f"{read} of {(length - 1) // BLOCK_TOKENS}"
                print(f"{length:>8}{'':4}{cells[0]:>24}{cells[1]:>24}{blocks:>12}", flush=True)
            llm.llm_engine.engine_core.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
