"""What namespaces are made of: what is said of two, and what a rank's folder keeps of them."""

import json
import logging
import os
import stat

import pytest
from test_localdir import STRANGER, mounted, needs_root

from kvbm_core import make_namespace
from kvbm_core.errors import TierOpenError
from kvbm_core.localdir import LocalDirectory
from kvbm_core.namespace_facts import (
    MOST_BYTES,
    codec_facts,
    decode_facts,
    differences,
    encode_facts,
    keep_facts,
    room_bytes,
    why_empty,
)
from kvbm_core.tier import TierContext

ROOM = 1 << 20
LAYER = ["model.layers.0", ["torch.bfloat16", [2, 16, 8, 128], [0, 1, 2, 3]]]
OTHER_LAYER = ["model.layers.0", ["torch.float16", [2, 32, 8, 128], [0, 1, 2, 3]]]


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"dtype": "bfloat16"}, {"dtype": "float16"}, ["dtype (bfloat16 here, float16 there)"]),
        ({"a": 1}, {"a": 1.0}, ["a (1 here, 1.0 there)"]),
        ({"a": None}, {}, ["a (None here, nothing there)"]),
        ({}, {"a": {"b": 1}}, ["a (nothing here, 1 entries there)"]),
        ({"m": [{"w": "x", "s": 1}]}, {"m": [{"w": "y", "s": 1}]}, ["m[0].w (x here, y there)"]),
        ({"shape": [2, 16]}, {"shape": [2, 32]}, ["shape ([2, 16] here, [2, 32] there)"]),
        ({"layers": [[1, 2]] * 4}, {"layers": [[1, 2]] * 6}, ["layers (4 entries here, 6 entries there)"]),
        (
            {"layers": [LAYER] * 3},
            {"layers": [OTHER_LAYER] * 3},
            [
                "layers[0][1][0] (torch.bfloat16 here, torch.float16 there) and 2 alike",
                "layers[0][1][1] ([2, 16, 8, 128] here, [2, 32, 8, 128] there) and 2 alike",
            ],
        ),
        ({"a": "x" * 99}, {"a": "\x1b[2J\n"}, [f"a ({'x' * 60}... here, \\x1b[2J\\n there)"]),
    ],
)
def test_what_differs_is_said_in_words(here, there, said):
    assert differences(here, there) == said


def test_facts_are_read_as_they_were_written():
    facts = {"a": [1, {"b": None}], "bytes": b"\0\1", "tuple": (1, 2), "odd": set}
    content = encode_facts(bytes(16), facts)
    assert json.loads(content)["namespace"] == "00" * 16
    assert decode_facts(content) == {
        "a": [1, {"b": None}], "bytes": "AAE=", "tuple": [1, 2], "odd": "<class 'set'>",
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"at most {MOST_BYTES} are written"):
        encode_facts(bytes(16), {"a": "x" * MOST_BYTES})


GARBAGE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b'{"facts": {}}',
    b'{"format": 2, "namespace": "", "facts": {}}',
    b'{"format": 1, "namespace": "", "facts": []}',
    b"[" * 60_000,
    b'{"format": 1, "namespace": "", "facts": {"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}}",
]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_what_is_none_is_not_read(content):
    assert decode_facts(content) is None


def test_facts_that_lie_deep_are_compared_as_a_whole():
    def deep(inner, depth):
        for _ in range(depth):
            inner = [inner]
        return inner

    assert differences({"a": deep(1, 900)}, {"a": deep(1, 900)}) == []
    assert len(differences({"a": deep(1, 900)}, {"a": deep(2, 900)})) == 1


def test_the_line_names_the_most_alike_and_of_these_the_latest():
    here = {"a": 1, "b": 1, "c": 1}
    assert why_empty(here, [], "x") == why_empty(here, [None], "x") == ""
    assert why_empty(here, [{**here, "a": 2}], "x") == (
        "starts empty; x was used with 1 other configuration before; it differs in: a (1 here, 2 there)"
    )
    others = [{"a": 2, "b": 2, "c": 1}, None, {**here, "b": 3}, {**here, "c": 4}]
    assert why_empty(here, others, "x") == (
        "starts empty; x was used with 3 other configurations before; "
        "the most alike differs in: b (1 here, 3 there)"
    )
    many = {str(n): n for n in range(9)}
    assert why_empty(many, [{}], "x").endswith("4 (4 here, nothing there), and 4 more")
    assert why_empty(here, [here], "x").endswith("in: nothing that is written about it")


