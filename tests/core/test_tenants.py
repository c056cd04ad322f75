"""Tenants that share tiers, and blocks that are kept: what each has, and what no other load takes from it."""

import hashlib
import sys
from fractions import Fraction

import pytest

from kvbm_core import Capabilities, ConfigError, Planner, Report, TierStatus, load_config
from kvbm_core.leader.ground.tier_policies import TierPolicies
from kvbm_core.leader.tenancy.partitioned_index import PartitionedIndex
from kvbm_core.leader.tenancy.wishes import Wish, wish_of
from kvbm_core.movement import Movement
from kvbm_core.policies import Lru
from kvbm_core.sharing import Sharing, sharing_of

EXCLUSIVE = Movement(stores="demotion", copies="exclusive", promotion="measured")
BLOCK = 10
"""Bytes that an object takes."""


def key(name, at=0):
    return hashlib.sha256(f"{name} {at}".encode()).digest()


def keys(name, count, first=0):
    return [key(name, at) for at in range(first, first + count)]


class Prefix(list):
    """A request's keys, with its wish."""

    def __init__(self, keys, wish=None):
        super().__init__(keys)
        self.wish = wish


def planner(*tiers, ranks=1, policy=None, movement=None, **sharing):
    """Over tiers of so many blocks, the first in host memory."""
    status = [
        TierStatus(
            f"tier{at}", Capabilities(capacity_bytes=blocks * BLOCK, addressable=at == 0), [], (BLOCK,), (8,)
        )
        for at, blocks in enumerate(tiers)
    ]
    made = {"policies": TierPolicies({at: policy for at in range(len(tiers))})} if policy else {}
    if movement is not None:
        made["movements"] = [Movement(), movement]
    sizes = {each.name: each.capabilities.capacity_bytes * ranks for each in status}

    def parts(quotas):
        return {tier: Fraction(quota, sizes[tier]) for tier, quota in quotas.items()}

    sharing["tenants"] = {name: parts(quotas) for name, quotas in sharing.get("tenants", {}).items()}
    if "others" in sharing:
        sharing["others"] = parts(sharing["others"])
    return Planner([status] * ranks, sharing=Sharing(**sharing), max_store_blocks=10_000, **made)


def wish(made, tenant="", keep_s=0.0, now_s=0.0):
    if tenant:
        assert made.tenants.why_not(tenant, now_s) == ""
    asked = Wish(tenant, keep_s)
    made.tenants.begin(asked)
    return asked


def carry_out(made, now_s=0.0):
    """Have every rank do what is planned, until nothing more is."""
    while plan := made.take(now_s):
        ops = [*plan.stores, *plan.fills, *plan.loads]
        made.report([Report(op.op, tier) for op in ops for tier in op.tiers] * made._world_size, now_s)
        if not ops:
            break


def store(made, wanted, asked=None, now_s=0.0):
    made.store(wanted, range(len(wanted)), Prefix(wanted, asked), now_s)
    carry_out(made, now_s)


def here(made, wanted, tier=0):
    return [each for each in wanted if made.is_ready(each, tier)]


def used(made):
    return {(level.tenant, level.tier): level.used_bytes for level in made.tenants.levels()}


def test_a_tenant_at_its_quota_makes_room_among_its_own_blocks_and_another_ones_flood_takes_nothing():
    made = planner(20, tenants={"a": {"tier0": 60}, "b": {"tier0": 80}})
    mine = wish(made, "a")
    store(made, keys("a", 6), mine)
    store(made, keys("common", 4))
    for at in range(50):
        store(made, keys(f"flood {at}", 3), wish(made, "b"))
    assert here(made, keys("a", 6)) == keys("a", 6)
    assert here(made, keys("common", 4)) == keys("common", 4)
    assert used(made) == {("a", "tier0"): 60, ("b", "tier0"): 80}
    store(made, keys("a", 2, first=6), mine)
    # The head of its prefix was stored before its end, and so used longer ago.
    assert len(here(made, keys("a", 8))) == 6
    assert here(made, keys("a", 8, first=6)[:2]) == keys("a", 2, first=6)
    assert used(made)["a", "tier0"] == 60


