"""The codecs of this tree under a real engine: the same answers with other keys and with planted blocks."""

import pytest
from engines import (
    assert_restored,
    connector,
    drain,
    forget,
    generate,
    loaded,
    make_prompts,
    own_answers,
    restore,
)

pytestmark = pytest.mark.engine

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 2048,
    "extra": {"lookup_deadline_s": 30, "load_deadline_s": 60, "store_deadline_s": 60},
}


@pytest.fixture
def key_files(tmp_path):
    """Sources of the keys a and b."""
    for name in "ab":
        file = tmp_path / name
        file.write_bytes(name.encode() * 32)
        file.chmod(0o600)
    return {name: {"file": str(tmp_path / name)} for name in "ab"}


@pytest.fixture
def prompts():
    return [prompt for prompt in make_prompts(30, seed=7, longest=500) if len(prompt) > 100][:4]


def test_compressed_and_encrypted_blocks_are_restored_with_a_rotated_key(
    start, llama, tmp_path, key_files, prompts
):
    def stack(*names):
        codecs = [
            {"name": "zstd", "element_bytes": 4},
            {"name": "crypt", "keys": [key_files[n] for n in names]},
        ]
        disk = {"backend": "lmdb", "capacity": "64MiB", "path": f"{tmp_path}/kv", "codecs": codecs}
        return [{"backend": "cpu", "capacity": "64MiB"}, disk]

    llm = start(llama, stack("a"), **OPTIONS)
    own = own_answers(llm, prompts)
    drain(llm)
    assert connector(llm).counts["lmdb"].failed.total() == 0
    llm = start(llama, stack("b", "a"), **OPTIONS)
    assert_restored(prompts, own, restore(llm, prompts))
    assert loaded(llm)["lmdb"] > 0
    assert connector(llm).counts["lmdb"].failed.total() == 0


def test_a_store_that_signs_refuses_planted_blocks_and_another_key_and_the_answers_stay(
    start, llama, tmp_path, key_files, prompts
):
    def stack(name):
        codec = {"name": "crypt", "mode": "sign", "keys": [key_files[name]]}
        store = {"backend": "remote", "url": f"file://{tmp_path}/kv", "timeout_s": 30, "codecs": [codec]}
        return [{"backend": "cpu", "capacity": "64MiB"}, store]

    llm = start(llama, stack("a"), **OPTIONS)
    own = own_answers(llm, prompts)
    drain(llm)
    files = sorted(file for file in (tmp_path / "kv").rglob("*") if len(file.name) == 64)
    assert len(files) > len(prompts)
    # Another key: nothing is loaded from the store, and nothing deleted there.
    llm = start(llama, stack("b"), **OPTIONS)
    assert [generate(llm, [prompt])[0] for prompt in prompts] == own
    drain(llm)
    assert loaded(llm)["remote"] == 0
    assert all(file.exists() for file in files)
    # Every other block is another's bytes under its own trailer.
    contents = [file.read_bytes() for file in files]
    for at in range(0, len(files) - 1, 2):
        files[at].write_bytes(contents[at + 1][:-64] + contents[at][-64:])
    llm = start(llama, stack("a"), **OPTIONS)
    for prompt, answer in zip(prompts, own, strict=True):
        forget(llm)
        assert generate(llm, [prompt])[0] == answer
    drain(llm)
    assert loaded(llm)["remote"] > 0
    assert {reason for _, reason in connector(llm).counts["remote"].failed} == {"corrupt"}
