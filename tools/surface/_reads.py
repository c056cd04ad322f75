"""Which attributes of the engine's objects our code reads, followed from names and annotations.

A parameter of the type `Any` holds what its name says, see `HELD`; from there the engine's own annotations
lead on, through attributes, loops and calls.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from surface._classes import Class, Function, Many, Member, Module, Object, Sources, Type
from surface._methods import parameters_of, refuses

__all__ = ["HELD", "NOT_HELD", "Read", "Reader"]

HELD: Final[Mapping[str, str]] = {
    "blocks": "vllm.v1.core.kv_cache_manager.KVCacheBlocks",
    "cache": "vllm.config.CacheConfig",
    "connector_output": "vllm.v1.outputs.KVConnectorOutput",
    "kv_cache_config": "vllm.v1.kv_cache_interface.KVCacheConfig",
    "kv_transfer_config": "vllm.config.KVTransferConfig",
    "lora": "vllm.lora.request.LoRARequest",
    "model": "vllm.config.ModelConfig",
    "output": "vllm.v1.core.sched.output.SchedulerOutput",
    "parallel": "vllm.config.ParallelConfig",
    "request": "vllm.v1.request.Request",
    "scheduler_output": "vllm.v1.core.sched.output.SchedulerOutput",
    "spec": "vllm.v1.kv_cache_interface.KVCacheSpec",
    "transfer": "vllm.config.KVTransferConfig",
    "vllm_config": "vllm.config.VllmConfig",
}
"""What a parameter of the type `Any` holds, by its name."""

NOT_HELD: Final = frozenset({
    "attn_metadata", "forward_context", "kv_connector_metadata", "kv_layer", "kwargs", "metric_types", "own",
    "per_engine_labelvalues", "groups", "outcomes", "self", "tensors", "value",
})  # fmt: skip
"""Parameters of the type `Any` of which nothing of the engine's is read."""

_EVERYWHERE: Final = frozenset({"kv_cache_config", "model", "request", "transfer", "vllm_config"})
"""Names of `HELD` that mean the same for variables and attributes, where nothing else is known of them."""


class _Nothing:
    """Stands in the variables for what is known not to be the engine's."""


_NOTHING: Final = _Nothing()
_Variables = dict[str, Type | _Nothing]


@dataclass(frozen=True, order=True)
class Read:
    """One name that is read, or called, of one of the engine's classes or modules."""

    of: str
    name: str
    place: str
    """Our file and line."""
    has_default: bool
    """Whether it is read by `getattr` with a default."""
    found: bool
    """Whether this version has it."""


