"""What the demo measured, as values and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from kvbm_cli._client import Reply
from kvbm_cli._metrics import TierCounters

ANSWERS_DIFFER = (
    "An answer differs from the cold one. A prompt that is computed in other pieces may be rounded "
    "differently, as with vLLM's own prefix cache; this demo does not tell that from wrong data."
)


@dataclass(frozen=True, slots=True)
class Run:
    """One sending of the prompt."""

    name: str
    expected_tier: str | None
    """The tier that should have served it; None for the cold run."""
    reply: Reply
    counters: TierCounters
    """What the tiers did for this run alone."""

    def problem(self) -> str | None:
        """Say what this run failed to show, or None."""
        if self.expected_tier is None:
            loaded = sum(self.counters.loaded_blocks.values())
            return f"The run '{self.name}' loaded {loaded} blocks: it was not cold." if loaded else None
        if self.counters.loaded_blocks.get(self.expected_tier, 0) == 0:
            return f"The run '{self.name}' loaded nothing from the tier {self.expected_tier}."
        return None


@dataclass(frozen=True, slots=True)
class Report:
    """A whole demo. The first run is the cold one."""

    runs: Sequence[Run]
    tiers: Sequence[str]
    """In the order of the stack."""
    model: str
    start_s: Sequence[float]
    """How long each start of the server took."""

    def problems(self) -> list[str]:
        """List what the demo failed to show; empty if it showed everything."""
        return [problem for run in self.runs if (problem := run.problem())]

    def answers_differ(self) -> bool:
        """Say whether any run answered otherwise than the cold one."""
        return any(run.reply.text != self.runs[0].reply.text for run in self.runs)

    def speedup(self, run: Run) -> float:
        """Return how many times sooner than the cold run this one gave its first token."""
        return self.runs[0].reply.first_token_s / run.reply.first_token_s


def make_table(report: Report) -> Table:
    """Draw one row a run."""
    prompt_tokens = report.runs[0].reply.prompt_tokens
    table = Table(title=f"The same prompt of {prompt_tokens:,} tokens, three times")
    table.add_column("Run")
    table.add_column("First token", justify="right")
    table.add_column("Speed-up", justify="right")
    for tier in report.tiers:
        table.add_column(f"Blocks from {tier}", justify="right")
    table.add_column("Same answer")
    for run in report.runs:
        table.add_row(
            run.name,
            f"{run.reply.first_token_s:.2f} s",
            f"{report.speedup(run):.1f} x",
            *(_loaded(run.counters, tier) for tier in report.tiers),
            "yes" if run.reply.text == report.runs[0].reply.text else "no",
        )
    return table


def _loaded(counters: TierCounters, tier: str) -> str:
    blocks = counters.loaded_blocks.get(tier, 0)
    if not blocks:
        return "-"
    return f"{blocks} ({counters.loaded_bytes.get(tier, 0) / (1 << 20):.1f} MiB)"