def test_of_a_codec_only_a_digest_is_told():
    secret = b"a passphrase that somebody took for an identity"
    [[name, digest]] = codec_facts([("aes", secret)])
    assert (name, len(digest)) == ("aes", 16)
    assert codec_facts([("aes", secret + b"!")]) != [[name, digest]]


# in a rank's folder


@pytest.fixture
def held(tmp_path):
    folder = LocalDirectory(str(tmp_path / "kv"), "lmdb").hold(0)
    yield folder
    folder.release()


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO)

    def take():
        taken = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return taken

    return take


def keep(held, facts, room=ROOM, starts_empty=True):
    context = TierContext(make_namespace(facts), 4096, facts=facts)
    keep_facts(held, context, room, logging.getLogger("kvbm_lmdb"), starts_empty=starts_empty)
    return held.path / "namespaces" / f"{context.namespace.hex()}.json"


def aged(path, seconds):
    status = path.stat()
    os.utime(path, (status.st_atime, status.st_mtime - seconds))
    return path


def test_a_start_after_a_change_says_what_was_changed_and_one_like_the_last_nothing(held, lines):
    first = keep(held, {"tokens": 16, "dtype": "bf16"})
    assert json.loads(first.read_text())["facts"] == {"tokens": 16, "dtype": "bf16"}
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    keep(held, {"tokens": 16, "dtype": "bf16"})
    assert lines() == []
    aged(first, 60)
    aged(keep(held, {"tokens": 32, "dtype": "bf16"}), 30)
    assert lines() == [
        (
            "INFO",
            f"starts empty; {held.path} was used with 1 other configuration before; "
            "it differs in: tokens (32 here, 16 there)",
        )
    ]
    keep(held, {"tokens": 16, "dtype": "bf16"})
    [(_, back)] = lines()
    assert back.endswith("tokens (16 here, 32 there)")


def test_a_start_that_finds_objects_says_nothing_and_one_without_facts_does_nothing(held, lines):
    keep(held, {})
    assert not (held.path / "namespaces").exists()
    aged(keep(held, {"tokens": 16}), 60)
    keep(held, {"tokens": 32}, starts_empty=False)
    assert lines() == []


def test_the_latest_64_are_kept(held):
    for n in range(80):
        aged(keep(held, {"n": n}), 1000 - n)
    left = sorted((held.path / "namespaces").iterdir())
    assert len(left) == 64
    assert sorted(json.loads(each.read_text())["facts"]["n"] for each in left) == list(range(16, 80))


def test_they_take_no_more_than_their_room(held, lines):
    room = room_bytes(8 << 20)
    assert room == 32 << 10
    for n in range(20):
        aged(keep(held, {"n": n, "long": "x" * 7000}, room), 1000 - n)
        folder = held.path / "namespaces"
        assert sum(each.stat().st_blocks * 512 for each in (folder, *folder.iterdir())) <= room
    assert len(list(folder.iterdir())) == 3
    lines()
    keep(held, {"long": "y" * 40_000}, room)
    [_, (level, said)] = lines()
    assert level == "WARNING"
    assert "cannot be written (the capacity is too small for them)" in said
    assert len(list(folder.iterdir())) == 3


