"""What travels between the two halves of the connector, in vLLM's own envelopes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvbm_core import Report, TierStatus
from kvbm_engine import Step
from kvbm_metrics import merge

__all__ = ["Handshake", "Outcomes", "StepPlan"]


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """What a worker tells the leader of its tiers. It may come several times, see `kvbm_vllm._startup`."""

    rank: int
    status: list[TierStatus]
    facts: dict[str, str]
    """What must be alike on every rank, see `kvbm_vllm._ranks`."""
    joins: bool = False
    """True if the device can have a step wait for the load of its blocks."""
    constants: dict[str, int] = field(default_factory=dict)
    """Readings of this rank that do not change, see `kvbm_metrics`."""
    incarnation: str = ""
    """Drawn when the tiers were opened. Another: they were opened anew, and nothing is under way."""
    namespace: str = ""
    """Of this rank, in hexadecimal digits, for people."""


@dataclass
class StepPlan(KVConnectorMetadata):
    """What the leader tells every worker in each step."""

    step: Step = field(default_factory=Step)
    asks: bool = False
    """The leader knows nothing of the workers yet, and asks each for its handshake."""


@dataclass
class Outcomes(KVConnectorWorkerMetadata):
    """What the workers tell the leader, collected over ranks by vLLM."""

    reports: list[Report]
    step: int = 0
    """Number of the step that they came with."""
    copied: dict[str, int] = field(default_factory=dict)
    """Readings of the devices since the last time, see `kvbm_metrics`."""
    handshakes: list[Handshake] = field(default_factory=list)
    """What vLLM does not bring: as MultiConnector brings the handshake of one connector only."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Put the reports of two workers together; the planner counts them."""
        assert isinstance(other, Outcomes)
        copied = dict(self.copied)
        merge(copied, other.copied)
        handshakes = self.handshakes + other.handshakes
        return Outcomes(self.reports + other.reports, max(self.step, other.step), copied, handshakes)
