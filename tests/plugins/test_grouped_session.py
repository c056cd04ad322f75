"""What a session with several KV groups loads and stores, and what it does not, step by step."""

from types import SimpleNamespace

import pytest

from kvbm_core import Capabilities, Planner, Reason, Report, TierStatus, root_key
from kvbm_core.groups import Coverage, KvGroup, Rule, group_tag
from kvbm_engine import (
    BlockKeys,
    Ledger,
    Parked,
    Progress,
    Schedule,
    Session,
    SparseStores,
    Step,
    Storing,
)
from kvbm_metrics import Tally

NOW = 10.0
FULL = KvGroup(4, Coverage(), group_tag({"kind": "full"}))
WINDOW = KvGroup(4, Coverage(Rule.WINDOW, 7), group_tag({"kind": "window"}))
STATE = KvGroup(8, Coverage(Rule.STATE), group_tag({"kind": "state"}))
CHUNK = KvGroup(4, Coverage(Rule.CHUNK, 16), group_tag({"kind": "chunk"}))
PROMPT = list(range(34))
"""Eight blocks of four, and two tokens to be computed."""


def request(name="a", tokens=PROMPT):
    return SimpleNamespace(
        request_id=name, all_token_ids=tokens, num_tokens=len(tokens), num_computed_tokens=1 << 30
    )


def keys_of(groups, tokens=PROMPT):
    return BlockKeys(request(tokens=tokens), groups, root_key(), lambda start, stop: {})


class Leader:
    """A session over one tier in host memory that holds these blocks: places by group."""

    def __init__(self, groups, there=(), *, stores=None, drafts=(), one_queue=False):
        self.groups = groups
        keys = keys_of(groups)
        inventory = [
            (key, 1)
            for at, places in enumerate(there)
            for place in places
            for key in keys.slice(place, place + 1, at)
        ]
        ones = (1,) * len(groups)
        tier = TierStatus("cpu", Capabilities(capacity_bytes=1000, addressable=True), inventory, ones, ones)
        self.planner = Planner([[tier]], groups=groups)
        self.tally = Tally(self.planner, 0)
        made = Ledger(
            lambda asked: BlockKeys(asked, groups, root_key(), lambda start, stop: {}),
            groups, Parked(1000, one_queue=one_queue), drafts,
        )  # fmt: skip
        storing = Storing(made, self.planner, stores or SparseStores(None), lambda _: self.junction)
        self.session = Session(made, self.planner, self.tally, 100, joins=True, storing=storing)
        self.junction = 0
        self.keys = keys

    def match(self, asked, computed=0, now_s=NOW):
        return self.session.match(asked, computed, now_s, reads_cache=True)

    def admit(self, asked, tables, tokens=0, now_s=NOW):
        self.session.allocated(asked, tables, tokens, now_s)

    def step(self, *requests, now_s=NOW, **told):
        tokens = sum(each[2] for each in requests)
        return self.session.step(Schedule(list(requests), tokens, **told), now_s)

    def end(self, step, plan=None, failed=()):
        """Bring a step's outcome, and with it that a plan is carried out, but for loads of these groups."""
        reports = []
        for op in [*plan.stores, *plan.loads] if plan else ():
            fails = {0: Reason.MISSING} if op in plan.loads and op.group in failed else {}
            reports += [Report(op.op, tier, fails) for tier in op.tiers]
        self.session.outcomes(reports, step, {}, NOW)


def stored(plan):
    """By group the device blocks that a plan stores."""
    found = {}
    for op in plan.stores:
        found.setdefault(op.group, []).extend(op.blocks)
    return found


def loads(plan):
    """By group the device blocks that a plan loads, and whether in the step."""
    found = {}
    for op in plan.loads:
        blocks, _ = found.get(op.group, ([], False))
        found[op.group] = [*blocks, *op.blocks], op.in_step
    return found


def table(first, count, nulls=0):
    return [0] * nulls + list(range(first, first + count - nulls))


