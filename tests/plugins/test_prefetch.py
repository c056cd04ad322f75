"""What is read ahead for requests that wait, and when no more, and hints; step by step, without an engine."""

from fractions import Fraction
from types import SimpleNamespace

import pytest

from kvbm_core import Capabilities, Planner, Reason, Report, TierStatus, root_key
from kvbm_core.groups import Coverage, KvGroup, Rule, group_tag
from kvbm_core.leader.ground.tier_index import TierIndex
from kvbm_core.sharing import Sharing
from kvbm_engine import BlockKeys, Ledger, Limits, Parked, Schedule, Session
from kvbm_engine import _prefetch as prefetch
from kvbm_metrics import Tally

FULL = KvGroup(4, Coverage(), group_tag({"kind": "full"}))
WINDOW = KvGroup(4, Coverage(Rule.WINDOW, 7), group_tag({"kind": "window"}))


def request(name="a", blocks=8, first=0):
    tokens = list(range(first * 1000, first * 1000 + 4 * blocks + 2))
    return SimpleNamespace(
        request_id=name, all_token_ids=tokens, num_tokens=len(tokens), num_computed_tokens=1 << 30
    )


def keys_of(asked, groups):
    return BlockKeys(asked, groups, root_key(), lambda start, stop: {})


class Leader:
    """A session over a host pool of so many blocks, and tiers that hold some requests."""

    def __init__(self, pool, lower=(), *, remote=(), groups=(FULL,), fraction=0.5, there=(), sharing=None):
        self.groups, ones = groups, (1,) * len(groups)
        self.remote = {key for each in remote for key in self.all_keys(each)}

        def status(name, held, **can):
            found = [(key, 1) for each in held for key in reversed(self.all_keys(each))]
            return TierStatus(name, Capabilities(capacity_bytes=1000, **can), found, ones, ones)

        tiers = [status("disk", lower)]
        if pool:
            found = status("cpu", there).inventory
            tiers.insert(
                0, TierStatus("cpu", Capabilities(capacity_bytes=pool, addressable=True), found, ones, ones)
            )
        if remote:
            can = {"shared": True, "remote_lookup": True, "durable": True}
            tiers.append(TierStatus("remote", Capabilities(capacity_bytes=None, **can), [], ones, ones))
        self.planner = Planner([tiers], groups=groups, sharing=sharing)
        self.ledger = Ledger(lambda asked: keys_of(asked, groups), groups, Parked(1000, one_queue=False))
        self.tally = Tally(self.planner, 4)
        limits = Limits(sharing.keep_fraction if sharing else 0.0, 60.0, fraction, 5.0)
        self.session = Session(self.ledger, self.planner, self.tally, 100, joins=False, limits=limits)
        self.now_s = 10.0

    def all_keys(self, asked):
        keys = keys_of(asked, self.groups)
        return [key for at, _ in enumerate(self.groups) for key in keys.slice(0, asked.num_tokens // 4, at)]

    def arrive(self, *requests, **told):
        for each in requests:
            self.session.arrived(each, self.now_s, **told)

    def match(self, asked, computed=0):
        return self.session.match(asked, computed, self.now_s, reads_cache=True)

    def step(self, *scheduled):
        return self.session.step(
            Schedule(list(scheduled), sum(each[2] for each in scheduled)), self.now_s
        ).plan

    def end(self, plan, failed=()):
        reports = []
        for op in [*plan.fills, *plan.loads, *plan.stores, *plan.lookups]:
            fails = {at: Reason.ERROR for at, _ in enumerate(op.keys)} if op in failed else {}
            if op in plan.lookups:
                fails = {at: Reason.MISSING for at, key in enumerate(op.keys) if key not in self.remote}
            reports += [Report(op.op, tier, fails) for tier in op.tiers]
        self.session.outcomes(reports, self.ledger.steps.number, {}, self.now_s)

    def admit(self, asked, tokens=0):
        table = list(range(1, asked.num_tokens // 4 + 2))
        self.session.allocated(asked, [table for _ in self.groups], tokens, self.now_s)

    @property
    def counted(self):
        told = self.session.take_readings(self.now_s)
        return {key: n for key, n in told.items() if key.startswith("filled_bytes|prefetch") and n}


def read(plan):
    """How many blocks a plan reads into the host pool."""
    assert all((op.target, op.source > 0) == (0, True) for op in plan.fills)
    return sum(len(op.keys) for op in plan.fills)


def test_blocks_of_a_request_that_waits_are_read_into_the_host_pool_and_found_there():
    a = request()
    leader = Leader(100, [a])
    leader.arrive(a)
    plan = leader.step()
    assert read(plan) == 8
    leader.end(plan)
    assert read(leader.step()) == 0
    assert leader.match(a) == (32, True)
    leader.admit(a, 32)
    assert [(load.tier, len(load.keys)) for load in leader.step().loads] == [(0, 8)]
    assert leader.counted == {"filled_bytes|prefetch|1|cpu": 8}


def test_a_store_that_must_be_asked_is_asked_first():
    a = request()
    leader = Leader(100, remote=[a])
    leader.arrive(a)
    plan = leader.step()
    assert (len(plan.lookups), read(plan)) == (1, 0)
    assert read(leader.step()) == 0
    leader.end(plan)
    plan = leader.step()
    assert read(plan) == 8
    assert {op.source for op in plan.fills} == {2}


def test_a_request_that_the_engine_turns_to_at_once_is_loaded_as_ever():
    a = request()
    leader = Leader(100, [a])
    leader.arrive(a)
    assert leader.match(a) == (32, True)
    leader.admit(a, 32)
    plan = leader.step()
    assert (read(plan), [load.tier for load in plan.loads]) == (0, [1])


def test_a_request_for_which_the_engine_has_no_room_is_read_ahead_from_what_it_lacks():
    a = request()
    leader = Leader(100, [a])
    leader.arrive(a)
    assert leader.match(a, computed=12) == (20, True)
    assert read(leader.step()) == 5


def test_what_waits_holds_a_part_of_the_host_pool_at_most_until_it_has_its_turn():
    waiting = [request(name, first=at) for at, name in enumerate("abc")]
    leader = Leader(32, waiting)
    leader.arrive(*waiting)
    plan = leader.step()
    assert read(plan) == 16
    leader.end(plan)
    assert read(leader.step()) == 0
    leader.match(waiting[0])
    leader.admit(waiting[0], 32)
    plan = leader.step()
    assert read(plan) == 8
    assert set(plan.fills[0].keys) <= set(leader.all_keys(waiting[2]))


def test_so_much_is_on_its_way_at_once_and_no_more(monkeypatch):
    monkeypatch.setattr(prefetch, "_MAX_BLOCKS", 10)
    monkeypatch.setattr(prefetch, "_CHUNK_BLOCKS", 4)
    a = request(blocks=40)
    leader = Leader(100, [a])
    leader.arrive(a)
    plan = leader.step()
    assert read(plan) == 8
    assert read(leader.step()) == 0
    monkeypatch.setattr(prefetch, "_MAX_BYTES", 5)
    leader.end(plan)
    assert read(leader.step()) == 4


@pytest.mark.parametrize("end", ["finished", "allocated"])
def test_for_a_request_that_is_gone_nothing_more_is_read(monkeypatch, end):
    monkeypatch.setattr(prefetch, "_MAX_BLOCKS", 8)
    monkeypatch.setattr(prefetch, "_CHUNK_BLOCKS", 4)
    a, b = request(blocks=40), request("b", first=1)
    leader = Leader(200, [a, b])
    leader.arrive(a, b)
    plan = leader.step()
    assert read(plan) == 8
    leader.session.finished("a", leader.now_s) if end == "finished" else leader.admit(a)
    assert read(leader.step()) == 0
    leader.end(plan)
    plan = leader.step()
    assert read(plan) == 8
    assert set(plan.fills[0].keys) <= set(leader.all_keys(b))
    leader.end(plan)
    assert not leader.session.busy(leader.now_s)


def test_the_engine_is_told_to_wait_for_what_is_on_its_way_and_only_for_that(monkeypatch):
    monkeypatch.setattr(prefetch, "_MAX_BLOCKS", 4)
    monkeypatch.setattr(prefetch, "_CHUNK_BLOCKS", 4)
    a = request()
    leader = Leader(100, [a])
    leader.arrive(a)
    plan = leader.step()
    assert read(plan) == 4
    monkeypatch.setattr(prefetch, "_MAX_BLOCKS", 8)
    assert leader.match(a) == (None, False)
    assert read(leader.step()) == 0
    leader.end(plan)
    assert leader.match(a) == (32, True)
    leader.admit(a, 32)
    assert [(load.tier, len(load.keys)) for load in leader.step().loads] == [(0, 4), (1, 4)]


def test_nobody_waits_longer_than_for_a_load():
    a = request()
    leader = Leader(100, [a])
    leader.arrive(a)
    leader.step()
    leader.now_s += 4.9
    assert leader.match(a) == (None, False)
    leader.now_s += 0.1
    assert leader.match(a) == (32, True)


def test_two_that_share_a_prefix_wait_for_one_reading():
    a, b = request(), request("b", blocks=6)
    leader = Leader(100, [a])
    leader.arrive(a, b)
    plan = leader.step()
    assert read(plan) == 8
    assert leader.match(b) == (None, False)
    leader.end(plan)
    assert leader.match(b) == (24, True)


def test_blocks_that_a_waiting_request_has_in_the_host_pool_are_not_given_up_for_another():
    oldest, other = request("oldest"), request("other", first=1)
    old = request("old", first=2)
    leader = Leader(16, [other], there=[oldest, old])
    leader.arrive(oldest, other)
    plan = leader.step()
    assert read(plan) == 8
    leader.end(plan)
    assert all(leader.planner.is_ready(key, 0) for key in leader.all_keys(oldest))
    assert not any(leader.planner.is_ready(key, 0) for key in leader.all_keys(old))


def test_a_reading_that_fails_is_not_counted_and_not_tried_again():
    a = request()
    leader = Leader(100, [a])
    leader.arrive(a)
    plan = leader.step()
    leader.end(plan, failed=plan.fills)
    assert read(leader.step()) == 0
    assert leader.counted == {}
    assert leader.match(a) == (32, True)


def test_after_a_reset_nothing_of_before_is_read():
    a = request()
    leader = Leader(100, [a])
    leader.arrive(a)
    plan = leader.step()
    leader.session.reset()
    leader.end(plan)
    assert read(leader.step()) == 0
    assert leader.match(a) == (0, False)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"pool": 100, "fraction": 0.0}, {}),
        ({"pool": 0}, {}),
        ({"pool": 1, "fraction": 0.5}, {}),
        ({"pool": 100}, {"reads_cache": False}),
    ],
)
def test_where_nothing_is_to_be_read_ahead(made, told):
    a = request()
    leader = Leader(made.pop("pool"), [a], **made)
    leader.arrive(a, **told)
    plan = leader.step()
    assert plan.fills == plan.lookups == []


