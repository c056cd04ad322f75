"""Keys name tokens and all else that a block's KV depends on, alike in every process."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from kvbm_core.groups import Coverage, KvGroup, Rule
from kvbm_vllm._keys import cacheable, request_keys
from kvbm_vllm._weights import AdapterDigests


def request(tokens, lora=None, salt=None, features=()):
    return SimpleNamespace(
        all_token_ids=tokens, lora_request=lora, cache_salt=salt, mm_features=features, prompt_embeds=None
    )


def keys(*args, **kwargs):
    return request_keys(request(*args, **kwargs), ONE, AdapterDigests()).slice(0, 2)


def image(name, offset, length=3):
    return SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=offset, length=length))


def lora(name, path):
    return SimpleNamespace(lora_name=name, lora_int_id=1, lora_path=str(path))


TOKENS = [5, 6, 7, 8, 9, 10, 11, 12]
ONE = (KvGroup(4),)


def test_keys_are_the_same_in_every_process():
    program = (
        "from types import SimpleNamespace as N; from kvbm_vllm._keys import request_keys; "
        "from kvbm_core.groups import KvGroup; "
        "from kvbm_vllm._weights import AdapterDigests; "
        f"r = N(all_token_ids={TOKENS}, lora_request=None, cache_salt='s', mm_features=()); "
        "print(request_keys(r, (KvGroup(4),), AdapterDigests()).slice(0, 2)[1].hex())"
    )
    # This process has another seed.
    seen = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    ).stdout.strip()  # fmt: skip
    assert seen == keys(TOKENS, salt="s")[1].hex()


def test_groups_share_digests_and_never_keys():
    groups = (
        KvGroup(4),
        KvGroup(2, Coverage(Rule.WINDOW, 3), b"wind"),
        KvGroup(8, Coverage(Rule.STATE), b"stat"),
    )
    made = request_keys(request(TOKENS), groups, AdapterDigests())
    window, state, whole = made.slice(0, 4, 1), made.slice(0, 1, 2), made.slice(0, 2)
    assert [key[28:] for key in [*window, *state]] == [b"wind"] * 4 + [b"stat"]
    # What ends at the same token has the same digest, whatever the length of its block.
    assert [window[1][:28], window[3][:28]] == [key[:28] for key in whole]
    assert state[0][:28] == whole[1][:28]
    assert all(key in made for key in [*window, *state, *whole])
    assert bytes(32) not in made


def test_keys_of_groups_made_as_tokens_come_equal_keys_made_at_once():
    groups = (KvGroup(4), KvGroup(2, tag=b"wind"))
    tokens = TOKENS[:2]
    growing = request_keys(request(tokens), groups, AdapterDigests())
    growing.slice(0, 1, 1)
    for token in TOKENS[2:]:
        tokens.append(token)
        growing.slice(0, len(tokens) // 2, 1)
    at_once = request_keys(request(TOKENS), groups, AdapterDigests())
    for group, count in ((0, 2), (1, 4)):
        assert growing.slice(0, count, group) == at_once.slice(0, count, group)


def test_keys_made_as_tokens_come_equal_keys_made_at_once():
    tokens = TOKENS[:5]
    growing = request_keys(request(tokens), ONE, AdapterDigests())
    first = growing.slice(0, 1)
    tokens += TOKENS[5:]
    assert growing.slice(0, 2) == [*first, keys(TOKENS)[1]] == keys(TOKENS)


def test_salt_adapter_and_image_change_every_key_after_them(tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b"weights")
    plain = keys(TOKENS)
    salted = keys(TOKENS, salt="x")
    adapted = keys(TOKENS, lora=lora("x", tmp_path))
    seen = [
        plain,
        salted,
        adapted,
        keys(TOKENS, features=[image("a", 1)]),
        keys(TOKENS, features=[image("b", 1)]),
    ]
    seen.append(keys(TOKENS, features=[image("a", 0)]))
    assert len({block for pair in seen for block in pair}) == 2 * len(seen)


def test_an_image_in_the_second_block_leaves_the_first_key_alone():
    with_image, plain = keys(TOKENS, features=[image("a", 5, 2)]), keys(TOKENS)
    assert with_image[0] == plain[0]
    assert with_image[1] != plain[1]


def test_an_adapter_is_named_by_its_weights(tmp_path):
    for folder, content in (("one", b"1"), ("copy", b"1"), ("two", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter.safetensors").write_bytes(content)
    one, copy, two = (keys(TOKENS, lora=lora("x", tmp_path / name)) for name in ("one", "copy", "two"))
    assert one == copy
    assert one != two


def test_requests_whose_tokens_say_nothing_are_left_alone():
    assert cacheable(request(TOKENS))
    embeds = request(TOKENS)
    embeds.prompt_embeds = object()
    assert not cacheable(embeds)
    session = request(TOKENS)
    session.resumable = True
    assert not cacheable(session)
