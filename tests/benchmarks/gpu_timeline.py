"""What happens between a prompt's arrival and its first token, in the engine's process and on the GPU.

    python tests/benchmarks/gpu_timeline.py ours [--tokens 8192] [--graphs] [--json FILE] [--profile DIR]

Asks one prompt cold, then from vLLM's prefix cache and restored, several times each, and prints for the
quickest of each kind what ran when, in ms after the question. With `--profile`, one more restored prompt
runs under torch's profiler; `draw_timeline.py` makes a picture of both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from gpu_serve import SHAPES, Engine, prepare, prompt

_TIMES = 6


def ask(engine: Engine, prompts: list[dict]) -> dict:
    """Ask, and give what was noted meanwhile."""
    engine.llm.collective_rpc("take_spans")
    begin, clock = time.monotonic_ns(), time.time_ns()
    engine.ask(prompts)
    end = time.monotonic_ns()
    time.sleep(0.2)
    return {"begin": begin, "end": end, "clock": clock, "spans": engine.llm.collective_rpc("take_spans")[0]}


def show(name: str, found: dict) -> None:
    begin, end = found["begin"], found["end"]
    print(f"== {name}: {(end - begin) / 1e6:.1f} ms")
    for what, thread, start, stop in sorted(found["spans"], key=lambda span: span[2]):
        if start <= end and stop - start > 100_000:
            print(f"  {(start - begin) / 1e6:7.2f} {(stop - start) / 1e6:7.2f}  {thread[:14]:14} {what}")


def run(name: str, arguments: argparse.Namespace, folder: str) -> dict:
    options: dict[str, object] = {"worker_extension_cls": "spans.Extension"}
    if arguments.profile:
        options["profiler_config"] = {
            "profiler": "torch", "torch_profiler_dir": str(arguments.profile),
            "torch_profiler_with_stack": False,
        }  # fmt: skip
    engine = Engine(name, arguments, folder, **options)
    for seed in (98, 99):
        engine.ask([prompt(2048, seed)])
    kinds: dict[str, list[dict]] = {"cold": [], "gpu_hit": [], "restored": []}
    asked = [prompt(arguments.tokens, at) for at in range(_TIMES)]
    kinds["cold"] = [ask(engine, [p]) for p in asked]
    time.sleep(1)
    kinds["gpu_hit"] = [ask(engine, [p]) for p in asked]
    engine.llm.reset_prefix_cache()
    if name != "none":
        kinds["restored"] = [ask(engine, [p]) for p in asked]
    for kind, all_found in kinds.items():
        all_found.sort(key=lambda found: found["end"] - found["begin"])
        times = ", ".join(f"{(found['end'] - found['begin']) / 1e6:.1f}" for found in all_found)
        print(f"{name} {arguments.tokens} {kind}: {times} ms")
    for kind in ("gpu_hit", "restored"):
        for found in kinds[kind][:1]:
            show(f"{name} {kind}", found)
    if arguments.batch and name != "none":
        many = [prompt(4096, 777 + at) for at in range(32)]
        engine.ask(many)
        time.sleep(1)
        kinds["batch"] = []
        for _ in range(4):
            engine.llm.reset_prefix_cache()
            kinds["batch"].append(ask(engine, many))
            took_s = (kinds["batch"][-1]["end"] - kinds["batch"][-1]["begin"]) / 1e9
            print(f"{name} batch restored: {took_s * 1e3:.0f} ms, {32 * 4096 / took_s:.0f} tokens/s")
    if arguments.profile:
        engine.llm.reset_prefix_cache()
        engine.llm.start_profile()
        kinds["profiled"] = [ask(engine, asked[:1])]
        engine.llm.stop_profile()
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--shape", choices=SHAPES, default="llama8b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--no-batch", dest="batch", action="store_false")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.lengths = [arguments.tokens]
    prepare()
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory() as folder:
        kinds = run(arguments.name, arguments, folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(kinds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