def test_what_nobody_is_promised_is_lent_and_given_back():
    made = planner(20, tenants={"a": {"tier0": 60}})
    store(made, keys("common", 20))
    assert len(here(made, keys("common", 20))) == 20
    store(made, keys("a", 6), wish(made, "a"))
    assert here(made, keys("a", 6)) == keys("a", 6)
    assert len(here(made, keys("common", 20))) == 14
    store(made, keys("more", 30))
    assert here(made, keys("a", 6)) == keys("a", 6)


def test_a_block_is_charged_to_who_brought_it_first_as_long_as_it_is_there():
    made = planner(20, tenants={"a": {"tier0": 60}, "b": {"tier0": 60}})
    a, b = wish(made, "a"), wish(made, "b")
    store(made, keys("both", 3), a)
    store(made, keys("both", 5), b)
    assert used(made) == {("a", "tier0"): 30, ("b", "tier0"): 20}
    store(made, keys("a", 6), a)
    assert here(made, keys("both", 5)) == keys("both", 2, first=3)
    store(made, keys("both", 3), b)
    assert used(made) == {("a", "tier0"): 60, ("b", "tier0"): 50}


def test_without_a_quota_in_a_tier_a_tenants_blocks_there_are_common():
    made = planner(8, 20, tenants={"a": {"tier1": 30}})
    store(made, keys("a", 4), wish(made, "a"))
    store(made, keys("flood", 20))
    assert here(made, keys("a", 4)) == []
    assert len(here(made, keys("a", 4), tier=1)) == 3
    assert used(made) == {("a", "tier1"): 30}


def test_blocks_that_are_moved_for_nobody_stay_charged_to_whom_they_were():
    made = planner(8, 20, tenants={"a": {"tier0": 40, "tier1": 30}})
    store(made, keys("a", 4), wish(made, "a"))
    for each in keys("a", 4):
        made.tiers[1].drop(each)
    carry_out(made)
    assert used(made) == {("a", "tier0"): 40, ("a", "tier1"): 0}
    made.fill(0, 1, keys("a", 4), 0.0)
    carry_out(made)
    assert used(made) == {("a", "tier0"): 40, ("a", "tier1"): 30}


def test_others_share_by_default_as_many_as_fit_and_a_long_idle_one_makes_room():
    made = planner(10, tenants={"named": {"tier0": 40}}, others={"tier0": 30})
    first, second = wish(made, "first"), wish(made, "second")
    store(made, keys("first", 3), first)
    assert made.tenants.why_not("third", 0.0) == "the tiers have no room for the quotas of another tenant"
    made.tenants.end(first, 0.0)
    assert made.tenants.why_not("third", 599.0)
    assert made.tenants.why_not("third", 600.0) == ""
    assert used(made) == {("named", "tier0"): 0, ("second", "tier0"): 0, ("third", "tier0"): 0}
    assert used(made).keys() == {("named", "tier0"), ("second", "tier0"), ("third", "tier0")}
    made.tenants.begin(Wish("third"))
    assert made.tenants.why_not("fourth", 9999.0)
    # Its blocks are still there, and common.
    assert here(made, keys("first", 3)) == keys("first", 3)
    made.tenants.end(second, 600.0)
    store(made, keys("flood", 10))
    assert here(made, keys("first", 3)) == []


def test_a_server_without_a_default_has_no_other_tenants():
    made = planner(10, tenants={"named": {"tier0": 40}})
    assert made.tenants.why_not("named", 0.0) == ""
    assert "no tenant of this server" in made.tenants.why_not("other", 0.0)


def test_names_of_tenants_are_bounded():
    made = planner(1000, others={"tier0": 1})
    reasons = [made.tenants.why_not(f"tenant {at}", 0.0) for at in range(300)]
    assert [bool(reason) for reason in reasons] == [False] * 256 + [True] * 44


def test_kept_blocks_stay_until_their_time_whatever_comes_and_go_then():
    made = planner(10, 20, keep_fraction=0.5)
    mine = wish(made, keep_s=5.0)
    store(made, keys("kept", 5), mine, now_s=1.0)
    for at in range(40):
        store(made, keys(f"flood {at}", 4), now_s=5.9)
    assert here(made, keys("kept", 5)) == keys("kept", 5)
    assert here(made, keys("kept", 5), tier=1) == keys("kept", 5)
    assert made.tenants.kept_bytes() == {"tier0": 50, "tier1": 50}
    store(made, keys("late", 1), now_s=6.0)
    assert made.tenants.kept_bytes() == {"tier0": 0, "tier1": 0}
    for at in range(40):
        store(made, keys(f"again {at}", 4), now_s=6.0)
    assert here(made, keys("kept", 5)) == here(made, keys("kept", 5), tier=1) == []


