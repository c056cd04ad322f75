"""One tier with traffic, broken and repaired while it runs: what the log and the metrics said meanwhile.

    python tests/evening_child.py TIER FAULT FOLDER SWITCH

A process of its own: `faulty_medium.c` is preloaded, and it takes another user's place. Prints one line of
JSON. The parent knows what it has to be, see `test_evening.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from servers import FaultProxy

from kvbm_core import KvbmError, Registry, Stack, chain_keys, check_stack, load_config, root_key
from kvbm_core.testing import MemoryDevice
from kvbm_metrics import Tally, merge

BLOCK_BYTES = 40_000
NAMESPACE = b"evening of fault"
DEVICE_BLOCKS = 8
CAPACITY = "8MiB"
USER = 54321
"""Whose files root's process would read and write whatever their mode."""
BROKEN_S = 12.0
"""At least so long there is traffic over the fault, so that lines could be repeated."""
FOUND_WITHIN_S = 60.0
PATIENCE_S = 90.0
"""A tier that is not served again by then, after it was repaired, never is. It is tried each minute."""
STORE_FIRST = 24
LEFT_BYTES = 256 << 10
"""What a disk that is full at the start has left: a directory can be made, a tier cannot."""

# Names that are no backend's: what is said of a tier has to have its own.
TIERS: dict[str, list[dict[str, Any]]] = {
    "cpu": [{"backend": "cpu", "name": "pool", "capacity": CAPACITY, "checked": True}],
    "lmdb": [{"backend": "lmdb", "name": "ssd", "capacity": CAPACITY, "path": "{folder}/kv"}],
    "gds": [
        {"backend": "gds", "name": "nvme", "capacity": CAPACITY, "path": "{folder}/kv", "engine": "threads"}
    ],
    "file": [{"backend": "remote", "name": "share", "url": "file://{folder}/kv", "timeout_s": 3.0}],
    "s3": [
        {
            "backend": "remote",
            "name": "bucket",
            "url": "s3://{bucket}/{folder}",
            "storage_options": {"endpoint_url": "{endpoint}"},
            "timeout_s": 3.0,
        }
    ],
}
POOL = {"backend": "cpu", "name": "pool", "capacity": "2MiB"}