class Reader(ast.NodeVisitor):
    """Collects what one module of ours reads."""

    def __init__(self, sources: Sources, module: str) -> None:
        self.reads: set[Read] = set()
        self.problems: set[str] = set()
        self._sources, self._module = sources, module
        self._file = module.rpartition(".")[2] + ".py"
        self._variables: _Variables = {}
        self._class: Class | None = None
        self._strings: dict[str, str] = {}
        """What a variable is in a loop over strings, or rows of them, that are written in our source."""

    def run(self) -> None:
        """Read the whole module."""
        tree = self._sources.tree(self._module)
        assert tree is not None, f"no module {self._module}"
        self.visit(tree)

    # Statements.

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.partition(".")[0] == "vllm":
            for alias in node.names:
                found = self._sources.defined(node.module, alias.name) is not None
                self._note(node, node.module, alias.name, found=found)
                known = self._sources.find(node.module, alias.name)
                if known is not None:
                    self._variables[alias.asname or alias.name] = known

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self._class = self._class, Class(self._module, node)
        self.generic_visit(node)
        self._class = before

    def visit_FunctionDef(self, node: Function) -> None:
        before = dict(self._variables)
        for argument in _arguments(node):
            self._variables[argument.arg] = self._parameter(argument)
        for part in (*node.decorator_list, *node.args.defaults, *node.body):
            self.visit(part)
        self._variables = before

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - the name is `ast`'s.

    def visit_Assign(self, node: ast.Assign) -> None:
        known = self._type(node.value)
        for target in node.targets:
            self._bind(target, known, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._type(node.value)
        if isinstance(node.target, ast.Name) and ast.unparse(node.annotation) != "Any":
            known = self._sources.annotated(self._module, node.annotation)
            self._variables[node.target.id] = known if known is not None else _NOTHING

    def visit_For(self, node: ast.For) -> None:
        self._loop(node.target, node.iter)
        rows: list[ast.expr | None] = [*self._rows(node.iter)]
        for row in rows or [None]:
            for target, value in _pairs(node.target, row):
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    self._strings[target] = value.value
            for statement in (*node.body, *node.orelse):
                self.visit(statement)

    def generic_visit(self, node: ast.AST) -> None:
        """Take expressions by what they are, everything else part by part."""
        if isinstance(node, ast.expr):
            self._type(node)
        else:
            super().generic_visit(node)

    # Expressions: each is looked at once, and what is known of it is returned.

    def _type(self, node: ast.expr) -> Type:
        known: Mapping[type, Callable[[Any], Type]] = {
            ast.Name: self._name, ast.Attribute: self._attribute, ast.Call: self._call,
            ast.Subscript: self._subscript, ast.BoolOp: self._either, ast.IfExp: self._either,
            ast.ListComp: self._comprehension, ast.GeneratorExp: self._comprehension,
            ast.SetComp: self._comprehension, ast.DictComp: self._comprehension,
        }  # fmt: skip
        if type(node) in known:
            return known[type(node)](node)
        for child in ast.iter_child_nodes(node):
            self.visit(child)
        return None

    def _name(self, node: ast.Name) -> Type:
        known = self._variables.get(node.id)
        if known is None and node.id in _EVERYWHERE:
            return self._held(node.id)
        if known is None:
            return self._sources.find(self._module, node.id)
        return None if isinstance(known, _Nothing) else known

    def _attribute(self, node: ast.Attribute) -> Type:
        base = self._type(node.value)
        if base is None:
            plain = node.attr.lstrip("_")
            if ast.unparse(node.value) == "self" and self._class:
                self._own(node)
            return self._held(plain) if plain in _EVERYWHERE else None
        return self._read(node, base, node.attr)

    def _own(self, node: ast.Attribute) -> None:
        """Note what an object of ours reads of a base of the engine's."""
        assert self._class is not None
        bases = self._sources.bases(self._class)
        theirs = [each for each in bases if each.module.startswith("vllm")]
        ours = [each for each in bases if each not in theirs]
        if theirs and not any(node.attr in self._sources.members(each) for each in ours):
            found = self._sources.member(self._class, node.attr) is not None
            self._note(node, theirs[0].name, node.attr, found=found)

    def _read(self, node: ast.expr, base: Type, name: str, *, has_default: bool = False) -> Type:
        if isinstance(base, Module) and base.name.startswith("vllm"):
            found = self._sources.defined(base.name, name) is not None
            self._note(node, base.name, name, found=found, has_default=has_default)
            return self._sources.find(base.name, name)
        if not isinstance(base, Object) or not base.of.module.startswith("vllm"):
            return None
        member = self._sources.member(base.of, name)
        if member is None and has_default:
            # Asked of a base class: some of its subclasses have it.
            below = self._sources.subclasses(base.of)
            member = next((m for m in (self._sources.member(each, name) for each in below) if m), None)
        special = name.startswith("__")  # Every object has some.
        if not special or member is not None:
            self._note(node, base.of.name, name, found=member is not None, has_default=has_default)
        return self._sources.type_of(member) if member and member.kind in ("field", "property") else None

    def _call(self, node: ast.Call) -> Type:
        for part in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(part)
        function = node.func
        if isinstance(function, ast.Name) and function.id == "getattr":
            return self._getattr(node)
        if isinstance(function, ast.Name) and function.id == "isinstance":
            self._narrow(*node.args)
        if isinstance(function, ast.Name) and function.id in ("list", "sorted", "tuple") and node.args:
            return self._quietly(node.args[0])
        if not isinstance(function, ast.Attribute):
            self.visit(function)
            return None
        member = self._called(function)
        if member is None or member.function is None:
            return None
        reason = refuses(parameters_of(member), node)
        if reason:
            self.problems.add(f"{self._place(node)}: {member.owner.name}.{function.attr} {reason}")
        return self._sources.type_of(member)

    def _called(self, function: ast.Attribute) -> Member | None:
        """Find the engine's method that is called, if it is one."""
        if ast.unparse(function.value) == "super()" and self._class:
            bases = self._sources.bases(self._class)[1:]
            own = [self._sources.members(each) for each in bases if each.module.startswith("vllm")]
            return next((members[function.attr] for members in own if function.attr in members), None)
        self._type(function)
        base = self._quietly(function.value)
        if isinstance(base, Object) and base.of.module.startswith("vllm"):
            return self._sources.member(base.of, function.attr)
        return None

    def _getattr(self, node: ast.Call) -> Type:
        base, key = self._quietly(node.args[0]), node.args[1]
        name = key.value if isinstance(key, ast.Constant) else self._strings.get(ast.unparse(key))
        if name is not None:
            return self._read(node, base, str(name), has_default=len(node.args) > 2)
        if isinstance(base, Object) and base.of.module.startswith("vllm"):
            self.problems.add(
                f"{self._place(node)}: which attribute of {base.of.name} is read cannot be told"
            )
        return None

    def _narrow(self, subject: ast.expr, wanted: ast.expr) -> None:
        """Take a variable for what it is asked to be, from here on."""
        if isinstance(subject, ast.Name) and isinstance(wanted, ast.Name):
            known = self._quietly(wanted)
            self._variables[subject.id] = Object(known.of) if isinstance(known, Object) else _NOTHING

    def _subscript(self, node: ast.Subscript) -> Type:
        base = self._type(node.value)
        self.visit(node.slice)
        if isinstance(node.slice, ast.Slice):
            return base
        return base.each if isinstance(base, Many) else None

    def _either(self, node: ast.BoolOp | ast.IfExp) -> Type:
        if isinstance(node, ast.IfExp):
            self.visit(node.test)
        parts = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
        known = [self._type(part) for part in parts]
        return next((each for each in known if each is not None), None)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> Type:
        before = dict(self._variables)
        for generator in node.generators:
            self._loop(generator.target, generator.iter)
            for condition in generator.ifs:
                self.visit(condition)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        known = [self._type(part) for part in parts]
        self._variables = before
        return Many(known[0]) if len(known) == 1 else None

    def _quietly(self, node: ast.expr) -> Type:
        """Tell what an expression is that was looked at before."""
        reads, problems = set(self.reads), set(self.problems)
        known = self._type(node)
        self.reads, self.problems = reads, problems
        return known

    # Variables.

    def _loop(self, target: ast.expr, over: ast.expr) -> None:
        known = self._type(over)
        self._bind(target, known.each if isinstance(known, Many) else None, None)

    def _rows(self, over: ast.expr) -> list[ast.expr]:
        """Give what a loop goes over, if it is written there or in a constant of the module."""
        if isinstance(over, ast.Name):
            statement = self._sources.defined(self._module, over.id)
            value = getattr(statement, "value", None)
            over = value if isinstance(value, ast.expr) else over
        return over.elts if isinstance(over, ast.Tuple | ast.List) else []

    def _bind(self, target: ast.expr, known: Type, value: ast.expr | None) -> None:
        if isinstance(target, ast.Name):
            self._variables.pop(target.id, None)
            if known is not None:
                self._variables[target.id] = known
        elif isinstance(target, ast.Tuple | ast.List):
            values = value.elts if isinstance(value, ast.Tuple | ast.List) else [None] * len(target.elts)
            for at, part in enumerate(target.elts):
                each = known.each if isinstance(known, Many) else None
                one = values[at] if at < len(values) else None
                self._bind(part, self._quietly(one) if one is not None else each, one)
        elif not (isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"):
            self.visit(target)

    def _parameter(self, argument: ast.arg) -> Type | _Nothing:
        annotation = argument.annotation
        if annotation is not None and ast.unparse(annotation) not in ("Any", "Any | None"):
            known = self._sources.annotated(self._module, annotation)
            return known if known is not None else _NOTHING
        if argument.arg in HELD:
            return self._held(argument.arg)
        if annotation is not None and argument.arg not in NOT_HELD:
            self.problems.add(
                f"{self._place(argument)}: the parameter {argument.arg!r} may be anything; "
                "name it in HELD or NOT_HELD of tools/surface/_reads.py"
            )
        return None

    def _held(self, name: str) -> Type:
        module, _, wanted = HELD[name].rpartition(".")
        known = self._sources.find(module, wanted)
        if not isinstance(known, Object):
            self.problems.add(f"there is no {HELD[name]}")
            return None
        return Object(known.of)

    def _note(self, node: ast.AST, of: str, name: str, *, found: bool, has_default: bool = False) -> None:
        self.reads.add(Read(of, name, self._place(node), has_default, found))

    def _place(self, node: ast.AST) -> str:
        return f"{self._file}:{getattr(node, 'lineno', 0)}"


def _arguments(node: Function) -> Iterator[ast.arg]:
    arguments = node.args
    yield from (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    yield from (each for each in (arguments.vararg, arguments.kwarg) if each)


def _pairs(target: ast.expr, row: ast.expr | None) -> Iterator[tuple[str, ast.expr]]:
    """Give variables of a loop, each with what it is in one row."""
    if isinstance(target, ast.Name) and row is not None:
        yield target.id, row
    if isinstance(target, ast.Tuple) and isinstance(row, ast.Tuple):
        for part, value in zip(target.elts, row.elts, strict=False):
            yield from _pairs(part, value)