def test_of_a_tier_and_of_a_quota_a_part_is_kept_at_most_and_the_head_first():
    made = planner(20, keep_fraction=0.25, tenants={"a": {"tier0": 80}})
    asked = wish(made, "a", keep_s=5.0)
    store(made, keys("a", 8), asked)
    assert made.tenants.keep(keys("a", 8), asked, 1.0) == {"tier0": (2, 6)}
    store(made, keys("a", 8, first=8), asked, now_s=1.0)
    assert here(made, keys("a", 8)) == keys("a", 2)
    common = wish(made, keep_s=5.0)
    store(made, keys("common", 12), common, now_s=1.0)
    assert made.tenants.keep(keys("common", 12), common, 1.0) == {"tier0": (3, 9)}


def test_nobody_has_another_ones_blocks_kept():
    made = planner(20, keep_fraction=0.5, tenants={"a": {"tier0": 80}})
    store(made, keys("a", 4), wish(made, "a"))
    for tenant in ("", "b"):
        asked = Wish(tenant, 5.0)
        assert made.tenants.keep(keys("a", 4), asked, 0.0) == {"tier0": (0, 4)}


def test_a_block_that_is_asked_for_again_is_kept_until_the_later_time():
    made = planner(10, keep_fraction=0.5)
    store(made, keys("kept", 2), wish(made, keep_s=9.0), now_s=1.0)
    store(made, keys("kept", 2), wish(made, keep_s=2.0), now_s=2.0)
    made.tenants.release(9.9)
    assert made.tenants.kept_bytes() == {"tier0": 20}
    made.tenants.release(10.0)
    assert made.tenants.kept_bytes() == {"tier0": 0}


def test_the_kept_copy_of_a_block_stays_where_copies_are_exclusive():
    made = planner(10, 20, keep_fraction=0.5, movement=EXCLUSIVE)
    for at, each in enumerate(keys("kept", 3)):
        made._tiers[1].index.found(each, BLOCK)
        made.tenants.begin(asked := Wish("", 5.0 if at < 2 else 0.0))
        made.tenants.keep([each], asked, 0.0) if asked.keep_s else None
    made.fill(1, 0, keys("kept", 3), 0.0)
    carry_out(made)
    made.tiers[1].reserve(keys("others", 18), ())
    assert here(made, keys("kept", 3)) == keys("kept", 3)
    assert here(made, keys("kept", 3), tier=1) == keys("kept", 2)


def test_the_spare_copy_of_a_tenants_block_makes_no_room_for_others():
    made = planner(10, 10, tenants={"a": {"tier1": 40}}, movement=EXCLUSIVE)
    theirs = Prefix(keys("theirs", 4), wish(made, "a"))
    made.tiers[1].index.stored(made.tiers[1].reserve(theirs, theirs))
    made.fill(1, 0, keys("theirs", 4), 0.0)
    carry_out(made)
    assert here(made, keys("theirs", 4)) == keys("theirs", 4)
    made.tiers[1].reserve(keys("others", 10), ())
    assert here(made, keys("theirs", 4), tier=1) == keys("theirs", 4)


def test_what_a_corrupt_kept_block_took_is_free():
    made = planner(10, keep_fraction=0.5, tenants={"a": {"tier0": 80}})
    store(made, keys("a", 4), wish(made, "a", keep_s=5.0))
    made.tiers[0].drop(key("a"), corrupt=True)
    assert used(made) == {("a", "tier0"): 30}
    assert made.tenants.kept_bytes() == {"tier0": 30}


def test_without_tenants_and_kept_blocks_the_index_is_the_plain_one():
    made = planner(10, keep_fraction=0.5, others={"tier0": 30})
    store(made, keys("plain", 4))
    made.tenants.begin(Wish())
    assert not isinstance(made._tiers[0].index, PartitionedIndex)
    assert wish_of(keys("plain", 4)) is None


