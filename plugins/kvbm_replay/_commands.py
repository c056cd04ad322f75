"""The verbs `kvbm replay` and `kvbm plan`. Every option is checked here, before anything long starts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml
from rich.console import Console
from rich.table import Table

from kvbm_core.command import answers, write_json
from kvbm_core.errors import ConfigError
from kvbm_core.printable import printable
from kvbm_core.registry import Registry
from kvbm_core.sizes import parse_size
from kvbm_replay._answer import ReplayAnswer, compare
from kvbm_replay._layout import Layout, read_layout
from kvbm_replay._machine import Machine, read_speed
from kvbm_replay._plan_table import advice_lines, draw_plan, make_tables
from kvbm_replay._planning import MEMORY, PlanAnswer, Question, answer_question
from kvbm_replay._reader import read_trace, write_trace
from kvbm_replay._sizes import read_blocks
from kvbm_replay._sweep import Sweep, run_sweep
from kvbm_replay._table import draw_replay, figure_class, make_comparison, make_table, remarks
from kvbm_replay.generators import generate
from kvbm_replay.trace import Trace

__all__ = ["plan", "replay"]

_DEFAULT_SIZES: Final = "1,2,3,5,10,20M"
_MACHINE: Final = Machine()
_PLAIN_WIDTH: Final = 200
"""Without a terminal there is no width to fit; rich would assume 80 and fold the table."""

Traces = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[TRACE]...", help="Mooncake's format, or the files of an engine's `record`."),
]
Load = Annotated[
    str | None,
    typer.Option(
        "--generate", metavar="LOAD", help="Make one: chat:seed=1,requests=5000 (docs: replay-a-trace)."
    ),
]
EngineCache = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="The engine's own prefix cache. Default: as recorded, or none."),
]
Prefill = Annotated[float, typer.Option(metavar="N", help="Tokens that the engine computes a second.")]
Link = Annotated[str, typer.Option(metavar="SIZE", help="Bytes a second between accelerator and host.")]
TokenBytes = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="KV of a token over all ranks. Default: as recorded, or 128KiB."),
]
Speeds = Annotated[
    list[str] | None,
    typer.Option("--speed", metavar="TIER=LOAD/STORE/MS", help="Like lmdb=6GB/3GB/0.1; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON, and all else to stderr.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: .png or .svg (needs matplotlib).")]

Loads = Annotated[
    list[str] | None,
    typer.Option(
        "--generate",
        metavar="LOAD",
        help="Make one: chat:seed=1,requests=5000 (docs: replay-a-trace). May be repeated.",
    ),
]
Paced = Annotated[
    bool, typer.Option("--paced", help="Writes take time: a tier that is too slow loses stores.")
]
Save = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write what --generate made, in Mooncake's format.")
]
Stacks = Annotated[
    list[str] | None,
    typer.Option(
        "--stack",
        metavar="FILE",
        help="The connector's YAML or JSON, in a file or inline; may be repeated. Default: one cpu tier.",
    ),
]
Capacity = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES",
        help="Of one tier: 1,2,5M (tokens), 1TiB or 5,10% (of the trace's different blocks). "
        "Default: as configured; without --stack 1 to 20M.",
    ),
]
Vary = Annotated[str | None, typer.Option(metavar="TIER", help="Whose capacity that is. Default: the first.")]
Policies = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Of all tiers, like lru,fifo. Default: as configured.")
]


@answers(ReplayAnswer)
def replay(
    traces: Traces = None,
    loads: Loads = None,
    stacks: Stacks = None,
    capacity: Capacity = None,
    vary: Vary = None,
    policy: Policies = None,
    engine_cache: EngineCache = None,
    paced: Paced = False,
    references: Annotated[bool, typer.Option(help="Compute LRU and Belady, too.")] = True,
    prefill: Prefill = _MACHINE.prefill_tokens_per_s,
    link: Link = "50GB",
    token_bytes: TokenBytes = None,
    speed: Speeds = None,
    save: Save = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Replay traces through the planner of a stack: hits, bytes written, and times to the first token."""
    check_picture(plot)
    if policy and "{" in policy:
        raise ConfigError(
            f"--policy: {policy!r} has settings; write names here, and a policy with settings into a "
            "--stack, like '{tiers: [{backend: cpu, capacity: 64GiB, policy: {name: NAME, KEY: VALUE}}]}'"
        )
    found = [*([read_trace(traces)] if traces else []), *map(generate, loads or [])]
    if not found or (len(found) > 1 and (save or plot)):
        raise ConfigError("write the path of a trace or --generate LOAD; one alone for --save and --plot")
    if save:
        write_trace(found[0], save)
    console, answered = _console(as_json), []
    for trace in found:
        options = {"--capacity": capacity, "--engine-cache": engine_cache, "--token-bytes": token_bytes}
        _check_groups(trace, {**options, "no --stack": not stacks})
        machine = _machine(trace, prefill, link, token_bytes, speed)
        sizes = capacity or (None if stacks else _DEFAULT_SIZES)
        sweep = Sweep(
            _layouts(stacks, trace, machine), machine, vary,
            sizes=_blocks("--capacity", sizes, trace, machine) if sizes else (),
            policies=policy.split(",") if policy else (),
            engine_blocks=_engine_blocks(engine_cache, trace, machine),
            paced=paced, references=references,
        )  # fmt: skip
        with console.status(f"replaying {printable(trace.name)}"):
            answered.append(run_sweep(trace, sweep))
        _show([make_table(answered[-1])], remarks(answered[-1]), console)
    answer = compare(answered)
    if as_json:
        write_json(answer)
    if len(found) > 1 and references:
        console.print(make_comparison(answer.policies))
    if plot:
        draw_replay(answered[0], plot)
        console.print(f"Drawn: {plot}", markup=False, soft_wrap=True)