class Lines(logging.Handler):
    """What an operator sees: warnings and errors, with the second at which they came."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[tuple[float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((time.monotonic(), record.getMessage()))

    def say(self, words: str) -> bool:
        return any(words in line for _, line in self.seen)

    def take(self, since_s: float) -> list[tuple[float, str]]:
        seen, self.seen = self.seen, []
        return [(round(at - since_s, 2), line) for at, line in seen]


class Traffic:
    """Stores new blocks and loads old ones, one after the other."""

    def __init__(self, stack: Stack, device: MemoryDevice, tier: str) -> None:
        self.stack, self.device, self.tier = stack, device, tier
        self.rng = random.Random(7)
        self.stored = 0
        self.wrong = self.came = 0
        self.tally = Tally(stack._planner, 1)
        self.metrics: dict[str, Any] = {}

    def key(self, number: int) -> list[bytes]:
        return chain_keys(root_key(salt=str(number).encode()), [1], 1)

    def content(self, number: int) -> bytes:
        return random.Random(number).randbytes(BLOCK_BYTES)

    def store(self) -> None:
        self.device.write(0, self.content(self.stored))
        self.stack.store(self.key(self.stored), [0])
        self.stored += 1
        self.stack.wait()

    def load(self, number: int) -> bool:
        self.device.write(1, bytes(BLOCK_BYTES))
        came = self.stack.load(self.key(number), [1]) == 1
        self.wrong += came and self.device.read(1) != self.content(number)
        self.came += came
        return came

    def step(self) -> bool:
        """Store a block and load one of the last; say whether the new one came back."""
        self.store()
        self.load(self.rng.randrange(max(0, self.stored - STORE_FIRST), self.stored))
        return self.load(self.stored - 1)

    def look(self) -> dict[str, float]:
        """Give the metrics of the tier, as Prometheus would have them."""
        merge(self.metrics, self.tally.take(time.monotonic()))
        return {
            name: value
            for name, value in self.metrics.items()
            if name.rsplit("|", 1)[-1] == self.tier and isinstance(value, int | float)
        }


class Medium:
    """What a tier's blocks lie on, and what can happen to it."""

    def __init__(self, tier: str, folder: Path, switch: Path) -> None:
        self.tier, self.folder, self.switch = tier, folder, switch
        self.place = folder / "kv"
        self.disk = Path(os.environ.get("KVBM_DISK", folder))
        """Where others take its room."""
        self.proxy: FaultProxy | None = None
        self.traffic: Traffic | None = None
        if tier == "s3":
            host, port = os.environ["KVBM_S3_ADDRESS"].split(":")
            self.proxy = FaultProxy((host, int(port)))

    def close(self) -> None:
        if self.proxy:
            self.proxy.close()

    def settings(self) -> list[dict[str, Any]]:
        words = {
            # All cells share a server, and none may find what another left.
            "folder": str(self.folder) if not self.proxy else self.folder.parent.name,
            "bucket": os.environ.get("KVBM_S3_BUCKET", ""),
            "endpoint": self.proxy.endpoint if self.proxy else "",
        }

        def said(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: said(each) for name, each in value.items()}
            return value.format(**words) if isinstance(value, str) else value

        return [said(tier) for tier in TIERS[self.tier]]

    def turn(self, byte: bytes) -> None:
        # Where it is: it is mapped, and must never be empty.
        with open(self.switch, "r+b") as file:
            file.write(byte)

    # What is done, and what undoes it.

    def silent(self) -> Callable[[], None]:
        if self.proxy:
            return self._proxy("stall")
        self.turn(b"H")
        return lambda: self.turn(b"-")

    def full(self) -> Callable[[], None]:
        if self.proxy:
            return self._proxy("507")
        ballast = self.disk / "ballast"
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        return ballast.unlink

    def permission(self) -> Callable[[], None]:
        if self.proxy:
            return self._proxy("403")
        self.place.chmod(0)
        return lambda: self.place.chmod(0o700)

    def gone(self) -> Callable[[], None]:
        if self.proxy:
            return self._proxy("refuse")
        shutil.rmtree(self.place)
        return lambda: None

    def corrupt(self) -> Callable[[], None]:
        assert self.traffic
        if self.proxy:
            asyncio.run(self._plant())
            return lambda: None
        numbers = range(self.traffic.stored)
        marks = {self.traffic.content(number)[1000:1032] for number in numbers}
        if self.tier == "cpu":
            arena = self.traffic.stack._worker._tiers[0]._inner._inner._arena
            for mark in marks:
                if (at := arena.find(mark)) >= 0:
                    arena[at] ^= 1
            return lambda: None
        hit = 0
        for path in self.place.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            with open(path, "r+b") if content else contextlib.nullcontext() as file:
                for mark in marks:
                    if (at := content.find(mark)) >= 0:
                        file.seek(at)
                        file.write(bytes([content[at] ^ 1]))
                        hit += 1
        assert hit, "nothing was damaged"
        return lambda: None

    async def _plant(self) -> None:
        from kvbm_core.config import convert
        from kvbm_remote import RemoteConfig
        from kvbm_remote._clients import make_store

        settings = {k: v for k, v in self.settings()[0].items() if k not in ("backend", "name")}
        store = make_store(convert(settings, RemoteConfig, "s3"))
        entries = [entry async for entry in store.entries("v1")]
        assert entries
        for entry in entries:
            await store.put(entry.path, bytes(entry.nbytes), overwrite=True)
        await store.close()

    def _proxy(self, mode: str) -> Callable[[], None]:
        proxy = self.proxy
        assert proxy
        proxy.mode = mode

        def undo() -> None:
            proxy.mode = "pass"

        return undo