def test_a_finding_is_true_after_the_index_was_divided():
    made = planner(10, keep_fraction=0.5)
    wanted = keys("found", 4)

    class Asked(Prefix):
        def slice(self, start, stop, group=0):
            return self[start:stop]

    found = made.find(Asked(wanted), 0, 4, 0.0)
    wish(made, keep_s=1.0)
    assert made.find(Asked(wanted), 0, 4, 0.0, found) is found
    store(made, wanted)
    assert made.find(Asked(wanted), 0, 4, 0.0, found).tiers == [0] * 4


class Once(Lru):
    """A policy that lets in what it is asked for a second time."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def admitted(self, keys, fitting, nbytes):
        self.asked += keys
        return keys


def test_no_policy_is_asked_twice_for_one_block():
    made_policies = []

    def policy(context):
        made_policies.append(Once())
        return made_policies[-1]

    made = planner(10, policy=policy, tenants={"a": {"tier0": 40}})
    store(made, keys("common", 10))
    store(made, keys("a", 6), wish(made, "a"))
    assert [len(each.asked) for each in made_policies] == [0, 6]


@pytest.mark.parametrize(
    ("tenants", "said"),
    [
        ({"a": {"dram": "1MiB"}}, r"tenants: a: dram: there is no such tier; write one of memory, remote"),
        ({"a": {"remote": "1MiB"}}, r"tenants: a: remote: this tier has no capacity to be shared"),
        ({"a": {"memory": 0}}, r"tenants: a: memory: 0; write a size above 0"),
        ({"a": {"memory": "3MiB"}, "b": {"memory": "2MiB"}}, r"tenants: b: memory: the quotas add up to 5Mi"),
        ({"a": {"memory": "much"}}, r"tenants.*'much' is not a size"),
        ({"a": "1MiB"}, r"tenants"),
    ],
)  # fmt: skip
def test_quotas_that_cannot_be_are_refused(tenants, said):
    tiers = [{"backend": "memory", "capacity": "4MiB"}, {"backend": "remote", "url": "memory://x"}]
    with pytest.raises(ConfigError, match=said):
        sharing_of(load_config({"tiers": tiers, "tenants": tenants}))


@pytest.mark.parametrize(
    "sharing", [{"tenants": {"a": {"far": Fraction(1, 2)}}}, {"others": {"far": Fraction(1, 2)}}]
)
def test_in_a_tier_that_other_engines_use_nobody_is_promised_a_part(sharing):
    far = TierStatus("far", Capabilities(capacity_bytes=100, shared=True), [])
    with pytest.raises(
        ConfigError, match=r"tenants: (a|default): far: other engines .* take this quota away"
    ):
        Planner([[far]], sharing=Sharing(**sharing))


def test_quotas_are_of_all_ranks_and_so_is_what_is_told():
    made = planner(20, ranks=2, tenants={"a": {"tier0": 120}})
    store(made, keys("a", 9), wish(made, "a"))
    assert len(here(made, keys("a", 9))) == 6
    assert used(made) == {("a", "tier0"): 120}
    assert next(made.tenants.levels()).quota_bytes == 120


def test_a_block_takes_as_long_among_many_tenants_as_among_few():
    """Counted in calls of Python functions, not in time."""

    def calls(tenants, there):
        made = planner(4000, others={"tier0": 10}, keep_fraction=0.5, tenants={"a": {"tier0": 1000}})
        for at in range(tenants):
            wish(made, f"t{at}")
        store(made, keys("there", there))
        asked = wish(made, "a", keep_s=5.0)
        store(made, keys("a", 100), asked)
        count = 0

        def note(frame, event, _):
            nonlocal count
            count += event == "call"

        sys.setprofile(note)
        try:
            made.store(keys("more", 50), range(50), Prefix(keys("more", 50), asked), 1.0)
        finally:
            sys.setprofile(None)
        return count

    assert calls(200, 3000) <= calls(2, 10) + 20


def test_a_quota_is_that_part_of_what_a_rank_has_whoever_divides_the_capacity():
    """Of two engines and two ranks each has a quarter, and a medium may have less than was configured."""
    config = {"tiers": [{"backend": "memory", "capacity": 1000}], "tenants": {"a": {"memory": 300}}}
    status = TierStatus("memory", Capabilities(capacity_bytes=240), [], (10,), (8,))
    made = Planner([[status]] * 2, sharing=sharing_of(load_config(config)))
    [level] = made.tenants.levels()
    assert level.quota_bytes == 2 * 72
