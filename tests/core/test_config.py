import io
import traceback
from typing import Literal

import msgspec
import pytest
import rich

from kvbm_core import ConfigError, TierConfig, load_config
from kvbm_core.config import convert, parse_size
from kvbm_core.memory import MemoryConfig

CPU = {"backend": "cpu", "capacity": "1GiB"}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5KiB", 1536), (42, 42), ("42", 42), (" 1 TiB ", 1 << 40)],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("value", ["8gib", "GiB", "-1GiB", "8 GiB x", "", None, True, -1, 1.5])
def test_what_is_not_a_size_is_named_with_what_to_write(value):
    with pytest.raises(ConfigError, match=r"capacity.*like 8GiB"):
        parse_size(value, "capacity")


def test_a_file_and_its_mapping_are_the_same(tmp_path):
    file = tmp_path / "stack.yaml"
    file.write_text("tiers:\n  - {backend: cpu, capacity: 1GiB}\nload_deadline_s: 3\nstaging: 1MiB\n")
    assert load_config(file) == load_config({"tiers": [CPU], "load_deadline_s": 3, "staging": "1MiB"})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "tiers: None; write a list"),
        ({"tiers": CPU}, "write a list of at least one tier"),
        ({"tiers": [{"capacity": 1}]}, r"tiers\[0\].*'backend'"),
        ({"tiers": ["cpu"]}, r"tiers\[0\]: a str; write a mapping"),
        ({"tier": [CPU]}, "unknown key 'tier'; did you mean 'tiers'"),
        ({"tiers": [CPU], "nonsense": 1}, "unknown key 'nonsense'; known keys: .*load_deadline_s"),
        ({"tiers": [CPU, CPU]}, "two tiers are called 'cpu'; give each a 'name'"),
        ({"tiers": [{**CPU, "checked": "yes"}]}, "checked: 'yes'; write true or false"),
        ({"tiers": [CPU], "load_deadline_s": 0}, "load_deadline_s: 0.0; write seconds above 0"),
        ({"tiers": [CPU], "store_deadline_s": float("inf")}, "store_deadline_s: inf"),
        (
            {"tiers": [CPU], "max_load_fraction": 1.5},
            "max_load_fraction: 1.5; write a number above 0, at most 1",
        ),
        ({"tiers": [CPU], "max_store_blocks": 0}, "max_store_blocks: 0; write at least 1"),
        ({"tiers": [CPU], "load_deadline_s": "soon"}, "load_deadline_s: .*'soon'"),
        ({"tiers": [CPU], "staging": "big"}, "staging: 'big' is not a size"),
    ],
)
def test_mistakes_name_the_key_the_value_and_what_to_write(config, words):
    with pytest.raises(ConfigError, match=words):
        load_config(config)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing.yaml: No such file"):
        load_config(tmp_path / "missing.yaml")
    for text, words in (("tiers: [", "is not YAML"), ("- a", "expected keys like 'tiers:'")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_config(tmp_path / "bad.yaml")


def test_a_backends_own_settings_are_strict():
    assert convert({"capacity": "1KiB"}, MemoryConfig, "tiers[0] (memory)").capacity == 1024
    with pytest.raises(
        ConfigError, match=r"tiers\[0\] \(memory\): unknown key 'capcity'; did you mean 'capacity'"
    ):
        convert({"capcity": 1}, MemoryConfig, "tiers[0] (memory)")
    with pytest.raises(ConfigError, match="capacity"):
        convert({}, MemoryConfig, "here")
    with pytest.raises(ConfigError, match=r"here: capacity: 'x' is not a size"):
        convert({"capacity": "x"}, MemoryConfig, "here")


@pytest.mark.parametrize(
    "text",
    [
        "tiers: {backend: cpu, secret: S3CRET}",
        "tiers:\n  - {name: remote, secret: S3CRET}",
        "- {secret: S3CRET}",
        "tiers:\n  - {backend: cpu, capacity: 1GiB}\n    secret: S3CRET: x",
        "tiers:\n  - {backend: cpu, secret: *S3CRET}",
        "tiers:\n  - {backend: cpu, secret: !S3CRET}",
        "tiers: [{backend: cpu}]\nstaging: {secret: S3CRET}",
        "tiers: [{backend: cpu}]\nstaging: [S3CRET]",
    ],
)
def test_a_mistake_shows_no_password_from_elsewhere(tmp_path, text):
    (tmp_path / "stack.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "stack.yaml")
    assert "S3CRET" not in "".join(traceback.format_exception(caught.value))


SECRET = "S3CRET"
REMOTE = {
    "backend": "remote",
    "url": f"s3://you:{SECRET}@host/x",
    "storage_options": {"secret": SECRET, "client_kwargs": {"config": [SECRET]}},
}


class Sensitive(TierConfig, frozen=True):
    """Has a secret in every kind of key that a stranger's backend may have."""

    password: str = ""
    options: dict[str, str] = msgspec.field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    mode: Literal["fast", "safe"] = "fast"
    most: int | None = None
    ports: dict[str, int] = msgspec.field(default_factory=dict)


def printed(value):
    rich.print(value, file=(text := io.StringIO()))
    return text.getvalue()


def test_no_secret_is_in_what_a_configuration_prints():
    config = load_config(
        {"tiers": [CPU, REMOTE], "coordinator": {"backend": "etcd", "password": SECRET}, "weights_id": SECRET}
    )
    own = Sensitive(password=SECRET, options={"a": SECRET}, hosts=(SECRET,), most=3)
    for value in (config, config.tiers[1], own):
        assert SECRET not in repr(value) + str(value) + printed(value)
    assert "storage_options" in repr(config)
    assert "password" in repr(config)
    assert "most=3" in repr(own)
    assert "load_deadline_s=5.0" in repr(config)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"password": 76543}, "here: password: .*got a int"),
        ({"password": [SECRET]}, "here: password: .*got a list"),
        ({"password": {SECRET: SECRET}}, "here: password: .*got a dict"),
        ({"options": SECRET}, "here: options: .*got a str"),
        ({"options": {"key": 76543}}, r"here: options\[\.\.\.\]: Expected `str`, got `int`$"),
        ({"hosts": [76543]}, r"here: hosts\[0\]: Expected `str`, got `int`$"),
        ({"ports": {"a": SECRET}}, r"here: ports\[\.\.\.\]: Expected `int`, got `str`$"),
        ({"mode": f"s3://you:{SECRET}@host"}, r"here: mode: not one of fast, safe \(got a str\)$"),
        ({"mode": "fats"}, r"here: mode: not one of fast, safe \(got 'fats'\)$"),
        ({"most": [SECRET]}, "here: most: .*got a list of 1"),
        ({"most": f"https://you:{SECRET}@host"}, "here: most: .*got a str"),
        ({"pasword": SECRET}, "unknown key 'pasword'; did you mean 'password'"),
    ],
)
def test_a_wrong_value_that_may_be_a_secret_is_told_by_its_type(wrong, words):
    with pytest.raises(ConfigError, match=words) as caught:
        convert(wrong, Sensitive, "here")
    told = "".join(traceback.format_exception(caught.value))
    assert SECRET not in told
    assert "76543" not in told


