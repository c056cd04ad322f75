"""Weights are named by all that makes them, and by a digest that cannot be made to collide."""

import logging
import re
import struct

import pytest
import xxhash
from blake3 import blake3

pytest.importorskip("vllm")
from kvbm_core import make_namespace
from kvbm_vllm import _weights
from kvbm_vllm._weights import digest_files, find_files, weights_digest


@pytest.fixture
def model(tmp_path):
    """Writes a model's files; gives its digest."""

    def write(folder="model", **contents):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        for name, content in contents.items():
            (place / name.replace("__", ".")).write_bytes(content)
        return weights_digest(str(place), None, None)

    return write


def colliding(length):
    """Make two contents of one XXH3-128.

    It adds each 8 bytes to one lane, and to another the product of their halves after an exclusive or with a
    constant. Where the lower half equals the constant the product is 0 whatever the upper half is; what is
    added to the upper half of one stripe is taken from that of the next.
    """
    # The first 16 bytes of XXH3's secret, which is public: for the first lane of two stripes.
    low = struct.unpack("<IIII", bytes.fromhex("b8fe6c3923a44bbe7c01812cf721ad1c"))[::2]
    made = []
    for first, second in ((1, 8), (3, 6)):
        content = bytearray(length)
        struct.pack_into("<II", content, 0, low[0], first)
        struct.pack_into("<II", content, 64, low[1], second)
        made.append(bytes(content))
    assert made[0] != made[1]
    assert xxhash.xxh3_128_digest(made[0]) == xxhash.xxh3_128_digest(made[1])
    return made


def test_contents_of_one_checksum_are_two_models(model):
    one, other = colliding(100_000)
    assert model("one", w__safetensors=one) != model("other", w__safetensors=other)
    assert make_namespace({"weights": one}) != make_namespace({"weights": other})


def test_one_changed_byte_anywhere_changes_the_digest(model):
    content = bytearray(1 << 20)
    before = model(m__safetensors=content)
    content[777_777] = 1
    assert model(m__safetensors=content) != before


def test_equal_weights_are_equal_wherever_they_lie(model):
    assert model("a", m__safetensors=b"w" * 1000) == model("b", m__safetensors=b"w" * 1000)


def test_the_digest_is_as_documented(tmp_path, monkeypatch):
    monkeypatch.setattr(_weights, "_PART_BYTES", 100)
    monkeypatch.setattr(_weights, "_READ_BYTES", 7)
    contents = {"a.safetensors": bytes(range(250)), "b.bin": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    whole = blake3()
    for name, content in contents.items():
        parts = [content[at : at + 100] for at in range(0, max(1, len(content)), 100)]
        whole.update(struct.pack("<Q", len(name)) + name.encode() + struct.pack("<QQ", 8, len(parts)))
        for part in parts:
            whole.update(blake3(part).digest())
    assert weights_digest(str(tmp_path), None, None) == f"blake3:{whole.hexdigest()}"


def test_contents_that_change_places_are_another_model(model, monkeypatch):
    """An engine reads a file for its name; and the same bytes may be cut into files in two ways."""
    one = model("one", consolidated__safetensors=b"x", model__safetensors=b"y")
    assert model("two", model__safetensors=b"x", other__safetensors=b"y") != one
    monkeypatch.setattr(_weights, "_PART_BYTES", 4)
    early = model("three", a__bin=b"1111", b__bin=b"22223333")
    assert model("four", a__bin=b"11112222", b__bin=b"3333") != early


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("modeling_mine.py", True),
        ("model.safetensors.index.json", True),
        ("preprocessor_config.json", True),
        ("hf_quant_config.json", True),
        ("tokenizer.json", False),
        ("generation_config.json", False),
        ("README.md", False),
    ],
)
def test_what_says_how_weights_are_read_counts_and_what_concerns_text_does_not(model, name, counts):
    plain = model(m__safetensors=b"w")
    one = model(m__safetensors=b"w", **{name.replace(".", "__"): b"1"})
    other = model(m__safetensors=b"w", **{name.replace(".", "__"): b"2"})
    assert len({plain, one, other}) == (3 if counts else 1)


def test_a_file_of_the_hubs_cache_is_named_by_its_sha256_and_one_named_by_a_sha1_is_read(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    for folder in (blobs, snapshot):
        folder.mkdir()
    (snapshot / "m.safetensors").symlink_to("../blobs/" + "a" * 64)
    (snapshot / "code.py").symlink_to("../blobs/" + "b" * 40)

    def digest(large, small):
        (blobs / ("a" * 64)).write_bytes(large)
        (blobs / ("b" * 40)).write_bytes(small)
        return weights_digest(str(snapshot), None, None)

    assert digest(b"1", b"1") == digest(b"2", b"1")
    assert digest(b"1", b"1") != digest(b"1", b"2")


def test_weights_that_cannot_be_found_are_never_shared(tmp_path):
    missing = str(tmp_path / "missing")
    (tmp_path / "code.py").write_bytes(b"no weights")
    assert find_files(missing) == find_files(str(tmp_path)) == {}
    assert weights_digest(missing, None, None) != weights_digest(missing, None, None)
    assert weights_digest(missing, None, "v1") == weights_digest(missing, None, "v1") == "id:v1"


def test_long_reading_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(_weights, "_PART_BYTES", 10**8)
    monkeypatch.setattr(_weights, "_PROGRESS_S", 0.0)
    for name in "ab":
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.truncate(15 * 10**7)
    with caplog.at_level(logging.INFO, "kvbm_vllm"):
        digest_files(find_files(str(tmp_path)), "the-model")
    said = [re.search(r"of the-model: ([\d.]+) of 0\.3 GB", line) for line in caplog.messages]
    assert [line and line[1] for line in said] == ["0.1", "0.1", "0.2", "0.3"]