def test_of_several_kv_groups_what_the_longest_boundary_needs_is_read():
    a = request()
    leader = Leader(100, [a], groups=(FULL, WINDOW))
    leader.arrive(a)
    plan = leader.step()
    assert sorted((op.group, len(op.keys)) for op in plan.fills) == [(0, 8), (1, 2)]
    leader.end(plan)
    assert leader.match(a) == (32, True)


def test_a_step_looks_at_few_of_those_that_wait():
    """Counted in requests, not in time: those behind them are looked at when these are done."""
    waiting = [request(str(at), first=at) for at in range(300)]
    leader = Leader(400, waiting[-1:])
    leader.arrive(*waiting)
    leader.step()
    looked_at = sum(bool(leader.ledger.find(each.request_id).keys._digests) for each in waiting)
    assert looked_at == 8
    read_blocks = sum(read(leader.step()) for _ in range(40))
    assert read_blocks == 8


# Hints.


def run(leader, asked, tokens=32, **told):
    """Load so much of a request, compute the rest, and give what became of its hints."""
    leader.arrive(asked, **told)
    assert leader.match(asked) == (tokens, tokens > 0)
    leader.admit(asked, tokens)
    leader.end(leader.step())
    table = [list(range(1, asked.num_tokens // 4 + 2))]
    left = asked.num_tokens - tokens
    leader.end(leader.step((asked.request_id, tokens, left, table, True)))
    answers = leader.session.finished(asked.request_id, leader.now_s)
    leader.now_s += 0.02
    leader.end(leader.step())
    return answers


def test_what_is_kept_is_kept_from_the_requests_end_on():
    a = request()
    leader = Leader(100, [a], sharing=Sharing(0.5))
    assert run(leader, a, hints={"keep": 30}) == {
        "keep": {"answer": "accepted", "seconds": 30.0, "blocks": {"cpu": 8, "disk": 8}}
    }
    leader.now_s += 29.9
    leader.step()
    assert leader.planner.tenants.kept_bytes() == {"cpu": 8, "disk": 8}
    leader.now_s += 0.1
    leader.step()
    assert leader.planner.tenants.kept_bytes() == {"cpu": 0, "disk": 0}
    assert leader.session.finished("a", leader.now_s) is None


def test_of_what_is_too_much_the_head_is_kept():
    a = request()
    leader = Leader(10, [a], sharing=Sharing(0.5))
    answer = run(leader, a, hints={"keep": 1e9})["keep"]
    assert (answer["answer"], answer["blocks"]) == ("clipped", {"cpu": 5, "disk": 8})
    assert (
        answer["reason"]
        == "60 seconds at most; 50% of a tier and of a quota is kept at most, of one's own blocks"
    )
    orders = leader.planner.tiers[0].index.orders
    assert set(leader.all_keys(a)[:5]) == orders.kept.keys()


def test_where_nothing_may_be_kept_that_is_said_and_the_index_stays_plain():
    a = request()
    leader = Leader(100, [a])
    assert run(leader, a, hints={"keep": 5}) == {
        "keep": {"answer": "refused", "reason": "this server keeps nothing"}
    }
    assert type(leader.planner.tiers[0].index) is TierIndex


def test_who_wants_nothing_but_blocks_in_fast_memory_has_all_loaded_that_is_there():
    a = request()
    leader = Leader(100, [a])
    model = leader.planner.cost_model
    model._block_tokens = 4
    for now_s in (1.0, 2.0):
        model.computed(512, 0.001, now_s)
        model.loaded(1, 8, 0.9, now_s)
    assert leader.match(request("b")) == (0, False)
    leader.session.finished("b", leader.now_s)
    leader.now_s += 5.0
    slow = request("slow")
    leader.arrive(slow, hints={"prefetch_only": True})
    leader.now_s += 5.0
    assert run(leader, slow) == {"prefetch_only": {"answer": "accepted", "blocks": {"disk": 8}}}


def test_who_wants_nothing_but_that_waits_for_it_holding_nothing_and_not_for_ever():
    a, b = request("a", 40), request("b", first=1)
    leader = Leader(100, [a, b])
    leader.arrive(a, hints={"prefetch_only": True})
    assert leader.match(a) == (None, False)
    plan = leader.step()
    leader.arrive(b)
    # Others have their turn meanwhile, and no block of the engine is parked.
    assert leader.match(b) == (32, True)
    assert leader.match(a) == (None, False)
    assert not leader.ledger.parked
    leader.end(plan)
    assert leader.match(a) == (160, True)
    leader.admit(a, 160)
    assert {load.tier for load in leader.step().loads} == {0}
    hangs = request("hangs", first=2)
    leader = Leader(100, [hangs])
    leader.arrive(hangs, hints={"prefetch_only": True})
    leader.step()
    leader.now_s += 4.9
    assert leader.match(hangs) == (None, False)
    leader.now_s += 0.1
    assert leader.match(hangs) == (32, True)


def test_what_shall_not_be_stored_is_not_and_keeps_no_engine_stepping():
    leader = Leader(100)
    for name, no_store in (("a", True), ("b", False)):
        asked = request(name)
        leader.arrive(asked, hints={"no_store": no_store})
        assert leader.match(asked) == (0, False)
        leader.admit(asked)
        leader.end(leader.step((name, 0, 34, [list(range(1, 10))], True)))
        leader.session.finished(name, leader.now_s)
        assert leader.session.busy(leader.now_s) == (not no_store)
        leader.now_s += 0.02
        leader.end(leader.step())
    assert leader.match(request("again")) == (32, True)


def test_whose_blocks_they_are_is_known_after_a_reset():
    a = request()
    leader = Leader(100, sharing=Sharing(0.5, {"a": {"cpu": Fraction(1, 2)}}))
    leader.arrive(a, hints={"tenant": "a"})
    leader.session.reset()
    assert leader.match(a) == (0, False)
    leader.admit(a)
    leader.end(leader.step(("a", 0, 34, [list(range(1, 10))], True)))
    leader.end(leader.step())
    [level] = leader.planner.tenants.levels()
    assert (level.tenant, level.used_bytes) == ("a", 8)


def test_answers_are_short_whatever_is_asked():
    leader = Leader(100)
    given = {f"{at} {'long' * 50}": at for at in range(100)}
    answers = run(leader, request(), 0, hints=given)
    assert len(answers) == 8
    assert max(map(len, answers)) == 40
    assert leader.tally._counted["hints|unknown|refused"] == 8


def test_hints_of_a_request_that_is_not_cached_are_refused():
    leader = Leader(100)
    leader.ledger._make_keys = lambda asked: None
    answers = run(leader, request(), 0, hints={"keep": 5, "tenant": "x"})
    assert {each["answer"] for each in answers.values()} == {"refused"}
    assert answers.keys() == {"keep", "tenant"}