@pytest.mark.parametrize(
    "config",
    [
        {"tiers": [f"s3://you:{SECRET}@host"]},
        {"tiers": f"s3://you:{SECRET}@host"},
        {"tiers": [{**CPU, "name": {"secret": SECRET}}]},
        {"tiers": [{**CPU, "checked": {"secret": SECRET}}]},
        {"tiers": [{**CPU, "checked": [SECRET]}]},
        {"tiers": [CPU], "coordinator": f"http://you:{SECRET}@host:2379"},
        {"tiers": [CPU], "staging": f"http://you:{SECRET}@host:2379"},
        {"tiers": [CPU], "weights_id": [SECRET]},
        {"tiers": [{"backend": {"secret": SECRET}}]},
    ],
)
def test_a_secret_in_the_wrong_place_is_not_told(config):
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00\x80 tiers")
    with pytest.raises(ConfigError, match=r"model\.bin is not YAML"):
        load_config(tmp_path / "model.bin")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_defaults_and_names():
    config = load_config({"tiers": [CPU, {"backend": "cpu", "name": "second", "checked": True}]})
    assert [(t.name, t.checked) for t in config.tiers] == [("cpu", None), ("second", True)]
    assert config.tiers[0].settings == {"capacity": "1GiB"}
    assert (config.load_deadline_s, config.store_deadline_s, config.max_store_blocks) == (5.0, 30.0, 512)


@pytest.mark.parametrize("value", [float("nan"), -1])
def test_seconds_that_are_none_are_refused(value):
    with pytest.raises(ConfigError, match=r"load_deadline_s: .*write seconds above 0"):
        load_config({"tiers": [CPU], "load_deadline_s": value})