@answers(PlanAnswer)
def plan(
    traces: Traces = None,
    load: Load = None,
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZES", help="To be shown. Default: powers of two.")
    ] = None,
    disk: Annotated[str, typer.Option(metavar="BACKEND", help="Below the memory: lmdb or gds.")] = "lmdb",
    goal: Annotated[
        float, typer.Option(min=1, max=100, help="Percent of what memory without an end would save.")
    ] = 80.0,
    price: Annotated[float, typer.Option(min=0, help="Of a GiB of memory, in GiB of disk.")] = 30.0,
    policy: Annotated[str, typer.Option(metavar="NAME", help="Of all tiers.")] = "lru",
    engine_cache: EngineCache = None,
    sample: Annotated[
        float | None,
        typer.Option(min=0.01, max=100, help="Percent of the blocks that are looked at. Default: 300,000."),
    ] = None,
    prefill: Prefill = _MACHINE.prefill_tokens_per_s,
    link: Link = "50GB",
    token_bytes: TokenBytes = None,
    speed: Speeds = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Say how much memory and disk a load needs, and what each further GiB would save."""
    check_picture(plot)
    trace = _trace(traces, load)
    _check_groups(trace, {"kvbm plan": True})
    machine = _machine(trace, prefill, link, token_bytes, speed)
    check_speeds(machine, [MEMORY, disk])
    question = Question(
        machine, disk, goal / 100, price, policy,
        sizes=_blocks("--capacity", capacity, trace, machine) if capacity else (),
        engine_blocks=_engine_blocks(engine_cache, trace, machine) or 0,
        part=sample / 100 if sample else None,
    )  # fmt: skip
    answer = answer_question(trace, question)
    console = _console(as_json)
    if as_json:
        write_json(answer)
    _show(make_tables(answer), advice_lines(answer), console)
    if plot:
        draw_plan(answer, plot)
        console.print(f"Drawn: {plot}", markup=False, soft_wrap=True)


def _trace(paths: list[Path] | None, load: str | None) -> Trace:
    """Read a trace, or make one."""
    if bool(paths) == bool(load):
        raise ConfigError("write the path of a trace, or --generate LOAD: one of the two")
    return generate(load) if load else read_trace(paths or [])


def _machine(
    trace: Trace, prefill: float, link: str, token_bytes: str | None, speeds: list[str] | None
) -> Machine:
    """Read the machine's options."""
    if not 0 < prefill < math.inf:
        raise ConfigError(f"--prefill {prefill}: write tokens a second, above 0")
    sizes = {
        "--link": int(parse_size(link, "--link")),
        "--token-bytes": int(parse_size(token_bytes, "--token-bytes"))
        if token_bytes
        else trace.token_bytes or _MACHINE.token_bytes,
    }
    for option, size in sizes.items():
        if size <= 0:
            raise ConfigError(f"{option} {size}: write a size above 0, like 128KiB")
    return Machine(prefill, sizes["--link"], sizes["--token-bytes"], dict(map(read_speed, speeds or ())))