@pytest.mark.parametrize(
    ("groups", "there", "tokens"),
    [
        ((FULL, WINDOW), (range(8), range(8)), 32),
        ((FULL, WINDOW), (range(8), range(6)), 24),
        # The window ahead of 32 needs both of its last blocks, that ahead of 24 has one of two.
        ((FULL, WINDOW), (range(8), (4, 7)), 0),
        ((FULL, WINDOW), (range(5), (3, 4)), 20),
        ((FULL, STATE), (range(8), (0, 2)), 24),
        ((FULL, STATE), (range(8), ()), 0),
        ((FULL, STATE), ((), range(4)), 0),
        # A chunk ends at 32 and at 16, so that nothing is needed of its group.
        ((FULL, CHUNK), (range(8), ()), 32),
        ((FULL, CHUNK), (range(7), (4, 5, 6)), 28),
        ((FULL, CHUNK), (range(7), (5, 6)), 16),
        ((WINDOW,), ((6, 7),), 32),
        ((STATE,), ((1,),), 16),
        # All that a chunk needs is nothing, and the arrival of nothing can be told to nobody.
        ((CHUNK,), ((),), 0),
        ((FULL, WINDOW, STATE), (range(8), (2, 3), (1, 3)), 16),
    ],
)
def test_a_hit_ends_where_every_group_has_what_its_rule_names(groups, there, tokens):
    found = Leader(groups, there).match(request())
    assert found == ((tokens, True) if tokens else (0, False))


def test_what_is_loaded_is_what_the_engine_gave_room_for_and_never_in_a_step():
    made = Leader((FULL, WINDOW, STATE), (range(8), range(8), range(4)))
    asked = request()
    assert made.match(asked) == (32, True)
    made.admit(asked, [table(10, 8), table(30, 8, nulls=6), table(50, 4, nulls=3)], 32)
    plan = made.step().plan
    assert loads(plan) == {0: (table(10, 8), False), 1: ([30, 31], False), 2: ([50], False)}
    assert [op.keys for op in plan.loads] == [
        made.keys.slice(0, 8, 0), made.keys.slice(6, 8, 1), made.keys.slice(3, 4, 2)
    ]  # fmt: skip
    assert plan.overwrites == []
    assert made.session.ledger.parked.blocks == 11
    made.end(1, plan)
    assert made.tally.take(NOW)["saved_tokens|cpu"] == 32


def test_a_request_that_was_loaded_writes_what_it_computes_and_not_what_was_loaded():
    made = Leader((FULL, WINDOW, STATE), (range(8), range(8), range(4)))
    asked = request()
    made.match(asked)
    tables = [table(10, 8), table(30, 8, nulls=6), table(50, 4, nulls=3)]
    made.admit(asked, tables, 32)
    plan = made.step().plan
    made.end(1, plan)
    # The engine tells of all blocks once more, with those of the rest of the prompt.
    tables = [[*table(10, 8), 90], [*table(30, 8, nulls=6), 91], [*table(50, 4, nulls=3), 92]]
    made.admit(asked, tables)
    assert sorted(made.step(("a", 32, 2, tables, True)).plan.overwrites) == [90, 91, 92]


def test_a_prefix_that_the_engine_has_in_part_is_loaded_from_there_on():
    made = Leader((FULL, WINDOW), (range(8), range(8)))
    asked = request()
    assert made.match(asked, 28) == (4, True)
    # Of the window ahead of 32 one block lies before 28: that is the engine's own.
    made.admit(asked, [table(10, 8), table(30, 8, nulls=6)], 4)
    assert loads(made.step().plan) == {0: ([17], False), 1: ([31], False)}


def test_where_the_engine_gave_room_for_more_than_was_found_all_of_it_must_come_or_the_request_fails():
    """Its tables, not our rules, say what it will read."""
    made = Leader((FULL, WINDOW), (range(8), (6, 7)))
    asked = request()
    assert made.match(asked) == (32, True)
    made.admit(asked, [table(10, 8), table(30, 8, nulls=5)], 32)
    plan = made.step().plan
    assert loads(plan)[1][0] == [30, 31, 32]
    # The third one before the boundary is in no tier: it is asked for, and will fail.
    assert not made.planner.is_ready(made.keys.slice(5, 6, 1)[0], 0)


def test_an_engine_that_does_nothing_and_gives_no_blocks_for_a_load_computes():
    """vLLM counts twice what a request needs that had begun to load before, and would wait for ever."""
    made = Leader((FULL, WINDOW), (range(8), range(8)))
    asked = request()
    assert made.match(asked) == (32, True)
    for _ in range(16):
        made.step()
        assert made.match(asked) == (32, True)
    made.step()
    assert made.match(asked) == (0, False)
    # Beside others it had no room, and that says nothing.
    made.step(("other", 0, 4, [[1], [2]], True))
    assert made.match(asked) == (32, True)
    made.end(18)
    for _ in range(16):
        made.step()
        assert made.match(asked) == (32, True)
    made.admit(asked, [table(10, 8), table(30, 8, nulls=6)], 32)
    assert loads(made.step().plan)


