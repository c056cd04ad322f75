"""`help` of a class shows its fields, with the words that stand under them in the source."""

import ast
import dataclasses
import enum
import inspect
import pydoc
import subprocess
import sys
from types import ModuleType

import msgspec
import pytest

import kvbm_core
from kvbm_core.config import PartEntry, TierEntry
from kvbm_core.field_docs import show_fields
from kvbm_core.memory import MemoryConfig

EXPORTED = [getattr(kvbm_core, name) for name in kvbm_core.__all__]
VALUES = [
    each
    for each in [*EXPORTED, TierEntry, PartEntry, MemoryConfig]
    if isinstance(each, type)
    and (dataclasses.is_dataclass(each) or issubclass(each, msgspec.Struct | enum.Enum))
]


def name_of(cls):
    return cls.__name__


def fields_of(cls):
    """The fields that the class itself has, by what Python says of it."""
    if issubclass(cls, enum.Enum):
        return list(cls.__members__)
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(cls.__struct_fields__)


def written(cls):
    """The docstrings under the fields, its own and those it inherits, as Python's own parser reads them."""
    bases = [base for base in reversed(cls.__mro__[1:]) if dataclasses.is_dataclass(base)]
    return {name: text for each in (*bases, cls) for name, text in written_in(each).items()}


def written_in(cls):
    [tree] = [
        node
        for node in ast.parse(inspect.getsource(sys.modules[cls.__module__])).body
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    ]
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.Assign | ast.AnnAssign) and isinstance(text, ast.Expr):
            target = field.target if isinstance(field, ast.AnnAssign) else field.targets[0]
            found[target.id] = " ".join(text.value.value.split())
    return found


@pytest.mark.parametrize("cls", VALUES, ids=name_of)
def test_every_public_value_shows_every_field(cls):
    texts = written(cls)
    assert texts.keys() == set(fields_of(cls))
    shown = " ".join(pydoc.plain(pydoc.render_doc(cls)).replace(" |  ", " ").split())
    for name, text in texts.items():
        assert f"{name}: {text}" in shown, name


def test_there_are_values_of_each_kind():
    assert {kvbm_core.Capabilities, kvbm_core.StackConfig, kvbm_core.Plan, kvbm_core.Reason} <= set(VALUES)


@pytest.mark.parametrize("module", ["kvbm_cpu", "kvbm_lmdb", "kvbm_gds", "kvbm_remote", "kvbm_zstd"])
def test_configurations_of_backends_show_theirs(module):
    [config] = [
        each for each in vars(pytest.importorskip(module)).values() if inspect.isclass(each)
        and issubclass(each, kvbm_core.TierConfig | kvbm_core.CodecConfig)
    ]  # fmt: skip
    assert [name for name in config.__struct_fields__ if f"\n    {name}: " not in config.__doc__] == []


def test_a_class_without_source_keeps_its_docstring():
    module = ModuleType("typed_in")
    code = 'class Typed:\n    """What it is."""\n    field: int = 0\n    """Not to be found."""\n'
    exec(compile(code, "<input>", "exec"), vars(module))
    show_fields([module.Typed])
    assert module.Typed.__doc__ == "What it is."


def test_without_docstrings_nothing_is_shown_and_nothing_fails():
    program = "import kvbm_core; print(kvbm_core.StackConfig.__doc__, kvbm_core.Capabilities(1).queue_depth)"
    done = subprocess.run([sys.executable, "-OO", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "None 64\n"
