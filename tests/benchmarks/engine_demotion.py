"""Time to first token with demotion into a tier that is slower than computing, against no connector at all.

    python tests/benchmarks/engine_demotion.py [--device cuda] [--requests 100] [--others 24] [--tokens 4096]

Two engines in processes of their own, with a random Llama that is made on the spot; nothing else is needed,
no network, no trace. Each request is asked of both, one after the other, in turning order, so that whatever
else the machine does disturbs both; vLLM's own cache is emptied before each. In one engine a host memory of a
third of the prompts stands above a tier with demotion between them. That tier is

  fast         so that the cost model has measured it
  slow         a block takes ten times as long to bring as to compute (`--slower`): 100 requests
  fast again   asked until the engine has found that out, at most so many seconds; then it is used again
  slow again   left alone again

A line each: the time to the first token with the tiers, as a part of that without a connector (of all
requests together, of the median pair, and of the 95th percentiles), each with an interval of 95 % (resampled
pairs), and what was loaded from each tier. Goal: at most 1.05 while it is slow. Ends with 1 where that or a
recovery failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple

TESTS: Final = Path(__file__).parent.parent
PROMPTS, BLOCK_TOKENS, VOCABULARY = 12, 32, 4000
GOAL: Final = 1.05
SHAPES: Final[dict[str, dict[str, Any]]] = {
    # Computes some ten thousand tokens a second on two cores.
    "cpu": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32},
    # Llama 3.2 1B with twice its layers and a small vocabulary: 64 KiB of KV a token.
    "cuda": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
}  # fmt: skip
_SLOW: Final = """
import time
from kvbm_core import Backend, Op, hookimpl
from kvbm_core.memory import MemoryConfig, MemoryTier

seconds_a_block = 0.0

class SlowTier(MemoryTier):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.loads, self.held, self.free_s = set(), [], 0.0

    def submit(self, transfers):
        self.loads |= {each.ticket for each in transfers if each.op is Op.LOAD}
        super().submit(transfers)

    def poll(self):
        self.held += super().poll()
        ended, kept, now_s = [], [], time.monotonic()
        for each in self.held:
            if each.ticket not in self.loads or not seconds_a_block:
                ended.append(each)
            elif now_s >= self.free_s and not kept:
                self.free_s = now_s + seconds_a_block
                ended.append(each)
            else:
                kept.append(each)
        self.held = kept
        self.loads.difference_update(each.ticket for each in ended)
        return ended

@hookimpl
def kvbm_backends():
    return [Backend("slow", MemoryConfig, SlowTier)]
"""


class Ask(NamedTuple):
    """One request to an engine."""

    prompt: int
    seconds_a_block: float
    """That the lower tier takes from now on; 0: as fast as memory."""


class Told(NamedTuple):
    """What an engine answers."""

    first_token_s: float
    answer: tuple[int, ...]
    loaded: dict[str, int]
    """Blocks so far, by tier."""


def install_slow(site: Path) -> Any:
    """Put the slow tier where entry points are found, and import it."""
    (site / "slow_tier.py").write_text(_SLOW)
    info = site / "slow_tier-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-tier\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvbm_core]\nslow = slow_tier\n")
    sys.path.insert(0, str(site))
    import slow_tier

    return slow_tier


def make_model(folder: Path, device: str) -> None:
    """Write a random Llama whose answers depend on the whole prompt."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[device], vocab_size=VOCABULARY, max_position_embeddings=65536, initializer_range=0.08,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)


def tiers_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Give a host memory of a third of the prompts, and below it the slow tier, by demotion."""
    shape = SHAPES[options.device]
    token_bytes = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * 2
    prompts_bytes = PROMPTS * (options.tokens + BLOCK_TOKENS) * token_bytes
    movement = {"stores": "demotion", "low_watermark": 0.5, "high_watermark": 0.9}
    return [
        {"backend": "cpu", "capacity": prompts_bytes // 3},
        {"backend": "slow", "capacity": 4 * prompts_bytes, "movement": movement},
    ]


def engine(pipe: Connection, model: str, options: argparse.Namespace, *, has_tiers: bool) -> None:
    """Answer requests until there is none."""
    sys.path[:0] = [str(TESTS / "plugins"), str(TESTS)]
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_USE_FLASHINFER_SAMPLER="0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from engines import connector, forget, generate, make_engine

    slow = install_slow(Path(tempfile.mkdtemp()))
    more: dict[str, Any] = {"gpu_memory_utilization": 0.3} if options.device == "cuda" else {}
    llm = make_engine(
        Path(model), tiers_of(options) if has_tiers else None,
        extra={"only_faster": True, "load_deadline_s": 60}, max_model_len=options.tokens + 64,
        block_size=BLOCK_TOKENS, num_gpu_blocks_override=4 * options.tokens // BLOCK_TOKENS,
        max_num_batched_tokens=8192, **more,
    )  # fmt: skip
    rng = random.Random(7)
    prompts = [[rng.randrange(2, VOCABULARY) for _ in range(options.tokens)] for _ in range(PROMPTS)]
    for each in prompts[:3]:  # Kernels are compiled, and memory is touched.
        forget(llm)
        generate(llm, [each[::-1]], max_tokens=1)
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        slow.seconds_a_block = request.seconds_a_block
        forget(llm)
        began_s = time.perf_counter()
        [answer] = generate(llm, [prompts[request.prompt]], max_tokens=1)
        took_s = time.perf_counter() - began_s
        counts = connector(llm).counts if has_tiers else {}
        pipe.send(Told(took_s, answer, {name: each.loaded for name, each in counts.items()}))
    pipe.close()


class Engines:
    """Both engines: one with tiers, one without a connector."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for has_tiers in (True, False):  # The second starts when the first has taken its memory.
            ours, theirs = context.Pipe()
            context.Process(
                target=engine, args=(theirs, model, options), kwargs={"has_tiers": has_tiers}, daemon=True
            ).start()
            theirs.close()
            assert ours.recv() == "ready"
            self._pipes.append(ours)
        self.loaded: dict[str, int] = {}
        self.asked = self.unlike = 0
        """Requests, and those of them with unlike answers."""

    def ask(self, prompt: int, seconds_a_block: float) -> tuple[float, float]:
        """Give the seconds to the first token with tiers and without."""
        order = (0, 1) if self.asked % 2 else (1, 0)
        told: dict[int, Told] = {}
        for at in order:
            self._pipes[at].send(Ask(prompt, seconds_a_block))
            told[at] = self._pipes[at].recv()
        self.asked += 1
        self.unlike += told[0].answer != told[1].answer
        self.loaded = told[0].loaded
        return told[0].first_token_s, told[1].first_token_s

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)