def test_a_failure_in_one_group_is_one_of_the_request_and_not_tried_again():
    made = Leader((FULL, WINDOW), (range(8), range(8)))
    asked = request()
    made.match(asked)
    made.admit(asked, [table(10, 8), table(30, 8, nulls=6)], 32)
    step = made.step()
    rank = Progress(whole_requests=True)
    rank.begin(step)
    [full, window] = step.plan.loads
    rank.take_in([Report(full.op, 0)])
    assert (rank.take_finished(), rank.take_failed_requests()) == (set(), set())
    rank.take_in([Report(window.op, 0, {1: Reason.CORRUPT})])
    assert (rank.take_finished(), rank.take_failed_requests()) == ({"a"}, {"a"})
    assert (rank.take_failed_blocks(), rank.take_failed_requests()) == (set(), set())
    made.end(1, step.plan, failed=[1])
    assert made.match(asked) == (0, False)
    assert made.tally.take(NOW)["saved_tokens|cpu"] == 0


def compute(made, asked, tables, *, states=None, finish=True):
    """Compute a whole prompt in one step, and give what is stored of it then and when it ends."""
    made.match(asked)
    made.admit(asked, tables)
    told = {"states": {asked.request_id: states}} if states else {}
    first = made.step((asked.request_id, 0, asked.num_tokens, tables, True), **told)
    made.end(first.number)
    plans = [made.step().plan]
    if finish:
        made.session.finished(asked.request_id, NOW)
        plans.append(made.step(now_s=NOW + 1).plan)
    return [stored(plan) for plan in plans]


def test_of_a_window_what_a_boundary_needs_is_stored():
    """The prompt's end at 32 needs two blocks, and the boundary before it one more."""
    made = Leader((FULL, WINDOW))
    assert compute(made, request(), [table(10, 9), table(30, 9)]) == [
        {0: table(10, 8), 1: [35, 36, 37]}, {}
    ]  # fmt: skip


def test_every_so_many_tokens_a_boundary_is_kept_and_dense_keeps_all():
    made = Leader((FULL, WINDOW), stores=SparseStores(16))
    assert compute(made, request(), [table(10, 9), table(30, 9)])[0][1] == [32, 33, 35, 36, 37]
    made = Leader((FULL, WINDOW), stores=SparseStores(None, dense=True))
    assert compute(made, request(), [table(10, 9), table(30, 9)])[0][1] == table(30, 8)


def test_where_others_have_left_a_prompt_a_boundary_is_kept():
    made = Leader((FULL, WINDOW))
    made.junction = 18
    assert compute(made, request(), [table(10, 9), table(30, 9)])[0][1] == [32, 33, 35, 36, 37]
    # Our own tiers say so, too: they have the full group's blocks up to there, and no window.
    made = Leader((FULL, WINDOW), (range(4), ()))
    assert made.match(request()) == (0, False)
    assert compute(made, request(), [table(10, 9), table(30, 9)])[0][1] == [32, 33, 35, 36, 37]


def test_the_end_of_a_request_is_a_boundary():
    made = Leader((FULL, WINDOW))
    asked = request()
    compute(made, asked, [table(10, 9), table(30, 9)], finish=False)
    asked.all_token_ids = list(range(46))
    asked.num_tokens = 46
    step = made.step(("a", 34, 11, [table(19, 3), table(39, 3)], False))
    made.end(step.number)
    assert stored(made.step().plan) == {0: [18, 19, 20]}
    made.session.finished("a", NOW)
    assert stored(made.step(now_s=NOW + 1).plan) == {1: [39, 40]}
    assert not made.session.ledger.has_ended


def test_a_block_that_was_given_away_before_its_step_was_confirmed_is_not_stored():
    """The engine takes window blocks from a running request, and says so only by giving them to another."""
    made = Leader((FULL, WINDOW))
    asked = request()
    made.match(asked)
    made.admit(asked, [table(10, 9), table(30, 9)])
    first = made.step(("a", 0, 34, [table(10, 9), table(30, 9)], True))
    # Planned before the outcome of the first step is known: block 36 goes to another request.
    made.match(other := request("b", list(range(100, 107))))
    made.admit(other, [[60, 61], [36, 62]])
    made.step(("b", 0, 7, [[60, 61], [36, 62]], True))
    made.end(first.number)
    assert stored(made.step().plan) == {0: table(10, 8), 1: [35, 37]}


