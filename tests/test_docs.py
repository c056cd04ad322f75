"""The documentation agrees with the code: names, defaults, offsets, links, and code that runs."""

import ast
import ctypes
import dataclasses
import enum
import hashlib
import importlib
import importlib.util
import re
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest
import xxhash
import yaml
from pages import DOCS, FENCE, PAGES, READMES, REFERENCE, ROOT, blocks, name_of

import kvbm_admission
import kvbm_core
import kvbm_eviction
from kvbm_cli.top._answer import _FAULTS
from kvbm_core import errors, hookspecs, load_config, testing
from kvbm_core.config import ByteSize, StackConfig, TierEntry, parse_size
from kvbm_core.layers import SEAL_BYTES, SealTier
from kvbm_core.memory import MemoryConfig, MemoryTier
from kvbm_core.policies import kvbm_policies
from kvbm_core.testing import codec_suite, coordinator_suite, policy_suite, suite
from kvbm_core.testing._room import MOST_OBJECTS
from kvbm_core.testing._whole import members_of
from kvbm_core.tier import Op, Outcome, Region, TierContext, Transfer
from kvbm_cpu import CpuConfig
from kvbm_crypt import CryptConfig
from kvbm_etcd import EtcdConfig
from kvbm_gds import GdsConfig
from kvbm_lmdb import LmdbConfig
from kvbm_metrics import METRICS
from kvbm_remote import RemoteConfig
from kvbm_vllm._stats import PREFIX
from kvbm_zstd import ZstdConfig

sys.path.insert(0, str(ROOT / "tools"))
make_reference = importlib.import_module("make_reference")

TIER_TYPES = {
    "memory": MemoryConfig,
    "cpu": CpuConfig,
    "gds": GdsConfig,
    "lmdb": LmdbConfig,
    "remote": RemoteConfig,
}

CODEC_TYPES = {"crypt": CryptConfig, "zstd": ZstdConfig}

COORDINATOR_TYPES = {"etcd": EtcdConfig}