def run(medium: Medium, fault: str, lines: Lines, *, beside: bool) -> dict[str, Any]:
    """Break the medium under traffic, then repair it, and say what was seen."""
    tiers = [*([POOL] if beside else []), *medium.settings()]
    config = {
        "tiers": tiers, "load_deadline_s": 1, "store_deadline_s": 1, "lookup_deadline_s": 1,
        "staging": "4MiB",
    }  # fmt: skip
    device = MemoryDevice(DEVICE_BLOCKS, BLOCK_BYTES)
    tier = tiers[0]["name"]
    result: dict[str, Any] = {}
    with Stack.open(config, device, NAMESPACE) as stack:
        traffic = medium.traffic = Traffic(stack, device, tier)
        for _ in range(STORE_FIRST):
            assert traffic.step(), "it does not even work before"
        result["well"] = [line for _, line in lines.take(0)]
        before = traffic.look()
        began_s = time.monotonic()
        repair = getattr(medium, fault)()
        seen: dict[str, float] = {}
        """When a metric changed that would not, were all well."""
        while (past_s := time.monotonic() - began_s) < BROKEN_S or (
            not (lines.seen and seen) and past_s < FOUND_WITHIN_S
        ):
            traffic.step()
            now = traffic.look()
            for name, value in now.items():
                bad = name.startswith(("failed_transfers", "dropped_blocks")) and value > before.get(name, 0)
                low = name.startswith(("tier_usable", "tier_capacity_now")) and value < before.get(name, 0)
                if bad or low:
                    seen.setdefault(name, round(past_s, 2))
        result["lines"] = lines.take(began_s)
        result["metrics"] = seen
        result["came"] = traffic.came
        repair()
        began_s, good = time.monotonic(), 0
        while good < 8 and time.monotonic() - began_s < PATIENCE_S:
            good = good + 1 if traffic.step() else 0
        was_short = any(name.startswith("tier_capacity_now") for name in seen)
        while was_short and time.monotonic() - began_s < PATIENCE_S and not lines.say("whole capacity again"):
            traffic.step()
        result["served"] = good >= 8
        result["short"] = shortage(traffic)
        result["again"] = lines.take(began_s)
        result["usable"] = traffic.look()[f"tier_usable|{tier}"]
        result["wrong"] = traffic.wrong
    result["end"] = [line for _, line in lines.take(0)]
    return result


def shortage(traffic: Traffic) -> float:
    """Give the bytes that the tier may not hold for want of room."""
    now = traffic.look()
    most = now.get(f"tier_capacity_bytes|{traffic.tier}", 0)
    return most - now.get(f"tier_capacity_now_bytes|{traffic.tier}", most)


def start(medium: Medium, fault: str) -> dict[str, Any]:
    """Start over a medium that is broken already: what is said before the model is loaded, and at open."""
    device = MemoryDevice(DEVICE_BLOCKS, BLOCK_BYTES)
    config = {"tiers": medium.settings()}
    tier = config["tiers"][0]["name"]
    with contextlib.ExitStack() as stack:
        if fault == "second":
            first = Traffic(stack.enter_context(Stack.open(config, device, NAMESPACE)), device, tier)
        elif fault == "full" and medium.tier == "cpu":
            config["tiers"][0]["capacity"] = "4000GiB"
        elif fault == "full":
            medium.place.mkdir()
            medium.full()
            os.truncate(ballast := medium.disk / "ballast", ballast.stat().st_size - LEFT_BYTES)
        result = {"checked": refusal(lambda: check_stack(load_config(config)))}
        result["opened"] = refusal(lambda: stack.enter_context(Stack.open(config, device, NAMESPACE)).close())
        if result["opened"]:
            return result
        second = Traffic(stack.enter_context(Stack.open(config, device, NAMESPACE)), device, tier)
        result["served"] = second.step()
        if fault == "second":
            result["shared"] = first.load(0)
            medium.traffic = second
            medium.corrupt()
            third = Traffic(stack.enter_context(Stack.open(config, device, NAMESPACE)), device, tier)
            result["damaged"] = third.step()
            third.stored = 0
            result["mended"] = third.step()
            result["wrong"] = first.wrong + second.wrong + third.wrong
        return result


def refusal(do: Callable[[], object]) -> str:
    """Give the error that something ends with; empty if it does not."""
    try:
        do()
    except KvbmError as error:
        return str(error)
    return ""


def main(tier: str, fault: str, folder: str, switch: str) -> None:
    lines = Lines()
    logging.getLogger().addHandler(lines)
    medium = Medium(tier.removeprefix("cpu-over-"), Path(folder), Path(switch))
    if os.environ.get("KVBM_AS_USER"):
        # What is not imported yet may lie in a folder that the other user cannot read.
        for settings in medium.settings():
            Registry().backend(settings["backend"])
        os.setgroups([])
        os.setgid(USER)
        os.setuid(USER)
    try:
        if os.environ.get("KVBM_AT_START"):
            result = start(medium, fault)
        else:
            result = run(medium, fault, lines, beside=tier.startswith("cpu-over-"))
    finally:
        medium.close()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
