"""Claims of the page on security that no other test has: what shows of prompts, whoever holds the medium."""

import hashlib
import logging
import os

import pytest
from test_codecs_in_stacks import BLOCKS, CONTENT, KEYS, Life, crypt, lmdb, objects, remote

from kvbm_core import chain_keys, root_key

TOKENS = range(BLOCKS * 16)


def test_a_name_tells_who_guesses_the_prompt_and_with_a_secret_salt_tells_nothing(tmp_path):
    def names(salt):
        (tmp_path / f"{salt}").mkdir()
        keys = chain_keys(root_key(salt=salt), TOKENS, 16)
        with Life(remote(tmp_path / f"{salt}", crypt(tmp_path, "a"))) as life:
            life.stack.store(keys, range(BLOCKS))
            life.stack.wait()
        return {file.name for file in objects(tmp_path / f"{salt}")}

    guessed = {key.hex() for key in chain_keys(root_key(), TOKENS, 16)}
    assert names(None) == guessed
    assert not names(os.urandom(16).hex()) & guessed


def test_what_was_forgotten_is_still_on_the_disk(tmp_path):
    with Life(lmdb(tmp_path)) as life:
        life.store()
        life.stack.reset()
        life.stack.wait()
        assert life.served() == 0
    lies = (tmp_path / "kv" / "rank0" / "data.mdb").read_bytes()
    assert all(content[:1000] in lies for content in CONTENT)


@pytest.mark.parametrize("mode", ["encrypt", "sign"])
def test_no_line_of_the_log_has_content_or_a_secret(tmp_path, mode, caplog):
    """Whatever goes wrong: damage, another key, a store without a trailer, a wrong key file."""
    caplog.set_level(logging.DEBUG)
    tier = remote(tmp_path, crypt(tmp_path, "a", mode=mode))
    with Life(tier) as life:
        life.store()
    with Life(remote(tmp_path, crypt(tmp_path, "b", mode=mode))) as life:
        assert life.served() == 0
    for number, file in enumerate(objects(tmp_path)):
        sound = file.read_bytes()
        file.write_bytes([sound[:-1], sound[:100], b"x" * len(sound), CONTENT[0]][number % 4])
    with Life(tier) as life:
        assert life.served() == 0
    said = "\n".join(f"{record.getMessage()} {record.exc_info}" for record in caplog.records)
    assert "cannot be judged here" in said
    assert "cannot be decoded" in said
    secrets = [*KEYS, *((tmp_path / name).read_bytes() for name in "ab"), *(each[:32] for each in CONTENT)]
    for secret in secrets:
        for shown in (secret.hex(), repr(secret)[2:-1], hashlib.sha256(secret).hexdigest()):
            assert shown not in said
