"""Has pytest rewrite the asserts of the kit, so that a test that fails shows the values.

pytest does so by itself for the files of tests alone. This module is imported before those that assert.
"""

from __future__ import annotations

import sys
from typing import Final

__all__: list[str] = []

_ASSERTING: Final = (
    "_bench",
    "_bound_tests",
    "_call_tests",
    "_child",
    "_hall",
    "_lending_tests",
    "_life_tests",
    "_machine",
    "_medium_tests",
    "_oracle",
    "_place_tests",
    "_process_tests",
    "_queue_tests",
    "_restart_tests",
    "_rig",
    "_room",
    "_room_tests",
    "_sharing_tests",
    "_transfer_tests",
    "_watch",
    "codec_suite",
    "coordinator_suite",
    "policy_suite",
    "suite",
)

if _pytest := sys.modules.get("pytest"):  # Without it nobody runs the suites.
    _pytest.register_assert_rewrite(*(f"kvbm_core.testing.{name}" for name in _ASSERTING))
