"""Starts a family's small model twice and says, in JSON, what was restored: for `tools/prove_models.py`.

    python model_child.py               the names of the families
    python model_child.py gemma3 DIR    proves one; the model and its tiers lie in DIR

The first line says what is tried, the last one what came of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

LENGTHS = (2016, 2017, 2111, 2350, 2499, 2750, 3003, 3201, 3555, 3841, 4000)
"""Of prompts, in tokens."""


def main() -> None:
    """Print the names, or prove one."""
    from models import FAMILIES

    if len(sys.argv) < 2:
        print(json.dumps([name for name, family in FAMILIES.items() if family.serves]))
        return
    import vllm
    from vllm.platforms import current_platform

    name, folder = sys.argv[1], Path(sys.argv[2])
    family = FAMILIES[name]
    said: dict[str, Any] = {
        "architecture": family.architecture, "mended": family.mended, "vllm": vllm.__version__,
        "device": "CPU" if current_platform.is_cpu() else "GPU",
        "dtype": dict(family.options).get("dtype", "float32"),
    }  # fmt: skip
    print(json.dumps(said), flush=True)
    try:
        said.update(prove(name, folder))
    except Exception as error:  # noqa: BLE001 - Whatever it is, it is what the table says.
        said["error"] = words_of(error)
    print(json.dumps(said), flush=True)
    os._exit(0)  # Some engines that did not start do not end either.


def prove(name: str, folder: Path) -> dict[str, Any]:
    """Start a family; restore prompts from host memory, and after a restart from a disk and a remote tier."""
    from engines import drain, loaded, make_engine
    from hybrid import boundary_of, make_prompt, mended, options_of, own_answer, specs_of, watching
    from models import write_model

    model = write_model(folder / "model", name)
    below = [
        {"backend": "lmdb", "capacity": "16MiB", "path": str(folder / "lmdb")},
        {"backend": "remote", "url": f"file://{folder}/remote"},
    ]
    cpu = {"backend": "cpu", "capacity": "256MiB"}
    patience = {"lookup_deadline_s": 60, "load_deadline_s": 60}
    prompts = [make_prompt(length, seed=length) for length in LENGTHS]
    said: dict[str, Any] = {"started": True}
    with watching() as watch, mended(name):
        llm = make_engine(model, [cpu, *below], **options_of(name, extra=patience))
        layers = [len(group.layer_names) for group in kv_cache_groups(llm)]
        said["groups"] = [
            [type(spec).__name__, spec.block_size, count]
            for spec, count in zip(specs_of(llm), layers, strict=True)
        ]
        own = [own_answer(llm, prompt) for prompt in prompts]
        said["boundaries"] = len({boundary_of(llm, prompt) for prompt in prompts})
        said["host"] = restored_all(llm, watch, prompts, own)
        said["zeros"] = zeros(llm, watch, prompts[0])
        drain(llm)
        llm.llm_engine.engine_core.shutdown()
        llm = make_engine(model, below, **options_of(name, extra=patience))
        said["below"] = restored_all(llm, watch, prompts, own)
        said["loaded"] = loaded(llm)
        llm.llm_engine.engine_core.shutdown()
    return said


def kv_cache_groups(llm: Any) -> Any:
    """The groups as vLLM's scheduler knows them."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups


def restored_all(llm: Any, watch: Any, prompts: list[list[int]], own: list[Any]) -> dict[str, int]:
    """How many prompts had the same answer to the last bit, and how many loaded just what the rules say."""
    from hybrid import boundary_of, needed_of, restored

    counts = {"prompts": len(prompts), "identical": 0, "counted": 0}
    for prompt, answer in zip(prompts, own, strict=True):
        tokens = boundary_of(llm, prompt)
        said, *what = restored(llm, watch, prompt)
        counts["identical"] += said == answer
        counts["counted"] += what == [tokens, needed_of(llm, tokens)]
    return counts


def zeros(llm: Any, watch: Any, prompt: list[int]) -> dict[str, int]:
    """For how many objects, of all that a prompt loads, zeros in place of them change the answer."""
    from hybrid import restored

    right, _, counts = restored(llm, watch, prompt)
    shown = 0
    for group, count in counts.items():
        for place in range(count):
            watch.spoils = lambda of, at, victim=(group, place): (of, at) == victim
            shown += restored(llm, watch, prompt)[0] != right
    watch.spoils = None
    return {"objects": sum(counts.values()), "shown": shown}


def words_of(error: BaseException) -> str:
    """What went wrong, in the words of whoever found it, without what wraps them."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error) or type(error).__name__
    if "Value error, " in text:
        return text.split("Value error, ", 1)[1].split(" [type=", 1)[0].splitlines()[0]
    return f"{type(error).__name__}: {text.splitlines()[0]}"


if __name__ == "__main__":
    main()
