"""Classes and their members, read from source files: nothing is imported, so any version can be read."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

__all__ = ["Class", "Function", "Many", "Member", "Module", "Object", "Sources", "Type", "kind_of"]

Function = ast.FunctionDef | ast.AsyncFunctionDef

_WRAPPERS: Final = ("Optional", "Annotated", "ClassVar", "Final", "InstanceOf", "SkipValidation", "Union")
"""Annotations around the one that says what a value is."""
_COLLECTIONS: Final = (
    "list", "List", "tuple", "Tuple", "set", "Sequence", "Iterable", "Collection", "ConstantList",
)  # fmt: skip


@dataclass(frozen=True)
class Class:
    """A class, and the module that it is written in."""

    module: str
    node: ast.ClassDef

    @property
    def name(self) -> str:
        """Its name, without its module."""
        return self.node.name


@dataclass(frozen=True)
class Module:
    """A module, as a value."""

    name: str


@dataclass(frozen=True)
class Object:
    """An object of a class, or the class itself."""

    of: Class
    itself: bool = False


@dataclass(frozen=True)
class Many:
    """A collection, and what each of it is."""

    each: Type


Type = Module | Object | Many | None
"""What is known of a value; None if nothing is."""


@dataclass(frozen=True)
class Member:
    """What a class has under a name."""

    owner: Class
    kind: str
    """``method``, ``property``, ``classmethod``, ``staticmethod`` or ``field``."""
    function: Function | None = None
    annotation: ast.expr | None = None
    """Of a field, or of what a function returns."""
    value: ast.expr | None = None
    """What a field without annotation is set to."""


class Sources:
    """Source files below some folders, each with packages in it."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._trees: dict[str, ast.Module | None] = {}
        self._names: dict[str, dict[str, ast.stmt]] = {}
        self._members: dict[Class, dict[str, Member]] = {}

    def tree(self, module: str) -> ast.Module | None:
        """Parse a module; None if there is no such file."""
        if module not in self._trees:
            path = self._path(module)
            self._trees[module] = _parse(path.read_text(encoding="utf-8")) if path else None
        return self._trees[module]

    def find(self, module: str, name: str) -> Type:
        """Follow a name in a module, through imports, to a class or a module."""
        found = self.defined(module, name)
        if isinstance(found, Class):
            return Object(found, itself=True)
        return found if isinstance(found, Module) else None

    def defined(self, module: str, name: str) -> Class | Module | ast.stmt | None:
        """Find what a module has under a name; None if it has nothing."""
        for _hop in range(16):  # Imports of imports end, unless they go in a circle.
            statement = self._names_of(module).get(name)
            if statement is None:
                return Module(f"{module}.{name}") if self._path(f"{module}.{name}") else None
            if isinstance(statement, ast.ClassDef):
                return Class(module, statement)
            if isinstance(statement, ast.Import):
                alias = _imported(statement, name)
                return Module(alias.name if alias.asname else name)
            if not isinstance(statement, ast.ImportFrom):
                return statement
            origin = self._absolute(module, statement)
            if self._path(origin) is None:
                return statement  # Of a package that is not read here.
            module, name = origin, _imported(statement, name).name
        return None

    def bases(self, cls: Class) -> list[Class]:
        """List a class and what it is made of, nearest first, as far as the files are here."""
        found, open_ = [], [cls]
        while open_:
            cls = open_.pop(0)
            if cls in found:
                continue
            found.append(cls)
            for base in cls.node.bases:
                expression = base.value if isinstance(base, ast.Subscript) else base
                known = self.find(cls.module, ast.unparse(expression))
                if isinstance(known, Object):
                    open_.append(known.of)
        return found

    def subclasses(self, cls: Class) -> list[Class]:
        """List the classes of the same module that are made of a class."""
        tree = self.tree(cls.module)
        nodes = [node for node in (tree.body if tree else []) if isinstance(node, ast.ClassDef)]
        return [each for node in nodes if cls in self.bases(each := Class(cls.module, node)) and each != cls]

    def member(self, cls: Class, name: str) -> Member | None:
        """Find what a class has under a name, its bases included."""
        own = map(self.members, self.bases(cls))
        return next((members[name] for members in own if name in members), None)

    def members(self, cls: Class) -> dict[str, Member]:
        """List what a class itself has: what its body defines, and what its methods set."""
        if cls not in self._members:
            found: dict[str, Member] = {}
            for statement in _statements(cls.node.body):
                found.update({n: m for n, m in _members_of(cls, statement) if m.kind != "setter"})
            for function in [node for node in cls.node.body if isinstance(node, Function)]:
                for name, member in _set_by(cls, function):
                    found.setdefault(name, member)
            self._members[cls] = found
        return self._members[cls]

    def type_of(self, member: Member) -> Type:
        """Tell what a member is when it is read; a method is told apart by its kind."""
        if member.annotation is not None:
            return self.annotated(member.owner.module, member.annotation)
        values = member.value.values if isinstance(member.value, ast.BoolOp) else [member.value]
        for value in values:
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                made = self.find(member.owner.module, value.func.id)
                if isinstance(made, Object):
                    return Object(made.of)
        return None

    def annotated(self, module: str, annotation: ast.expr) -> Type:
        """Tell what an annotation in a module says."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.BinOp):
            return self.annotated(module, annotation.left) or self.annotated(module, annotation.right)
        if isinstance(annotation, ast.Name):
            known = self.find(module, annotation.id)
            return Object(known.of) if isinstance(known, Object) else None
        if not isinstance(annotation, ast.Subscript):
            return None
        inside = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        name = ast.unparse(annotation.value).rpartition(".")[2]
        parts = (self.annotated(module, part) for part in inside)
        first = next((part for part in parts if part is not None), None)
        if name in _COLLECTIONS:
            return Many(first)
        return first if name in _WRAPPERS else None

    def _path(self, module: str) -> Path | None:
        parts = module.split(".")
        for folder in self._folders:
            for path in (folder.joinpath(*parts, "__init__.py"), folder.joinpath(*parts).with_suffix(".py")):
                if path.is_file():
                    return path
        return None

    def _absolute(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        path = self._path(module)
        up = statement.level - (path is not None and path.name == "__init__.py")
        package = ".".join(module.split(".")[: len(module.split(".")) - up])
        return f"{package}.{statement.module}" if statement.module else package

    def _names_of(self, module: str) -> dict[str, ast.stmt]:
        if module not in self._names:
            tree, names = self.tree(module), dict[str, ast.stmt]()
            for statement in _statements(tree.body if tree else []):
                for name in _defines(statement):
                    # The first counts: what follows in an `else` or `except` stands in for it.
                    names.setdefault(name, statement)
            self._names[module] = names
        return self._names[module]


@lru_cache(maxsize=256)
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Give the statements of a body, those below `if` and `try` too."""
    for statement in body:
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements(statement.body)
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler.body)
            yield from _statements(statement.orelse)
        else:
            yield statement