def _check_groups(trace: Trace, options: Mapping[str, object]) -> None:
    """Refuse what has no meaning for a model of which not all blocks are of one size, and needed."""
    wrong = [option for option, value in options.items() if value]
    if wrong and not trace.is_plain:
        raise ConfigError(
            f"{', '.join(wrong)}: {trace.name} is of a model with several KV groups, or of which a prefix "
            "needs not all blocks, which are no measure then; write kvbm replay, and sizes into a --stack"
        )


def check_speeds(machine: Machine, tiers: Sequence[str]) -> None:
    """Refuse the speed of a tier that is not there."""
    for name in machine.speeds:
        if name not in tiers:
            raise ConfigError(f"--speed {name}: there is no such tier; write one of {', '.join(tiers)}")


def check_picture(file: Path | None) -> None:
    """Refuse a file that cannot be drawn, before anything long starts."""
    if file is None:
        return
    figure_class()
    folder = file.parent
    if file.suffix not in (".png", ".svg") or file.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"--plot {file}: write a name that ends with .png or .svg, in a folder that is there"
        )


def _layouts(stacks: list[str] | None, trace: Trace, machine: Machine) -> list[tuple[str, Layout]]:
    """Read the stacks, and see that each speed is of a tier."""
    block_bytes = trace.block_tokens * machine.token_bytes if trace.is_plain else trace.group_bytes
    registry = Registry()
    layouts = [
        (_stack_name(text, at), read_layout(_read_stack(text), block_bytes, registry))
        for at, text in enumerate(stacks or [None], 1)
    ]
    check_speeds(machine, [tier.name for _, layout in layouts for tier in layout.tiers])
    return layouts


def _stack_name(text: str | None, at: int) -> str:
    """Call a stack by its file, or by its place among those that are written inline."""
    return f"stack {at}" if text is None or text.lstrip().startswith("{") else Path(text).name


def _blocks(option: str, text: str, trace: Trace, machine: Machine) -> list[int]:
    """Read sizes, in blocks of a trace; percents are of its different blocks."""
    block_bytes = trace.block_tokens * machine.token_bytes
    return read_blocks(option, text, trace.block_tokens, block_bytes, trace.unique)


def _show(tables: Sequence[Table], lines: Sequence[str], console: Console) -> None:
    for table in tables:
        console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _engine_blocks(text: str | None, trace: Trace, machine: Machine) -> int | None:
    """Read the size of the engine's own cache. None: as recorded."""
    if text is None:
        return None
    if text.strip() == "0":
        return 0
    [*others, blocks] = _blocks("--engine-cache", text, trace, machine)
    if others:
        raise ConfigError(f"--engine-cache {text}: write one size, like 500k (tokens) or 40GiB")
    return blocks


def _read_stack(text: str | None) -> Mapping[str, Any] | str:
    """Give the stack: a mapping written inline, or the path of a file."""
    if text is None:
        return {"tiers": [{"backend": MEMORY, "capacity": "1TiB"}]}
    if not text.lstrip().startswith("{"):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(
            "--stack: not a mapping; write JSON or YAML that begins with {, or the path of a file"
        )
    return value


def _console(as_json: bool) -> Console:
    console = Console(stderr=as_json)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    return console
