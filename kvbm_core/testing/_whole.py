"""What all suites share: their tests are run whole, or waived with a reason."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest

from kvbm_core.testing._rig import PATIENCE_S
from kvbm_core.testing._watch import watched
from kvbm_core.testing._witness import witnessed

__all__ = ["WholeSuite", "insist_on_the_whole", "members_of"]


class WholeSuite:
    """Base of a suite, which is a class of tests for authors to subclass.

    A subclass may define what the suite lists in `members`, and tests of its own. A test of the suite that
    cannot pass is waived, with the reason, and must then fail.
    """

    members: ClassVar[frozenset[str]] = frozenset()
    """What a subclass may define, beside tests of its own."""
    waivers: ClassVar[Mapping[str, str]] = {}
    """Tests that cannot pass, and why. Each must fail, else the waiver is out of date."""

    @pytest.fixture(autouse=True)
    def _watch(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Have a test fail that makes no progress, and be named if the interpreter ends in it."""
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with witnessed(request.node.nodeid, capture), watched(PATIENCE_S):
            yield

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if WholeSuite in cls.__bases__:
            return
        insist_on_the_whole(cls)
        suite = _suite_of(cls)
        for name, reason in cls.waivers.items():
            if not name.startswith("test_") or name not in members_of(suite):
                raise TypeError(f"{cls.__name__} waives {name!r}, which is no test of the suite")
            if not reason.strip():
                raise TypeError(f"{cls.__name__} waives {name} without a reason")
            setattr(cls, name, _waived(members_of(suite)[name], reason))


def insist_on_the_whole(cls: type[WholeSuite]) -> None:
    """Refuse a class in which a test of its suite was replaced or switched off.

    Raises:
        TypeError: If there is one. Names it, or the mark.
    """
    wrong, suite = [], _suite_of(cls)
    for name, member in members_of(suite).items():
        mine = inspect.getattr_static(cls, name)
        free = name in suite.members or name.startswith("__")
        if not free and getattr(mine, "waives", mine) is not member:
            wrong.append(name)
    if wrong:
        raise TypeError(f"{cls.__name__} overrides {wrong}: declare a waiver with its reason instead")
    marks = {mark.name for mark in getattr(cls, "pytestmark", ())}
    if marks & {"skip", "skipif", "xfail"}:
        raise TypeError(f"{cls.__name__} is marked {sorted(marks)}: declare a waiver for each test instead")


def members_of(suite: type[WholeSuite]) -> dict[str, Any]:
    """Give what a suite is made of, its own and that of its parts."""
    parts = [base for base in suite.__mro__ if base not in (WholeSuite, object)]
    return {name: member for base in reversed(parts) for name, member in vars(base).items()}


def _suite_of(cls: type[WholeSuite]) -> type[WholeSuite]:
    """Find the suite that a class is made from."""
    return next(base for base in cls.__mro__ if WholeSuite in base.__bases__)


def _waived(test: Any, reason: str) -> Any:
    """Turn a test around: it must fail. What goes wrong before it, in its fixture, still counts."""

    @functools.wraps(test)
    def waived(self: WholeSuite, **fixtures: Any) -> None:
        try:
            test(self, **fixtures)
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - failing is what is expected
            pytest.xfail(f"waived: {reason} ({type(error).__name__})")
        pytest.fail(f"waived, but it passes: remove the waiver ({reason})")

    waived.waives = test  # type: ignore[attr-defined]
    return waived
