"""Random programs of the whole leader, see `leader_program`.

Replay one with ``KVBM_SEED=123 pytest tests/simulation/test_random_movements.py``: seeds count from there.
"""

import os
from collections import Counter
from functools import cache

import pytest
from leader_program import run

from kvbm_core.plan import FillReason

SEED = int(os.environ.get("KVBM_SEED", "0"))
STEPS, SHORT_STEPS, SHORT_SEEDS = 10_000, 1500, range(SEED, SEED + 8)

run_shortly = cache(lambda seed: run(seed, SHORT_STEPS))


@pytest.mark.parametrize("seed", SHORT_SEEDS)
def test_what_moves_is_never_lost_doubled_or_too_much(seed):
    run_shortly(seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SEED + 100, SEED + 200))
def test_the_same_over_many_steps(seed):
    run(seed, STEPS)


def test_the_programs_do_all_that_can_be_done():
    did = sum(map(run_shortly, SHORT_SEEDS), Counter())
    assert {*did} >= {FillReason.DEMOTION, FillReason.WRITE_BACK, FillReason.PREFETCH, "late"}
    assert {*did} >= {"tenant", "wish", "kept", "not kept", "no tenant", "short", "declined", "probe"}