@dataclass
class Phase:
    """Requests of one state of the tier, and what came of them."""

    name: str
    engines: Engines
    pairs: list[tuple[float, float]] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    lower: list[int] = field(default_factory=list)
    """Blocks loaded from the lower tier, by request."""

    def ask(self, count: int, rng: random.Random, seconds_a_block: float) -> None:
        """Ask so many requests."""
        self.before = self.before or dict(self.engines.loaded)
        for _ in range(count):
            had = self.engines.loaded.get("slow", 0)
            self.pairs.append(self.engines.ask(rng.randrange(PROMPTS), seconds_a_block))
            self.lower.append(self.engines.loaded.get("slow", 0) - had)

    def show(self) -> float:
        """Print a line; give the ratio of all requests together."""
        before = self.before
        loaded = {name: count - before.get(name, 0) for name, count in self.engines.loaded.items()}
        total, median, tail = (estimate(self.pairs, of) for of in (total_of, median_of, tail_of))
        without_ms = statistics.median(second for _, second in self.pairs) * 1e3
        print(
            f"{self.name:<11} {len(self.pairs):>4} requests, {without_ms:,.0f} ms without: all {total}, "
            f"median {median}, p95 {tail}; loaded {loaded}",
            flush=True,
        )
        return total_of(self.pairs)


Pairs = Sequence[tuple[float, float]]


def total_of(pairs: Pairs) -> float:
    return sum(first for first, _ in pairs) / sum(second for _, second in pairs)


def median_of(pairs: Pairs) -> float:
    return statistics.median(first / second for first, second in pairs)


def tail_of(pairs: Pairs) -> float:
    """Give the ratio of the 95th percentiles."""
    first, second = (sorted(each) for each in zip(*pairs, strict=True))
    at = int(0.95 * (len(pairs) - 1))
    return first[at] / second[at]


def estimate(pairs: Pairs, of: Callable[[Pairs], float]) -> str:
    """Give a number with the interval in which it lies for 95 % of resampled pairs."""
    rng = random.Random(3)
    found = sorted(of(rng.choices(pairs, k=len(pairs))) for _ in range(1000))
    return f"{of(pairs):.3f} [{found[25]:.3f}, {found[974]:.3f}]"


def run(engines: Engines, options: argparse.Namespace) -> bool:
    """Go through the phases; True if the goal was met and both recoveries were seen."""
    rng = random.Random(1)
    fast = Phase("fast", engines)
    fast.ask(options.others, rng, 0.0)
    fast.show()
    blocks = options.tokens // BLOCK_TOKENS
    slow_s = options.slower * statistics.median(second for _, second in fast.pairs) / blocks
    slow = Phase("slow", engines)
    slow.ask(options.requests, rng, slow_s)
    ratio = slow.show()
    finding, until_s = Phase("finding out", engines), time.monotonic() + options.patience
    while time.monotonic() < until_s and sum(finding.lower) < blocks:
        finding.ask(1, rng, 0.0)
    finding.show()
    again = Phase("fast again", engines)
    again.ask(options.others, rng, 0.0)
    again.show()
    slow_again = Phase("slow again", engines)
    slow_again.ask(options.others, rng, slow_s)
    slow_again.show()
    late = sum(slow_again.lower[len(slow_again.lower) // 2 :])
    verdicts = {
        f"{ratio:.3f} while it is slow, goal {GOAL}": ratio <= GOAL,
        "used again": sum(again.lower) >= blocks,
        f"left alone again ({late} blocks in the second half)": late < blocks * options.others // 20,
    }
    print("; ".join(f"{what}: {'yes' if is_so else 'NO'}" for what, is_so in verdicts.items()))
    print(f"answers alike: {engines.asked - engines.unlike} of {engines.asked}")
    return all(verdicts.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--requests", type=int, default=100, help="while the tier is slow")
    parser.add_argument("--others", type=int, default=24, help="in each other phase")
    parser.add_argument("--tokens", type=int, help="of a prompt; default 4096, on a CPU 1280")
    parser.add_argument("--slower", type=float, default=10.0, help="a block, in times of computing one")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to find out that it is fast")
    options = parser.parse_args()
    options.tokens = options.tokens or (4096 if options.device == "cuda" else 1280)
    print(f"command: python {' '.join(sys.argv)}")
    python = platform.python_version()
    print(f"{platform.machine()}, {os.cpu_count()} cores, python {python}, {options.device}")
    with tempfile.TemporaryDirectory() as folder:
        make = multiprocessing.get_context("spawn").Process(
            target=make_model, args=(Path(folder), options.device)
        )
        make.start()
        make.join()
        engines = Engines(folder, options)
        try:
            return not run(engines, options)
        finally:
            engines.close()


if __name__ == "__main__":
    sys.exit(main())