def section(page, title):
    """The text under a heading, up to the next one of the same or a higher level."""
    text = page.read_text()
    match = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert match, f"{name_of(page)} has no heading {title!r}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text):
    """The cells of each table row, without the headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rules = [at for at, row in enumerate(cells) if set("".join(row)) <= set("-: ")]
    return [row for at, row in enumerate(cells) if at not in rules and at + 1 not in rules]


def table(page, title):
    """First cell, unquoted and without arguments, to the whole row."""
    return {row[0].strip("`").split("(")[0]: row for row in rows(section(page, title))}


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Links.


@pytest.mark.parametrize("page", PAGES + READMES, ids=name_of)
def test_every_relative_link_points_to_something(page):
    prose = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)} links to {target}"


def test_the_index_names_every_page():
    linked = re.findall(r"\]\(([^)#\s]+)\)", (DOCS / "README.md").read_text())
    found = {(DOCS / target).resolve() for target in linked}
    assert [
        name_of(page) for page in DOCS.rglob("*.md") if page != DOCS / "README.md" and page not in found
    ] == []


# Configuration.

CONFIGURATION = [("The stack", StackConfig)]
CONFIGURATION += [(f"Backend `{name}`", config) for name, config in TIER_TYPES.items()]
CONFIGURATION += [(f"Codec `{name}`", config) for name, config in CODEC_TYPES.items()]
CONFIGURATION += [(f"Coordinator `{name}`", config) for name, config in COORDINATOR_TYPES.items()]


@pytest.mark.parametrize(("title", "config"), CONFIGURATION)
def test_every_key_is_documented_with_its_default(title, config):
    documented = table(REFERENCE / "configuration.md", title)
    fields = {field.name: field for field in msgspec.structs.fields(config)}
    assert documented.keys() == fields.keys()
    for name, field in fields.items():
        written = documented[name][2].strip("`")
        if field.required:
            assert written == "required", name
        elif field.default is None:
            assert written == "none", name
        elif isinstance(field.default, ByteSize):
            assert parse_size(written) == field.default, name
        elif field.default_factory is dict:
            assert written == "{}", name
        else:
            # YAML writes truth in small letters.
            value = str(field.default).lower() if isinstance(field.default, bool) else repr(field.default)
            assert written in (field.default, value), name
        assert all(documented[name]), f"{name} has an empty cell"


def test_every_key_of_a_tier_entry_is_documented():
    assert table(REFERENCE / "configuration.md", "A tier").keys() == set(TierEntry.__struct_fields__) - {
        "settings"
    }


def test_every_plug_in_of_the_tree_is_documented():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    policies = {policy.name for policy in (*kvbm_policies(), *kvbm_eviction.kvbm_policies())}
    policies |= {admission.name for admission in kvbm_admission.kvbm_admissions()}
    tier = section(REFERENCE / "configuration.md", "A tier")
    assert [name for name in policies if f"`{name}`" not in tier] == []
    named = TIER_TYPES.keys() | CODEC_TYPES.keys() | COORDINATOR_TYPES.keys() | policies
    assert project["entry-points"]["kvbm_core"].keys() == named


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("load_deadline_s", 0.001, 0),
        ("store_deadline_s", 0.001, 0),
        ("max_load_fraction", 1, 1.01),
        ("max_load_fraction", 0.01, 0),
        ("max_store_blocks", 1, 0),
        ("sparse_stores_every_tokens", 0, -1),
    ],
)
def test_documented_ranges_of_the_stack(key, good, bad):
    tiers = [{"backend": "memory", "capacity": 1}]
    load_config({"tiers": tiers, key: good})
    with pytest.raises(errors.ConfigError, match=key):
        load_config({"tiers": tiers, key: bad})


# Contract.

CONTRACT = REFERENCE / "contract.md"
VALUES = [
    "Capabilities", "Region", "Transfer", "Completion", "TierContext", "Backend",
    "CodecContext", "CodecKind", "PolicyContext", "Policy",
]  # fmt: skip


# Documented by their names: a constant, and a function.
_NAMED = {"contract_version", "share_bytes"}


@pytest.mark.parametrize("name", VALUES)
def test_every_field_of_the_contract_is_documented(name):
    cls = getattr(kvbm_core, name)
    documented = table(CONTRACT, name)
    methods = {key for key, value in vars(cls).items() if callable(value) and not key.startswith("_")}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    assert documented.keys() == fields.keys() | (methods - fields.keys())
    for field in fields.values():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            assert documented[field.name][1] == "required", field.name
        elif isinstance(field.default, bool | int | None) and field.name not in _NAMED:
            assert documented[field.name][1] == f"`{field.default}`", field.name


def test_every_field_of_a_member_is_documented():
    documented = table(CONTRACT, "Member")
    fields = {field.name: field for field in msgspec.structs.fields(kvbm_core.Member)}
    assert documented.keys() == fields.keys()
    for name, field in fields.items():
        default = (
            field.default_factory()
            if field.default is msgspec.NODEFAULT and not field.required
            else field.default
        )
        assert documented[name][1] == ("required" if field.required else f"`{default!r}`"), name


@pytest.mark.parametrize("name", ["Tier", "Addressable", "Coordinator"])
def test_every_method_of_the_contract_is_documented(name):
    assert table(CONTRACT, name).keys() == getattr(kvbm_core, name).__abstractmethods__


@pytest.mark.parametrize("name", ["Codec", "EvictionPolicy"])
def test_every_member_of_a_plug_in_is_documented(name):
    cls = getattr(kvbm_core, name)
    assert table(CONTRACT, name).keys() == {key for key in vars(cls) if key.isidentifier() and key[0] != "_"}


@pytest.mark.parametrize("name", ["Op", "Outcome", "Reason"])
def test_every_member_of_the_contract_is_documented(name):
    cls = getattr(kvbm_core, name)
    assert issubclass(cls, enum.Enum)
    documented = {key: row[1] for key, row in table(CONTRACT, name).items()}
    assert documented == {member.name: f"`{member.value}`" for member in cls}


def test_every_hook_is_documented():
    hooks = {key for key, value in vars(hookspecs).items() if hasattr(value, "kvbm_core_spec")}
    assert table(CONTRACT, "Hooks").keys() == hooks
    assert hooks


def test_the_version_of_the_contract_is_documented():
    assert f"Contract version: {kvbm_core.CONTRACT_VERSION} (`CONTRACT_VERSION`)" in CONTRACT.read_text()


# What docstrings say.


@pytest.mark.parametrize("page", sorted(REFERENCE.glob("*.md")), ids=name_of)
def test_the_reference_is_what_the_docstrings_say(page):
    assert page.read_text() == make_reference.renew(page.read_text()), "run `make reference`"


def test_every_public_name_has_a_place_in_the_reference():
    headings = {
        heading
        for page in REFERENCE.glob("*.md")
        for heading in re.findall(r"^## `?(\w+)`?$", FENCE.sub("", page.read_text()), re.MULTILINE)
    }
    elsewhere = {
        "BlockKey", "Namespace",  # 32 and 16 bytes.
        "CONTRACT_VERSION", "PAGE_BYTES", "__version__",
        "StackConfig",  # The tables of the configuration.
        "Fifo", "Lru", "hookimpl",
    }  # fmt: skip
    named = {name for name in kvbm_core.__all__ if name not in errors.__all__}
    assert named - headings - elsewhere == set()
    text = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert [name for name in elsewhere if name not in text] == []


# Testing.

TESTING = REFERENCE / "testing.md"


def test_every_public_name_of_the_kit_is_documented():
    for module in (testing, suite, policy_suite, codec_suite, coordinator_suite):
        assert table(TESTING, f"`{module.__name__}`").keys() == set(module.__all__)
    suites = (suite.TierSuite, policy_suite.PolicySuite, codec_suite.CodecSuite)
    for each in (*suites, coordinator_suite.CoordinatorSuite):
        documented = table(TESTING, f"`{each.__name__}`")
        assert documented.keys() == each.members
        for name in each.members & {"waivers", "max_bytes", "programs", "uses_key", "forget_s"}:
            assert documented[name][1] == f"`{getattr(each, name)}`"
    assert f"9 to {MOST_OBJECTS} objects" in table(TESTING, "`TierSuite`")["settings"][2]


def test_every_test_of_the_suite_is_documented_with_the_tiers_it_is_for():
    documented = {name: row[1] for name, row in table(TESTING, "Tests").items()}
    members = {n: member for n, member in members_of(suite.TierSuite).items() if n.startswith("test_")}
    assert documented == {name: getattr(member, "needs", ("any",))[0] for name, member in members.items()}


@pytest.mark.parametrize(
    ("each", "title"),
    [
        (policy_suite.PolicySuite, "Tests of policies"),
        (codec_suite.CodecSuite, "Tests of codecs"),
        (coordinator_suite.CoordinatorSuite, "Tests of coordinators"),
    ],
)
def test_every_test_of_the_other_suites_is_documented_as_it_says(each, title):
    documented = {name: row[1] for name, row in table(TESTING, title).items()}
    members = {n: member for n, member in members_of(each).items() if n.startswith("test_")}
    assert documented == {name: member.__doc__.strip().splitlines()[0] for name, member in members.items()}


def test_every_fault_is_documented():
    written = re.findall(r"^    ``(\w+)`` +(.+)$", testing.FaultyTier.__doc__, re.MULTILINE)
    documented = {name: row[1] for name, row in table(TESTING, "Faults").items()}
    assert documented == {name: text.strip() for name, text in written}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kvbm_core.testing", ["pytest", "hypothesis", "torch", "vllm", "numpy"]),
        ("kvbm_core.testing.suite", ["torch", "vllm", "numpy"]),
        ("kvbm_core.testing.policy_suite", ["torch", "vllm", "numpy"]),
        ("kvbm_core.testing.codec_suite", ["torch", "vllm", "numpy"]),
        ("kvbm_core.testing.coordinator_suite", ["torch", "vllm", "numpy"]),
    ],
)
def test_importing_the_kit_pulls_in_nothing_more_than_it_says(module, absent):
    program = f"import sys, {module}; print(*sorted(set(sys.modules) & set({absent!r})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# On-disk format.


def test_the_seal_lies_where_it_is_drawn():
    page = REFERENCE / "on-disk-format.md"
    namespace, key, payload = bytes(range(16)), bytes(range(100, 132)), b"\x07" * 1000
    context = TierContext(namespace, len(payload) + SEAL_BYTES)
    inner = MemoryTier(MemoryConfig(capacity=ByteSize(1 << 20)), context)
    memory = bytearray(payload + bytes(SEAL_BYTES))
    array = (ctypes.c_ubyte * len(memory)).from_buffer(memory)
    region = Region(ctypes.addressof(array), len(memory), owner=array)
    tier = SealTier(inner, namespace)
    tier.submit([Transfer(1, Op.STORE, key, region)])
    assert [done.outcome for done in tier.poll()] == [Outcome.DONE]

    footer = bytes(region.view()[len(payload) :])
    parts, end = {}, 0
    for offset, nbytes, field, _ in rows(section(page, "The seal")):
        assert int(offset) == end, f"{field} does not follow the field before it"
        end = int(offset) + int(nbytes)
        parts[field] = footer[int(offset) : end]
    assert end == SEAL_BYTES == len(footer)
    assert parts == {
        "magic": b"KVBMBLK\0",
        "version": struct.pack("<I", 1),
        "footer_bytes": struct.pack("<I", 96),
        "payload_bytes": struct.pack("<Q", len(payload)),
        "namespace": namespace,
        "key": key,
        "checksum": xxhash.xxh3_128_digest(payload + footer[:72]),
        "padding": bytes(8),
    }
    drawn = re.search(r"^ 0 .*96$", page.read_text(), re.MULTILINE)
    assert drawn
    offsets = {int(row[0]) for row in rows(section(page, "The seal"))}
    assert {int(number) for number in drawn[0].split()} == offsets | {SEAL_BYTES}


def test_keys_are_derived_as_documented():
    root = hashlib.sha256(b"kvbm-key-1" + msgspec.msgpack.encode([("lora", "x"), ("salt", "y")])).digest()
    assert kvbm_core.root_key(salt="y", lora="x", other=None) == root
    first = hashlib.sha256(root + struct.pack("<2q", 5, 6)).digest()
    second = hashlib.sha256(first + struct.pack("<2q", 7, 8) + struct.pack("<q", 3) + b"cat").digest()
    assert kvbm_core.chain_keys(root, [5, 6, 7, 8, 9], 2, {1: b"cat"}) == [first, second]


def test_the_facts_of_a_namespace_are_documented():
    tree = ast.parse((ROOT / "plugins" / "kvbm_vllm" / "_namespace.py").read_text())
    function = next(node for node in tree.body if getattr(node, "name", "") == "namespace_facts")
    facts = {
        key.value for node in ast.walk(function) if isinstance(node, ast.Dict) for key in node.keys if key
    }
    assert table(REFERENCE / "on-disk-format.md", "Namespace").keys() == facts


# Errors and metrics.


def test_every_error_is_named():
    tree = blocks(REFERENCE / "errors.md")[0].text
    drawn = [line.rstrip() for line in tree.splitlines()]
    docstring = [line.removeprefix("    ").rstrip() for line in (errors.__doc__ or "").splitlines()]
    assert set(errors.__all__) == set(re.findall(r"\w+Error\b", tree)) - {"ValueError"}
    assert [line for line in drawn if line not in docstring] == []


def test_every_metric_is_documented():
    written = {
        row[0]: (row[1], re.findall(r"`(\w+)`", row[2]), row[3])
        for row in rows(section(REFERENCE / "metrics.md", "Metrics").split("\n## ")[0])
    }
    assert written == {
        f"`{metric.exported(PREFIX)}`": (metric.kind.value, list(metric.labels), metric.text)
        for metric in METRICS.values()
    }


def test_every_alert_is_documented_with_its_severity():
    file = ROOT / "plugins" / "kvbm_metrics" / "deploy" / "rules" / "kvbm.yml"
    [group] = yaml.safe_load(file.read_text())["groups"]
    documented = {name: row[1] for name, row in table(DOCS / "how-to" / "monitor.md", "Alerts").items()}
    assert documented == {rule["alert"]: rule["labels"]["severity"] for rule in group["rules"]}


# When a tier fails. That the lines and metrics are those of the page is tested in test_evening.py.


def test_every_tier_and_fault_has_a_row_for_operators():
    page = DOCS / "how-to" / "when-a-tier-fails.md"
    running, starting, impossible = (
        {(tier, fault) for tier, fault, *_ in rows(section(page, title))}
        for title in ("While the engine runs", "When the engine starts", "What cannot happen")
    )
    tiers = ("`cpu`", "`lmdb`", "`gds`", "`remote`, `file://`", "`remote`, `s3://`")
    faults = ("full", "permission", "silent", "gone", "corrupt", "second engine")
    assert running | starting | impossible == {(tier, fault) for tier in tiers for fault in faults}
    assert not impossible & (running | starting)
    assert all(all(row[:2]) and row[-2 if len(row) == 6 else -1] for row in rows(page.read_text()))


# Troubleshooting.


def texts_of_the_code():
    """Every text in the packages, with what is put into it left out as in the documentation."""
    for folder in ("kvbm_core", "backends", "plugins"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%\S*?[sdgfr]", "…", node.value)
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(getattr(part, "value", "…") if isinstance(part, ast.Constant) else "…"
                                  for part in node.values)  # fmt: skip


def test_lines_that_the_page_on_troubleshooting_quotes_are_in_the_code():
    page = (DOCS / "how-to" / "troubleshooting.md").read_text()
    code = "\n".join([*texts_of_the_code(), *_FAULTS])
    cells = [cells[0] for cells in rows(page) if "vLLM's" not in cells[0]]
    quoted = [
        quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell) if "vllm:kvbm_" not in quote
    ]
    parts = {part.strip() for quote in quoted for part in quote.split("…")}
    assert len(parts) > 60
    assert [part for part in parts if len(part) > 2 and part not in code] == []


# Come from another connector.


def test_the_settings_of_vllms_own_connector_are_in_its_sources():
    package = Path(importlib.util.find_spec("vllm").origin).parent
    folders = ("v1/kv_offload", "distributed/kv_transfer/kv_connector/v1/offloading", "config")
    sources = "".join(path.read_text() for folder in folders for path in (package / folder).rglob("*.py"))
    page = DOCS / "how-to" / "from-offloading-connector.md"
    cells = " ".join(first for first, *_ in rows(page.read_text().split("\n## ")[0]))
    names = re.findall(r"`(?:type: )?(\w+)`", cells)
    assert len(names) > 12
    # As a key, a parameter, or the name of a kind.
    unknown = [name for name in names if not re.search(rf'"{name}"|\b{name}\b *[:=]', sources)]
    assert unknown == []


# What the documentation speaks of.


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_speak_of_the_project_alone(page):
    text = page.read_text()
    assert not re.search(r"(?<![\w.])/(work|root|home|tmp)/", text)
    assert not re.search(r"(?<![&\w])#\d{2,}\b", text), "an issue's number"
    assert not re.search(r"\b(pypi|files\.pythonhosted)\.", text)


def test_the_page_on_security_names_tests_that_are_there():
    page = ROOT / "docs/explanation/security.md"
    text = page.read_text()
    files = {(page.parent / link).resolve() for link in re.findall(r"\]\(([\w./-]+\.py)\)", text)}
    there = {
        name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 10
    assert named <= there


def test_files_that_explanations_name_exist():
    """In a table a name may leave out `kvbm_core`, or the folder of the name before it."""
    files = {path.relative_to(ROOT).as_posix() for folder in ("kvbm_core", "backends", "plugins", "tests")
             for path in (ROOT / folder).rglob("*.py")}  # fmt: skip
    for page in (DOCS / "explanation").glob("*.md"):
        for name in re.findall(r"`([\w/]+\.py)`", FENCE.sub("", page.read_text())):
            assert any(f"/{file}".endswith(f"/{name}") for file in files), f"{name_of(page)} names {name}"


def test_scripts_that_are_named_exist():
    for page in PAGES + READMES:
        for script in re.findall(r"\b(?:tests|tools)/[\w/]+\.py\b", page.read_text()):
            assert (ROOT / script).is_file(), f"{name_of(page)} names {script}"