def test_damage_is_passed_over(held, lines, tmp_path):
    own = keep(held, {"tokens": 16})
    folder = own.parent
    for n, content in enumerate(GARBAGE):
        (folder / f"{n:032x}.json").write_bytes(content)
    (folder / f"{99:032x}.json").mkdir()
    os.mkfifo(folder / f"{98:032x}.json")
    precious = tmp_path / "precious.json"
    precious.write_bytes(encode_facts(bytes(16), {"tokens": "secret"}))
    (folder / f"{97:032x}.json").symlink_to(precious)
    os.link(precious, folder / f"{96:032x}.json")
    (folder / "notes.txt").write_text("mine")
    lines()
    keep(held, {"tokens": 32})
    [(_, said)] = lines()
    assert said.endswith("with 1 other configuration before; it differs in: tokens (32 here, 16 there)")
    assert (folder / "notes.txt").read_text() == "mine"
    assert decode_facts(precious.read_bytes()) == {"tokens": "secret"}


def test_own_facts_that_are_damaged_or_a_link_are_written_anew(held, tmp_path):
    own, precious = keep(held, {"tokens": 16}), tmp_path / "precious"
    own.write_bytes(b"garbage")
    keep(held, {"tokens": 16})
    assert decode_facts(own.read_bytes()) == {"tokens": 16}
    precious.write_text("mine")
    own.unlink()
    own.symlink_to(precious)
    keep(held, {"tokens": 16})
    assert decode_facts(own.read_bytes()) == {"tokens": 16}
    assert not own.is_symlink()
    assert precious.read_text() == "mine"


def link(folder, elsewhere):
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)


def file(folder, _):
    folder.write_text("mine")


def somebody_else_s(folder, _):
    folder.mkdir()
    os.chown(folder, STRANGER, STRANGER)


@needs_root
@pytest.mark.parametrize("make", [link, file, somebody_else_s])
def test_a_folder_that_is_not_to_be_used_costs_a_line(held, lines, tmp_path, make):
    make(held.path / "namespaces", tmp_path / "elsewhere")
    keep(held, {"tokens": 16})
    [(level, said)] = lines()
    assert level == "WARNING"
    assert said.startswith(f"{held.path}/namespaces: the facts of this configuration cannot be written (")
    assert not (tmp_path / "elsewhere").exists() or not list((tmp_path / "elsewhere").iterdir())


def test_a_full_disk_costs_a_line_and_leaves_nothing_half_written(tmp_path, lines):
    with mounted(tmp_path / "disk", "size=64k"):
        held = LocalDirectory(str(tmp_path / "disk/kv"), "lmdb").hold(0)
        (tmp_path / "disk/filler").write_bytes(bytes(48 << 10))
        keep(held, {"long": "x" * 30_000})
        [(_, said)] = lines()
        assert "No space left on device" in said
        assert list((held.path / "namespaces").iterdir()) == []
        held.release()


def test_what_a_killed_engine_left_is_deleted(held):
    own = keep(held, {"tokens": 16})
    left, foreign = own.parent / f"{own.name}.tmp", own.parent / "notes.tmp"
    left.write_bytes(b'{"form')
    foreign.write_text("mine")
    keep(held, {"tokens": 16})
    assert sorted(own.parent.iterdir()) == sorted([own, foreign])


def test_the_folder_of_a_rank_that_is_gone_goes_with_its_facts(tmp_path):
    directory = LocalDirectory(str(tmp_path / "kv"), "lmdb")
    for rank, foreign in ((1, False), (2, True)):
        held = directory.hold(rank)
        own = keep(held, {"rank": rank})
        if foreign:
            (own.parent / "notes.txt").write_text("mine")
        held.release()
    directory.drop_other_ranks(0, 1, logging.getLogger("x"))
    assert not (tmp_path / "kv/rank1").exists()
    assert [each.name for each in (tmp_path / "kv/rank2").rglob("*")] == ["namespaces", "notes.txt"]


def test_what_they_take_counts_as_taken(held, tmp_path):
    held.release()
    directory = LocalDirectory(str(tmp_path / "kv"), "lmdb")

    def taken():
        with pytest.raises(TierOpenError) as caught:
            directory.check(1 << 60, "stored")
        return str(caught.value).partition("of which ")[2].partition(" are")[0]

    before = taken()
    held = directory.hold(0)
    keep(held, {"long": "x" * 30_000})
    held.release()
    assert (before, taken()) == ("4KiB", "40KiB")
