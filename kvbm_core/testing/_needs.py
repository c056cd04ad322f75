"""Which tiers a test is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvbm_core.tier import Capabilities

__all__ = [
    "asked",
    "bounded",
    "durable",
    "filled",
    "fleeting",
    "kept_apart",
    "lending",
    "listing",
    "needs",
    "owned",
    "shared",
    "writable",
]


def needs(what: str, having: Callable[[Capabilities], bool]) -> Callable[[Any], Any]:
    """Have a test run only for tiers with a capability."""

    def mark(test: Any) -> Any:
        before, also = getattr(test, "needs", ("", lambda capabilities: True))
        text = f"{what}, and {before}" if before else what
        test.needs = (text, lambda capabilities: having(capabilities) and also(capabilities))
        return test

    return mark


writable = needs("writable", lambda c: not c.read_only)
filled = needs("read_only", lambda c: c.read_only)
durable = needs("durable", lambda c: c.durable)
listing = needs("durable, and lists its objects", lambda c: c.durable and not c.remote_lookup)
fleeting = needs("forgetful (not durable)", lambda c: not c.durable)
bounded = needs("bounded", lambda c: c.capacity_bytes is not None and not c.read_only)
shared = needs("shared", lambda c: c.shared)
asked = needs("asked by LOOKUP", lambda c: c.remote_lookup)
lending = needs("addressable", lambda c: c.addressable)
owned = needs("durable, and not shared", lambda c: c.durable and not c.shared)
kept_apart = needs("durable or shared", lambda c: c.durable or c.shared)
