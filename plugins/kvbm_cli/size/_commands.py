"""The verb `kvbm size`."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbm_cli._console import make_console
from kvbm_cli.size._answer import Sizes, make_table, measure
from kvbm_cli.size._groups import Ranks
from kvbm_core.command import answers, write_json
from kvbm_core.config import size_text
from kvbm_core.errors import ConfigError

__all__ = ["ELEMENT_BYTES", "element_bytes_of", "size"]

ELEMENT_BYTES = {"auto": None, "bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1}
"""What vLLM's ``--kv-cache-dtype`` may be, and the bytes of an element; None: as the model's."""


def element_bytes_of(name: str) -> int | None:
    """Read a ``--kv-cache-dtype``.

    Raises:
        ConfigError: It is not known.
    """
    if name not in ELEMENT_BYTES:
        raise ConfigError(f"--kv-cache-dtype: {name!r} is not known; write one of {', '.join(ELEMENT_BYTES)}")
    return ELEMENT_BYTES[name]


@answers(Sizes)
def size(
    model: Annotated[str, typer.Argument(help="A model's folder, or its config.json.")],
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="Ranks.")] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option("--pipeline-parallel-size", "-pp", min=1, help="Stages.")
    ] = 1,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="As vLLM is told: auto, bfloat16, float16, float32 or fp8.")
    ] = "auto",
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a block.", show_default="as vLLM chooses on a GPU")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Length of the prompts that the tokens a GiB are counted for.")
    ] = 8192,
    as_json: Annotated[bool, typer.Option("--json", help="Print the sizes as JSON.")] = False,
) -> None:
    """Work out the bytes of a block and the tokens a GiB holds, from a model's config.json."""
    ranks = Ranks(tensor_parallel, pipeline_parallel)
    sizes = measure(model, ranks, element_bytes_of(kv_cache_dtype), block_size, prompt_tokens)
    if as_json:
        write_json(sizes)
        return
    console = make_console()
    console.print(make_table(sizes))
    lines = [
        f"a hit ends at a multiple of {sizes.boundary_tokens:,} tokens",
        f"the largest block takes {size_text(sizes.block_bytes, up=True)} on all {sizes.ranks} ranks",
        f"of a prompt of {sizes.prompt_tokens:,} tokens {sizes.bytes_per_token:,.0f} bytes each are stored: "
        f"{sizes.tokens_per_gib:,} tokens a GiB",
        *(f"note: {note}" for note in sizes.notes),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
