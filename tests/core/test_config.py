import io
import os
import subprocess
import sys
import traceback
from typing import Literal

import msgspec
import pytest

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
        ({"tiers": [CPU], "sparse_stores": "all"}, "sparse_stores: not one of boundaries, dense .got 'all'"),
        (
            {"tiers": [CPU], "sparse_stores_every_tokens": -1},
            "sparse_stores_every_tokens: -1; write tokens, like 2048, or 0",
        ),
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
    with pytest.raises(ConfigError, match=r"^here: missing key 'capacity': "):
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
    rich = pytest.importorskip("rich", reason="rich is not installed")
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


class Ranged(TierConfig, frozen=True):
    """Looks at its range itself, as backends do."""

    most: int

    def __post_init__(self):
        if self.most < 1:
            raise ConfigError(f"most: {self.most}; write 1 or more")


def test_a_range_that_a_backend_looks_at_names_the_tier():
    with pytest.raises(ConfigError, match=r"^tiers\[1\] \(toy\): most: 0; write 1 or more$"):
        convert({"most": 0}, Ranged, "tiers[1] (toy)")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "tiers: []\nload_deadline_s: 1\ntiers: []\n",
            "'tiers' is written twice, in lines 1 and 3; take one away",
        ),
        ("tiers:\n  - backend: cpu\n    capacity: 1\n    capacity: 2\n", "'capacity' .* lines 3 and 4"),
        ("tiers: [{backend: cpu, capacity: 1, capacity: 2}]", "'capacity' .* lines 1 and 1"),
        (
            "tiers:\n  - storage_options:\n      secret: S3CRET\n      secret: S3CRET\n",
            "'secret' .* lines 3 and 4",
        ),
    ],
)
def test_a_key_written_twice_is_named_with_both_lines(tmp_path, text, words):
    (tmp_path / "stack.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"stack\.yaml: key {words}") as caught:
        load_config(tmp_path / "stack.yaml")
    assert "S3CRET" not in "".join(traceback.format_exception(caught.value))


def test_a_merged_key_may_be_overridden(tmp_path):
    text = "tiers:\n  - &a {backend: cpu, capacity: 1GiB}\n  - {<<: *a, name: b, capacity: 2GiB}\n"
    (tmp_path / "stack.yaml").write_text(text)
    config = load_config(tmp_path / "stack.yaml")
    assert [tier.settings["capacity"] for tier in config.tiers] == ["1GiB", "2GiB"]


def test_a_path_below_home_without_a_home_says_so():
    """In a process of its own whose user has no entry in the password file."""
    program = (
        "import os; os.environ.pop('HOME', None); os.setuid(54321)\n"
        "from kvbm_core import ConfigError, load_config\n"
        "try: load_config('~/stack.yaml')\n"
        "except ConfigError as error: print(error)\n"
    )
    if os.getuid() != 0:
        pytest.skip("only root may become a user that is not known")
    done = subprocess.run(
        [sys.executable, "-c", "import kvbm_core\n" + program], capture_output=True, text=True, check=True
    )
    assert "configuration file ~/stack.yaml: HOME is not set" in done.stdout
    assert "write the whole path" in done.stdout


def test_a_variable_in_a_path_is_said_not_to_be_replaced():
    with pytest.raises(ConfigError, match=r"\$HOME/x: No such file or directory; variables are not replaced"):
        load_config("$HOME/x")


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


def test_codecs_and_policies_are_read_as_a_name_or_a_mapping():
    tier = {**CPU, "codecs": ["aes", {"name": "zstd", "element_bytes": 4}], "policy": "fifo"}
    entry = load_config({"tiers": [tier]}).tiers[0]
    assert [(part.name, part.settings) for part in entry.codecs] == [
        ("aes", {}),
        ("zstd", {"element_bytes": 4}),
    ]
    assert (entry.policy.name, entry.policy.settings) == ("fifo", {})
    assert entry.settings == {"capacity": "1GiB"}
    assert load_config({"tiers": [CPU]}).tiers[0].policy is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"codecs": "zstd"},
            r"tiers\[0\]: codecs: 'zstd'; write a list, .* like \[{name: zstd, element_bytes: 4}\]",
        ),
        ({"codecs": [3]}, r"codecs\[0\]: 3; write its name, or a mapping with a 'name'"),
        ({"codecs": [{"element_bytes": 4}]}, r"codecs\[0\]: a mapping; write its name"),
        ({"codecs": ["zstd", {"name": "zstd"}]}, r"codecs: 'zstd' is written twice; take one away"),
        ({"policy": ["fifo"]}, r"policy: a list of 1; write its name, .* like {name: fifo}"),
        ({"policy": None}, r"policy: None; write its name"),
    ],
)
def test_mistakes_in_codecs_and_policies_say_what_to_write(keys, words):
    with pytest.raises(ConfigError, match=words):
        load_config({"tiers": [{**CPU, **keys}]})


def test_what_a_codec_is_given_is_not_shown():
    tier = {**CPU, "codecs": [{"name": "aes", "password": "secret"}]}
    assert "secret" not in repr(load_config({"tiers": [tier]}))
