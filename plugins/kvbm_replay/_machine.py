"""The machine that a replay assumes: how fast it computes and moves bytes. Every number can be set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kvbm_core.errors import ConfigError
from kvbm_core.sizes import parse_size

__all__ = ["DEFAULT_SPEEDS", "Machine", "Speed", "read_speed"]


class Speed(NamedTuple):
    """Of one tier."""

    load_bytes_per_s: float
    store_bytes_per_s: float
    latency_s: float
    """Of each request's load, once."""

    def text(self) -> str:
        """Write it for people."""
        load, store = (f"{each / 1e9:g} GB/s" for each in self[:2])
        return f"{load} in, {store} out, {self.latency_s * 1e3:g} ms"


DEFAULT_SPEEDS: Final[Mapping[str, Speed]] = {
    "cpu": Speed(50e9, 50e9, 0.0),
    "memory": Speed(50e9, 50e9, 0.0),
    "lmdb": Speed(5e9, 2e9, 0.0002),
    "gds": Speed(12e9, 5e9, 0.0002),
    "remote": Speed(2e9, 1e9, 0.002),
}
"""By backend: PCIe 5 to host memory, a file in an NVMe disk's page cache, two NVMe disks, 20 Gbit/s."""
_UNKNOWN: Final = Speed(5e9, 2e9, 0.0002)


@dataclass(frozen=True, slots=True)
class Machine:
    """One engine, that computes one prompt after the other.

    A prompt's first token comes when what was found is loaded, tiers side by side, and the rest is computed::

        max over tiers(latency + bytes / min(speed, link)) + tokens / prefill
    """

    prefill_tokens_per_s: float = 20_000.0
    """An 8B model in bfloat16 on an H100, about."""
    link_bytes_per_s: float = 50e9
    """Between the accelerator and the host: PCIe 5 with 16 lanes."""
    token_bytes: int = 131_072
    """KV of a token over all ranks: Llama 3.1 8B in bfloat16."""
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    """By the tier's name, in place of its backend's default."""

    def speed(self, name: str, backend: str) -> Speed:
        """Give the speed of a tier."""
        return self.speeds.get(name) or DEFAULT_SPEEDS.get(backend, _UNKNOWN)


def read_speed(text: str) -> tuple[str, Speed]:
    """Read a tier's speed: ``NAME=LOAD/STORE/LATENCY_MS``, like ``lmdb=6GB/3GB/0.1``, or without the last.

    Raises:
        ConfigError: If it is none.
    """
    name, _, written = text.partition("=")
    parts = written.split("/")
    try:
        load, store = (float(parse_size(part, "speed")) for part in parts[:2])
        latency_s = float(parts[2]) / 1e3 if len(parts) > 2 else 0.0
    except (ConfigError, ValueError) as error:
        raise ConfigError(
            f"--speed {text}: write TIER=LOAD/STORE/LATENCY_MS, like lmdb=6GB/3GB/0.1"
        ) from error
    if not name or len(parts) > 3 or min(load, store) <= 0 or latency_s < 0:
        raise ConfigError(f"--speed {text}: write a tier's name and speeds above 0, like lmdb=6GB/3GB/0.1")
    return name, Speed(load, store, latency_s)