def test_a_block_that_is_given_away_in_the_step_that_stores_it_is_stored():
    """The plan reads it before the step writes."""
    made = Leader((FULL, WINDOW))
    asked = request()
    made.match(asked)
    made.admit(asked, [table(10, 9), table(30, 9)])
    made.end(made.step(("a", 0, 34, [table(10, 9), table(30, 9)], True)).number)
    made.match(other := request("b", list(range(100, 107))))
    made.admit(other, [[60, 61], [36, 62]])
    plan = made.step(("b", 0, 7, [[60, 61], [36, 62]], True)).plan
    assert stored(plan)[1] == [35, 36, 37]
    assert 36 in plan.overwrites


def test_a_block_that_two_requests_share_is_forgotten_in_both():
    made = Leader((FULL, WINDOW))
    first, second = request("a"), request("b")
    for asked in (first, second):
        made.match(asked)
        made.admit(asked, [table(10, 9), table(30, 9)])
        made.step((asked.request_id, 0, 34, [table(10, 9), table(30, 9)], True))
    made.step(("c", 0, 4, [[60], [37]], True))
    for name in ("a", "b"):
        assert made.session.ledger.find(name).blocks[1][7] == 0


def test_a_state_is_stored_where_it_is_handed_over_and_nowhere_else():
    made = Leader((FULL, STATE))
    tables = [table(10, 9), table(50, 5)]
    assert compute(made, request(), tables) == [{0: table(10, 8)}, {}]
    made = Leader((FULL, STATE))
    # At 12 tokens no block of its group ends: that is the engine's own matter.
    states = [(1, 70, 12), (1, 51, 16), (1, 53, 32)]
    assert compute(made, request(), tables, states=states) == [{0: table(10, 8), 1: [51, 53]}, {}]
    assert [key for op in made.planner.take(NOW).stores for key in op.keys] == []


def test_a_state_whose_block_was_given_away_is_not_stored():
    made = Leader((FULL, STATE))
    asked = request()
    made.match(asked)
    made.admit(asked, [table(10, 9), table(50, 5)])
    first = made.step(
        ("a", 0, 34, [table(10, 9), table(50, 5)], True), states={"a": [(1, 51, 16), (1, 53, 32)]}
    )
    made.step(("c", 0, 4, [[60], [53]], True))
    made.end(first.number)
    assert stored(made.step().plan) == {0: table(10, 8), 1: [51]}


def test_what_a_drafting_model_may_write_anew_is_stored_when_the_request_has_ended():
    made = Leader((FULL,), drafts={0})
    asked = request()
    assert compute(made, asked, [table(10, 9)]) == [{0: table(10, 7)}, {0: [17]}]


def test_blocks_of_other_groups_count_as_written():
    made = Leader((FULL, WINDOW))
    asked = request()
    made.match(asked)
    made.admit(asked, [table(10, 9), table(30, 9), [80, 81]])
    plan = made.step(("a", 0, 34, [table(10, 9), table(30, 9), [80, 81]], True), written=[90]).plan
    assert sorted(plan.overwrites) == [*table(10, 9), *table(30, 9), 80, 81, 90]


def test_a_request_that_goes_on_elsewhere_is_asked_for_anew():
    """What came since makes another boundary the best."""
    made = Leader((FULL, WINDOW), (range(8), (2, 3)))
    asked = request()
    assert made.match(asked) == (16, True)
    made.planner.store(made.keys.slice(6, 8, 1), [1, 2], made.keys, NOW, 1)
    made.end(0, made.step().plan)
    assert made.match(asked) == (32, True)


def test_a_rank_whose_loads_fail_with_its_tiers_fails_requests_as_a_whole():
    rank = Progress(whole_requests=True)
    made = Leader((FULL, WINDOW), (range(8), range(8)))
    asked = request()
    made.match(asked)
    made.admit(asked, [table(10, 8), table(30, 8, nulls=6)], 32)
    rank.begin(made.step())
    rank.fail_all()
    assert (rank.take_finished(), rank.take_failed_requests()) == ({"a"}, {"a"})
    assert isinstance(rank.begun, Step)
