"""Chooses what moves the bytes: one engine for host memory, and one for device memory if it was proved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from kvbm_core.errors import TierOpenError
from kvbm_gds._config import GdsConfig
from kvbm_gds._io import Io, IoEngine, load_nixl, open_engine
from kvbm_gds._layout import Sizing
from kvbm_gds._machine import has_nvidia_fs, why_gds_is_unavailable
from kvbm_gds._probe import DIRECT, HOST, POSIX, Finding, choose, run_probe
from kvbm_gds._slab import Slab

__all__ = ["Engines", "open_engines"]


class Engines:
    """What moves bytes to and from host memory, and to and from device memory.

    Args:
        host: Name of the engine for host memory.
        device: Of that for device memory; empty for none.
        detail: Says both to people.
        notify: Called, from any thread, when `take` has something to give.

    Raises:
        TierOpenError: If one does not start.
    """

    def __init__(self, host: str, device: str, detail: str, notify: Callable[[], None]) -> None:
        self.detail = detail
        self._opened_as = (host, device, detail, notify)
        self.host = open_engine(host, notify)
        try:
            self.device = open_engine(device, notify) if device else None
        except BaseException:
            self.host.close(1)
            raise

    def again(self) -> Engines:
        """Open the same engines anew."""
        return Engines(*self._opened_as)

    def add_files(self, fds: Sequence[int], sizing: Sizing) -> None:
        """Make the slab's files known."""
        for number, fd in enumerate(fds):
            for engine in self._all():
                engine.add_file(fd, sizing.file_bytes(number))

    def post(self, ios: Sequence[Io]) -> None:
        """Start them."""
        in_host = [io for io in ios if not io.on_device]
        if in_host:
            self.host.post(in_host)
        if len(in_host) < len(ios):
            assert self.device is not None, "the capabilities say whether device memory can be used"
            self.device.post([io for io in ios if io.on_device])

    def take(self) -> list[Io]:
        """Give those that have ended since the last call."""
        return [io for engine in self._all() for io in engine.take()]

    def close(self, wait_s: float) -> bool:
        """Wait for what is in flight; False if it was not over in time."""
        return all([engine.close(wait_s) for engine in self._all()])

    def _all(self) -> list[IoEngine]:
        return [self.host] if self.device is None else [self.host, self.device]


def open_engines(config: GdsConfig, slab: Slab, sizing: Sizing, notify: Callable[[], None]) -> Engines:
    """Probe what the configuration allows, and open the best of it.

    Raises:
        TierOpenError: If an engine was asked for by name and does not work here.
    """
    findings = _probe(config, slab, sizing)
    host = choose([finding for finding in findings if finding.engine in HOST])
    # In the order of trust, not of speed: under many transfers NIXL's GDS has failed and hung.
    sound = {finding.engine: finding for finding in findings if not finding.problem}
    device = next((sound[name] for name in DIRECT if name in sound), None)
    _require(config, findings, host, device)
    detail = _describe(host, device)
    problems = "".join(f"; {f.engine} is out: {f.problem}" for f in findings if f.problem)
    slab.log.log(logging.WARNING if problems else logging.INFO, "%s: %s%s", slab.path, detail, problems)
    return Engines(host.engine if host else "threads", device.engine if device else "", detail, notify)


def _probe(config: GdsConfig, slab: Slab, sizing: Sizing) -> list[Finding]:
    if config.engine == "threads":
        return []
    try:
        load_nixl()
    except TierOpenError as error:
        if config.engine != "auto":
            raise
        slab.log.warning("%s; using threads", error)
        return []
    engines = [*(POSIX if config.engine == "posix" else HOST)]
    why = why_gds_is_unavailable()
    if config.engine == "gds" and why:
        raise _impossible(f"'gds' cannot work here: {why}")
    # Without nvidia-fs cuFile reads through host memory itself, and measured slower than we do.
    if not why and (config.engine == "gds" or (config.engine == "auto" and has_nvidia_fs())):
        engines += DIRECT
    # As in service: blocks of this size, and as many of them on their way.
    piece = min(sizing.slot_bytes, sizing.probe_bytes)
    pieces = min(config.queue_depth, sizing.probe_bytes // piece)
    return run_probe(slab.path / "probe", engines, piece, pieces, config.probe_deadline_s, slab.log)


def _require(
    config: GdsConfig, findings: Sequence[Finding], host: Finding | None, device: Finding | None
) -> None:
    missing = (config.engine == "gds" and device is None) or (config.engine == "posix" and host is None)
    if missing:
        problems = "; ".join(f"{each.engine}: {each.problem}" for each in findings if each.problem)
        raise _impossible(f"{config.engine!r} does not work here ({problems})")


def _impossible(what: str) -> TierOpenError:
    return TierOpenError(f"engine: {what}; write auto", operation="open", tier="gds")


def _describe(host: Finding | None, device: Finding | None) -> str:
    text = f"NIXL POSIX ({host.engine})" if host and host.engine in POSIX else "threads"
    if device is None:
        return text
    mode = "" if has_nvidia_fs() else ", cuFile in compatibility mode"
    return f"{text}; NIXL {device.engine.upper()} into device memory{mode}"
