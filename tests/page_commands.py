"""How the commands of the documentation are checked: each by the parser of the program that it starts."""

import importlib.util
import itertools
import json
import re
import tomllib
from functools import cache
from pathlib import Path

import typer
import yaml
from pages import ROOT, commands

from kvbm_cli._app import app
from kvbm_cli.check._source import read_source
from kvbm_cli.clear._commands import _age
from kvbm_core import Registry, load_config
from kvbm_core.config import convert, parse_size
from kvbm_etcd import EtcdConfig
from kvbm_metrics import HINTS
from kvbm_replay._sizes import read_blocks
from kvbm_replay.generators import generate

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def check_stack(config):
    """All that `kvbm check` reads before it opens a tier."""
    registry = Registry()
    for entry in config.tiers:
        convert(entry.settings, registry.backend(entry.backend).config_type, entry.name)
        for part in entry.codecs:
            convert(part.settings, registry.codec(part.name).config_type, part.name)
    registry.policies(config)
    if config.coordinator is not None:
        settings = {**config.coordinator}
        assert settings.pop("backend") == "etcd"
        convert(settings, EtcdConfig, "coordinator")


def check_hints(value):
    assert value["kv_transfer_params"]["kvbm"].keys() <= set(HINTS)


def check_shell(lines):
    """Check each command, in a folder that has what they name."""
    for words in commands(lines):
        check_command(words)


def check_command(words):
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if not words:
        return
    name = words[0].removeprefix(".venv/bin/").replace("python3", "python")
    assert name in PROGRAMS or name in FOREIGN, f"{words[0]}: no rule says how to check this program"
    for option, value in itertools.pairwise(words):
        if option == "--kv-transfer-config":
            check_transfer_config(value)
    PROGRAMS.get(name, lambda *_: None)(words[1:])


def check_transfer_config(value):
    """The connector's own reader takes it, a file it names included."""
    value = value.replace("/etc/kvbm/kvbm.yaml", "kvbm.yaml")
    names_dynamo = "DynamoConnector" in value
    environ = {"DYN_KVBM_CPU_CACHE_GB": "4"} if names_dynamo else {}
    assert ("tiers" in value or "config" in value.replace('config": {', "")) != names_dynamo
    config, _ = read_source(value, environ, lambda: 1 << 20, 1)
    check_stack(config)


def kvbm(words):
    """The program's own parser takes it; of texts that the verb parses, the verb's parser."""
    command, context, path = typer.main.get_command(app), None, []
    while hasattr(command, "commands"):
        context = command.make_context("kvbm", list(words), parent=context)
        words = [*context._protected_args, *context.args]
        if not words and command.invoke_without_command:
            return
        name, command, words = command.resolve_command(context, words)
        path.append(name)
    try:
        context = command.make_context(path[-1], list(words), parent=context)
    except typer.Exit:
        assert "--help" in words
        return
    for word, value in itertools.pairwise(words):
        TEXTS.get((path[0], word), TEXTS.get(word, str))(value)


def stack_text(value):
    if value.lstrip().startswith("{"):
        load_config(yaml.safe_load(value))


TEXTS = {
    "--stack": stack_text,
    "--generate": generate,
    "--capacity": lambda value: read_blocks("--capacity", value, 16, 1 << 20, 1000),
    "--older-than": _age,
    **dict.fromkeys(
        ("--down-to", "--block-bytes", "--max-bytes", "--cpu-capacity", "--lmdb-capacity"), parse_size
    ),
}
"""By option, or by verb and option: what parses its text behind the command line."""


def make(words):
    """The target exists, and what it runs with ``ARGS`` takes them."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        if word.startswith("ARGS="):
            continue
        if "=" in word:
            assert re.search(rf"\b{word.split('=')[0]} *\??=", makefile), word
            continue
        recipe = re.search(rf"^{word}:(?! ?\w+ =).*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        assert recipe, f"make has no {word}"
    for word in words:
        if word.startswith("ARGS="):
            [line] = [each for each in recipe[1].splitlines() if "$(ARGS)" in each]
            line = re.sub(r"\$\(\w+\)/bin/", ".venv/bin/", line).replace("$(PYTHON)", "python")
            line = line.replace("$(BIN)", ".venv/bin").strip("\t@")
            check_shell(line.replace("$(ARGS)", word.removeprefix("ARGS=")))


def run_python(words):
    """The module or the script is there, and has these options."""
    if words[0] == "-m":
        module, *arguments = words[1:]
        if module.startswith("vllm."):
            vllm(["serve", *arguments])
        elif module == "pytest":
            pytest_options(arguments)
        else:
            assert not module.startswith("kvbm_"), f"python -m {module}: write the verb of `kvbm`"
            assert importlib.util.find_spec(module), module
        return
    script, *arguments = words
    if script == "tools/run_tests.py":
        pytest_options(arguments)
        return
    source = (ROOT / script).read_text()
    for option in arguments:
        assert not option.startswith("--") or f'"{option}"' in source, f"{script} has no {option}"


def pytest_options(words):
    """Files and markers are there."""
    for option, value in zip(["", *words], words, strict=False):
        if option == "-m":
            names = {marker.split(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
            assert set(re.findall(r"\w+", value)) - {"not", "and", "or"} <= names
        elif value.startswith("tests/"):
            assert (ROOT / value.split("::")[0]).exists(), value


def vllm(words):
    """Options are in vLLM's sources. Its parser itself takes ten seconds to import."""
    assert words[0] == "serve"
    for word in words:
        if word.startswith("--"):
            field = word.removeprefix("--").replace("-", "_")
            assert re.search(rf'^    {field}: |"{word}"', vllm_options(), re.MULTILINE), f"vLLM has no {word}"


@cache
def vllm_folder():
    return Path(importlib.util.find_spec("vllm").origin).parent


@cache
def vllm_options():
    entrypoints = vllm_folder() / "entrypoints"
    files = [
        vllm_folder() / "engine" / "arg_utils.py",
        *entrypoints.rglob("cli_args.py"),
        *entrypoints.glob("cli/*.py"),
    ]
    return "".join(file.read_text() for file in files)


def pip(words):
    """The extras are those of the project."""
    for word in words:
        if extras := re.search(r"\[([\w,]+)\]", word):
            assert set(extras[1].split(",")) <= PROJECT["project"]["optional-dependencies"].keys(), word


def curl(words):
    for option, value in itertools.pairwise(words):
        if option == "-d" and not value.startswith("@"):
            check_hints(json.loads(value))


PROGRAMS = {
    "kvbm": kvbm,
    "make": make,
    "python": run_python,
    "pytest": pytest_options,
    "pip": pip,
    "curl": curl,
    "vllm": vllm,
}
FOREIGN = {
    "cd", "diff", "dmesg", "docker", "etcdctl", "export", "git", "grep", "head", "install", "kubectl",
    "ls", "openssl", "twine",
}  # fmt: skip
"""Programs of others, which nothing here can check."""
