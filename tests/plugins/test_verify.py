"""`kvbm verify`: each planted fault is found, and nothing else; beside an engine there is no false alarm."""

import itertools
import mmap
import os
import random
import shutil
import threading

import pytest
import yaml
from planted_faults import (
    AT_ONCE,
    DURABLE,
    KEYS,
    NAMESPACE,
    OBJECT_BYTES,
    batches,
    contents_of,
    fill,
    listed,
    opened,
    payload,
    plant,
    tier,
)
from published import published

from kvbm_cli._app import run as kvbm
from kvbm_core.command import ExitCode
from kvbm_core.config import convert
from kvbm_core.layers import why_damaged
from kvbm_core.registry import Registry
from kvbm_lmdb._tree import Tree

OBJECTS = 400


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with 400 objects in each durable tier, to be copied."""
    folder = tmp_path_factory.mktemp("filled")
    for name in DURABLE:
        fill(tier(name, folder), KEYS[:OBJECTS])
    return folder


@pytest.fixture
def verify(capsys):
    def run(place, *arguments):
        capsys.readouterr()
        status = kvbm(["verify", str(place), "--json", *arguments])
        found = published("verify", capsys.readouterr().out)
        bad = found["damage"] or found["problems"] or any(part["not_judged"] for part in found["parts"])
        assert status == (ExitCode.MEND if bad else ExitCode.DONE)
        return found

    return run


def codecs_in(folder, name):
    """Settings of a tier with codecs; the key lies in the folder. A tier of slots is not compressed."""
    (folder / "key").write_bytes(os.urandom(32))
    (folder / "key").chmod(0o600)
    crypt = {"name": "crypt", "keys": [{"file": str(folder / "key")}]}
    return {"codecs": [crypt] if name == "gds" else ["zstd", crypt]}


# ---- faults, see `planted_faults`


@pytest.mark.parametrize(
    ("name", "codecs", "faults"),
    [
        *((name, False, 40) for name in DURABLE),
        ("remote", True, 40),
        *(
            pytest.param(name, codecs, 1000, marks=pytest.mark.soak)
            for name in DURABLE
            for codecs in (False, True)
        ),
    ],
)
def test_each_planted_fault_is_found_and_nothing_else(tmp_path, verify, name, faults, codecs):
    place = tier(name, tmp_path, **(codecs_in(tmp_path, name) if codecs else {}))
    file = tmp_path / "kvbm.yaml"
    file.write_text(yaml.safe_dump({"tiers": [place]}))
    count, rng = 2 * faults, random.Random(name)
    fill(place, KEYS[:count])
    assert verify(file)["damage"] == []
    objects = listed(name, tmp_path)
    assert len(objects) == count
    rng.shuffle(objects)
    wrong = plant(name, tmp_path, objects, faults, rng)
    found = verify(file)
    assert {each["key"] for each in found["damage"]} == {each.hex() for each in wrong}
    assert len(found["damage"]) == len(wrong)
    assert sum(part["objects"] for part in found["parts"]) == count
    assert not any(part["replaced"] for part in found["parts"])
    # Without what is damaged the rest is sound, and an engine has it.
    removed = verify(file, "--remove")
    assert all(each["removed"] != each["unread"] for each in removed["damage"])
    whole = [each.key for each in listed(name, tmp_path)]
    unread = {bytes.fromhex(each["key"]) for each in found["damage"] if each["unread"]}
    assert {*whole} & wrong == unread
    assert len(whole) == count - len(wrong) + len(unread)
    with opened(place) as stack:
        assert all(stack.load([key], [0]) for key in whole[:20] if key not in wrong)


def test_a_slab_that_was_cut_short(tmp_path, verify, filled):
    shutil.copytree(filled / "gds", tmp_path / "gds")
    objects = listed("gds", tmp_path)
    os.truncate(tmp_path / "gds/rank0/slab.000", 250 * 12288 + 4096)
    found = verify(tmp_path / "gds")
    assert {each["key"] for each in found["damage"]} == {
        each.key.hex() for each in objects if each.place[0] >= 250
    }
    assert {each["what"] for each in found["damage"]} == {
        "it is cut short: 4096 of 8288 bytes are there", "it is cut short: 0 of 8288 bytes are there",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "nbytes", "said"),
    [
        ("lmdb", "data.mdb", 40 * 4096, "an engine will put it aside"),
        ("lmdb", "data.mdb", 100, "its first pages are damaged"),
        ("gds", "index", 10, "its header is damaged"),
    ],
)
def test_a_place_that_is_damaged_as_a_whole(tmp_path, verify, filled, name, file, nbytes, said):
    shutil.copytree(filled / name, tmp_path / name)
    os.truncate(tmp_path / name / "rank0" / file, nbytes)
    assert said in verify(tmp_path / name)["problems"][0]


def test_a_damaged_page_of_lmdbs_index_is_a_problem(tmp_path, verify, filled):
    shutil.copytree(filled / "lmdb", tmp_path / "lmdb")
    file = tmp_path / "lmdb/rank0/data.mdb"
    with file.open("r+b") as content:
        tree = Tree(content.fileno(), b"index")
        kind, nodes = tree._nodes(tree._root)
        assert (kind, len(nodes) > 1) == (1, True), "a branch"
        content.seek(4096 * int.from_bytes(nodes[1][1][1], "little"))
        content.write(bytes(4096))
    assert "can be reached: it is damaged" in verify(tmp_path / "lmdb")["problems"][0]


@pytest.mark.parametrize("name", ["gds", "lmdb"])
def test_what_is_replaced_meanwhile_is_no_damage(tmp_path, name):
    place = tier(name, tmp_path, "1MiB")
    with opened(place) as stack:
        stack.store(KEYS[:AT_ONCE], list(range(AT_ONCE)))
        stack.wait()
        part = contents_of(name, tmp_path)
        before = {each.key: each for each in part.objects()}
        assert before
        for batch in batches(KEYS[AT_ONCE : 8 * AT_ONCE]):
            stack.store(batch, list(range(len(batch))))
            stack.wait()
        now = {each.key for each in part.objects()}
        gone = [each for name_, each in before.items() if name_ not in now]
        assert gone
        buffer = memoryview(mmap.mmap(-1, 65536))
        assert any(why_damaged(part.read(each, buffer), each.key, NAMESPACE) for each in gone)
        assert not any(part.is_there(each) for each in gone)
        part.close()


@pytest.mark.parametrize("name", DURABLE)
def test_beside_an_engine_there_is_no_false_alarm(tmp_path, verify, name):
    """Its tier holds a fraction of what it stores, so nearly each store evicts."""
    end, stored = threading.Event(), []
    with opened(tier(name, tmp_path, "2MiB")) as stack:

        def serve():
            for turn in itertools.count():
                batch = [KEYS[(turn * AT_ONCE + at) % len(KEYS)] for at in range(AT_ONCE)]
                stack.store(batch, list(range(AT_ONCE)))
                stack.wait()
                stored.append(len(batch))
                if end.is_set():
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            while len(stored) < 2:
                end.wait(0.01)
            found = [verify(tmp_path / name) for _ in range(3)]
        finally:
            end.set()
            thread.join()
    assert [each["damage"] + each["problems"] for each in found] == [[]] * 3
    assert sum(part["objects"] for each in found for part in each["parts"]) > 0
    if name != "remote":
        assert {tuple(each["held_by"]) for each in found} == {(str(os.getpid()),)}


@pytest.mark.parametrize("name", ["gds", "lmdb"])
def test_beside_an_engine_damage_is_found_and_not_removed(tmp_path, verify, name):
    with opened(tier(name, tmp_path)) as stack:
        stack.store(KEYS[:AT_ONCE], list(range(AT_ONCE)))
        stack.wait()
        hit = listed(name, tmp_path)[7]
        payload(name, tmp_path, hit, None, random.Random(1))
        found = verify(tmp_path / name, "--remove")
        [damage] = found["damage"]
        assert (damage["key"], damage["removed"]) == (hit.key.hex(), False)
        assert damage["what"] == "its checksum does not fit"
        assert found["problems"] == [
            f"{tmp_path}/{name}/rank0: nothing is removed, as pid {os.getpid()} uses it"
        ]


def test_an_object_store(s3_server, monkeypatch, verify):
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    url, option = f"s3://{s3_server.bucket}/verified", {"endpoint_url": s3_server.endpoint}
    fill({"backend": "remote", "url": url, "storage_options": option}, KEYS[:8])
    arguments = ["--option", f"endpoint_url={s3_server.endpoint}"]
    assert verify(url, *arguments)["damage"] == []
    backend = Registry().backend("remote")
    [part] = backend.contents(convert({"url": url, "storage_options": option}, backend.config_type, "remote"))
    hit, other, *_ = part.objects()
    content = bytes(part.read(other, memoryview(bytearray(OBJECT_BYTES))))
    part._run(part._store.put(hit.place.path, content, overwrite=True))
    part.close()
    [damage] = verify(url, "--remove", *arguments)["damage"]
    assert (damage["key"], damage["removed"]) == (hit.key.hex(), True)
    assert damage["what"] == f"its seal is of key {other.key.hex()}"
    found = verify(url, *arguments)
    assert (found["damage"], found["parts"][0]["objects"]) == ([], 7)


# ---- codecs, and what cannot be judged


@pytest.mark.parametrize("name", ["lmdb", "remote"])
def test_through_codecs(tmp_path, verify, name):
    entry_ = tier(name, tmp_path, **codecs_in(tmp_path, name))
    fill(entry_, KEYS[:AT_ONCE])
    file = tmp_path / "kvbm.yaml"
    file.write_text(yaml.safe_dump({"tiers": [entry_]}))
    assert verify(file)["damage"] == []
    objects = listed(name, tmp_path)
    hit, _ = objects[3], payload(name, tmp_path, objects[3], None, random.Random(1))
    [damage] = verify(file)["damage"]
    assert damage["key"] == hit.key.hex()
    assert damage["what"].startswith("it cannot be decoded: ")
    # Of the place alone it is not known how.
    found = verify(tmp_path / name)
    assert found["damage"] == []
    assert "give the configuration" in found["parts"][0]["not_judged"]


@pytest.mark.parametrize("name", DURABLE)
def test_objects_without_seals_are_not_called_damaged(tmp_path, verify, name):
    fill(tier(name, tmp_path, checked=False), KEYS[:8])
    found = verify(tmp_path / name, "--remove")
    assert found["damage"] == []
    assert "not one object has a seal" in found["parts"][0]["not_judged"]
    assert len(listed(name, tmp_path)) == 8


# ---- options, and for people


def test_a_namespace_and_a_limit(verify, filled):
    assert verify(filled / "gds", "--limit", "5")["parts"][0]["objects"] == 5
    digits = NAMESPACE.hex()[:4].upper()
    assert verify(filled / "gds", "--namespace", digits)["parts"][0]["objects"] == OBJECTS
    assert verify(filled / "gds", "--namespace", "zz")["parts"] == []


def test_the_table_for_people(tmp_path, capsys, monkeypatch, filled):
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(filled / "gds", tmp_path / "gds")
    hit = listed("gds", tmp_path)[0]
    payload("gds", tmp_path, hit, None, random.Random(1))
    assert kvbm(["verify", str(tmp_path / "gds")]) == ExitCode.MEND
    shown = capsys.readouterr().out
    assert f"damaged: {tmp_path}/gds/rank0, key {hit.key.hex()[:16]}: its checksum does not fit" in shown
    assert NAMESPACE.hex()[:12] in shown


@pytest.mark.parametrize(
    ("place", "status"), [("/no/such", ExitCode.WRONG), ("ess3://bucket", ExitCode.UNUSABLE)]
)
def test_what_cannot_be_verified_is_said(capsys, place, status):
    assert kvbm(["verify", place]) == status
    assert capsys.readouterr().err
