"""What `kvbm size` says: bytes a block, and the tokens that a GiB holds."""

from __future__ import annotations

import msgspec
from rich.table import Table

from kvbm_cli.size._groups import Group, Ranks, make_groups
from kvbm_cli.size._layers import read_model
from kvbm_core import load_config
from kvbm_core.config import size_text
from kvbm_core.groups import Rule, alignment
from kvbm_core.layers import SEAL_BYTES
from kvbm_engine import prompt_ends, sparse_stores

__all__ = ["GroupSize", "Sizes", "make_table", "measure"]

_GIB = 1 << 30


class GroupSize(msgspec.Struct, frozen=True, kw_only=True):
    """One KV group."""

    rule: str
    """What a prefix needs of it: `all` blocks, a `window`, a `chunk`, or one `state`."""
    rule_tokens: int
    """Of a window or chunk; otherwise 0."""
    layers: int
    """On one rank."""
    block_tokens: int
    rank_block_bytes: int
    """Of a block on one rank, without the seal."""
    prompt_blocks: int
    """Stored of one prompt."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm size --json` writes."""

    model: str
    family: str
    proved: bool
    """The family is one of those that were started, see docs/reference/models.md."""
    ranks: int
    boundary_tokens: int
    """A hit ends at a multiple of so many tokens."""
    groups: list[GroupSize]
    block_bytes: int
    """Of the largest block, over all ranks, without seals."""
    seal_bytes: int
    """Behind each object, on each rank."""
    prompt_tokens: int
    """Of the prompts that the following is for."""
    bytes_per_token: float
    """Stored of such a prompt, over all ranks, with seals."""
    tokens_per_gib: int
    notes: list[str]
    """What is not known, or was assumed."""


def measure(
    model: str, ranks: Ranks, element_bytes: int | None, block_tokens: int | None, prompt_tokens: int
) -> Sizes:
    """Work out what a model's blocks take.

    Raises:
        ConfigError: It cannot be told, see `read_model` and `make_groups`.
    """
    read = read_model(model)
    made = make_groups(read, ranks, element_bytes, block_tokens)
    blocks = _stored(made, prompt_tokens)
    stored = sum(
        count * (group.block_bytes + SEAL_BYTES) * ranks.count
        for group, count in zip(made, blocks, strict=True)
    )
    notes = [*read.notes]
    if block_tokens is None:
        notes.append("blocks are as vLLM chooses them on a GPU; on a CPU, or with --block-size, name them")
    per_token = stored / prompt_tokens
    return Sizes(
        model=read.path,
        family=read.family,
        proved=read.proved,
        ranks=ranks.count,
        boundary_tokens=alignment([each.group for each in made]),
        groups=[
            GroupSize(
                rule=each.group.coverage.rule.value,
                rule_tokens=each.group.coverage.tokens,
                layers=each.layers,
                block_tokens=each.group.block_tokens,
                rank_block_bytes=each.block_bytes,
                prompt_blocks=count,
            )
            for each, count in zip(made, blocks, strict=True)
        ],
        block_bytes=max(each.block_bytes for each in made) * ranks.count,
        seal_bytes=SEAL_BYTES,
        prompt_tokens=prompt_tokens,
        bytes_per_token=per_token,
        tokens_per_gib=int(_GIB / per_token) if per_token else 0,
        notes=notes,
    )


def _stored(groups: list[Group], prompt_tokens: int) -> list[int]:
    """Count the blocks of each group that are stored of a prompt, with the settings by default."""
    known = [each.group for each in groups]
    stores = sparse_stores(load_config({"tiers": [{"backend": "cpu", "capacity": 1}]}), known)
    step = alignment(known)
    marks = prompt_ends(prompt_tokens, step)
    counts = []
    for group in known:
        count = prompt_tokens // group.block_tokens
        match group.coverage.rule:
            case Rule.ALL:
                counts.append(count)
            case Rule.STATE:
                counts.append(min(1, count))
            case _:
                counts.append(len(stores.wanted(group, 0, count, marks, step)))
    return counts


def make_table(sizes: Sizes) -> Table:
    """Draw a row a group."""
    table = Table(title=f"{sizes.family}: {sizes.model}")
    for heading in ("A prefix needs", "Layers", "Tokens a block", "Block on a rank", "Of a prompt"):
        table.add_column(heading, justify="left" if heading == "A prefix needs" else "right")
    for each in sizes.groups:
        tokens = f" of {each.rule_tokens:,} tokens" if each.rule_tokens else ""
        table.add_row(
            f"{each.rule}{tokens}",
            str(each.layers),
            f"{each.block_tokens:,}",
            f"{size_text(each.rank_block_bytes, up=True)} ({each.rank_block_bytes:,})",
            f"{each.prompt_blocks:,} blocks",
        )
    return table