def _defines(statement: ast.stmt) -> list[str]:
    if isinstance(statement, Function | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    single = getattr(statement, "target", None)
    targets = statement.targets if isinstance(statement, ast.Assign) else [single] if single else []
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _imported(statement: ast.Import | ast.ImportFrom, name: str) -> ast.alias:
    return next(a for a in statement.names if name in (a.asname, a.name, a.name.partition(".")[0]))


def _members_of(cls: Class, statement: ast.stmt) -> Iterator[tuple[str, Member]]:
    if isinstance(statement, Function):
        yield statement.name, Member(cls, kind_of(statement), statement, statement.returns)
        return
    annotation, value = getattr(statement, "annotation", None), getattr(statement, "value", None)
    for name in _defines(statement):
        yield name, Member(cls, "field", None, annotation, value)


def kind_of(function: Function) -> str:
    """Tell a property from a method, and so on, by the decorators."""
    for decorator in function.decorator_list:
        name = ast.unparse(decorator).rpartition(".")[2]
        if name in ("property", "cached_property"):
            return "property"
        if name in ("classmethod", "staticmethod", "setter"):
            return name
    return "method"


def _set_by(cls: Class, function: Function) -> Iterator[tuple[str, Member]]:
    """Give what a method sets on `self`, typed by the parameter it comes from."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotations = {argument.arg: argument.annotation for argument in arguments}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
                parts = node.value.values if isinstance(node.value, ast.BoolOp) else [node.value]
                for part in parts:
                    if annotation is None and isinstance(part, ast.Name):
                        annotation = annotations.get(part.id)
                yield target.attr, Member(cls, "field", None, annotation, node.value)
