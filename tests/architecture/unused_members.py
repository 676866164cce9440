"""Members of our classes that are used nowhere, by the types that mypy finds for all expressions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from mypy import build
from mypy.main import process_options
from mypy.modulefinder import BuildSource
from mypy.nodes import (
    AssignmentStmt,
    CallExpr,
    ClassDef,
    FuncDef,
    MemberExpr,
    MypyFile,
    NameExpr,
    Node,
    OperatorAssignmentStmt,
    RefExpr,
    StrExpr,
    SuperExpr,
    TypeInfo,
    Var,
)
from mypy.types import (
    AnyType,
    FunctionLike,
    Instance,
    LiteralType,
    TupleType,
    Type,
    TypeType,
    TypeVarType,
    UnionType,
    get_proper_type,
)

Member = tuple[str, str]  # full name of the class, name
BY_NAME = {"getattr", "hasattr", "attrgetter", "methodcaller"}  # functions that take the name of a member
OURS = "trunkline"  # the beginning of the names of our modules, of examples too
SCHEMAS = re.compile(r"schemas$|chat_messages$|\.routes\.")  # test_fields.py checks the fields of requests
WHOLE = {"asdict", "_asdict", "astuple", "vars", "fields", "to_builtins"}  # functions that read all fields of a value


def types_of(modules: Mapping[str, tuple[Path, str]], config: Path, cache: Path) -> build.BuildResult:
    """mypy's result for modules: name -> path and text. ``cache`` is mypy's, which has the libraries."""
    _, options = process_options(["--config-file", str(config)])
    options.export_types = options.preserve_asts = True
    options.cache_dir = str(cache)
    return build.build([BuildSource(str(path), module, text) for module, (path, text) in modules.items()], options)


LINKS = {
    *("node", "info", "type", "unanalyzed_type", "analyzed", "names", "var", "original_def", "expanded", "imports"),
    *("def_or_infer_vars", "unanalyzed_items", "original_decorators", "removed_base_type_exprs", "removed_statements"),
}  # attributes of mypy's nodes that aren't parts of them


def parts(node: Node) -> Iterator[Node]:
    """The nodes that a node of mypy's tree consists of."""
    pending = [getattr(node, name, None) for name in type(node).__mypyc_attrs__ if name not in LINKS]
    while pending:
        value = pending.pop()
        if isinstance(value, Node):
            yield value
        elif isinstance(value, list | tuple):
            pending.extend(value)


class Members:
    """The members that the classes of some modules define, and those that are used."""

    def __init__(self, result: build.BuildResult, modules: Iterable[str]) -> None:
        self.types = result.types
        self.classes: dict[str, TypeInfo] = {}
        self.used: set[Member] = set()
        self.by_name: set[str] = set()  # used members of objects whose class isn't known
        for module in modules:
            self.visit(result.files[module], None)

    def visit(self, node: Node, inside: Member | None) -> None:
        """``inside``: the member whose definition the node is part of."""
        if isinstance(node, ClassDef):
            self.classes[node.info.fullname] = node.info
        elif isinstance(node, FuncDef) and node.info:
            inside = (node.info.fullname, node.name)
        elif isinstance(node, AssignmentStmt | OperatorAssignmentStmt):
            targets = node.lvalues if isinstance(node, AssignmentStmt) else [node.lvalue]
            for target in targets:
                self.visit(target.expr if isinstance(target, MemberExpr) else target, inside)
            self.visit(node.rvalue, inside)
            return
        elif isinstance(node, MemberExpr):
            self.use(node, inside)
        elif isinstance(node, SuperExpr) and node.info:
            for base in node.info.mro[1:]:
                self.add(base, node.name, inside)
        elif isinstance(node, CallExpr):
            self.call(node, inside)
        for part in parts(node):
            self.visit(part, inside)

    def call(self, node: CallExpr, inside: Member | None) -> None:
        name = node.callee.name if isinstance(node.callee, MemberExpr | NameExpr) else ""
        if name in BY_NAME:
            self.by_name |= {one.value for one in node.args if isinstance(one, StrExpr)}
        if name in WHOLE:
            values = [*node.args, *([node.callee.expr] if isinstance(node.callee, MemberExpr) else [])]
            for info in {info for value in values for info in infos_of(self.types.get(value)) or ()}:
                for field in info.names:
                    self.add(info, field, inside)

    def use(self, node: MemberExpr, inside: Member | None) -> None:
        if isinstance(node.expr, RefExpr) and isinstance(node.expr.node, MypyFile):
            return
        infos = infos_of(self.types.get(node.expr))
        if infos is None and isinstance(node.expr, RefExpr) and isinstance(node.expr.node, TypeInfo):
            infos = [node.expr.node]
        if infos is None:
            self.by_name.add(node.name)
        for info in infos or ():
            self.add(info, node.name, inside)

    def add(self, info: TypeInfo, name: str, inside: Member | None) -> None:
        owner = info.get_containing_type_info(name)
        if owner is None and info.fallback_to_any:
            self.by_name.add(name)
        if owner is not None and (owner.fullname, name) != inside:
            self.used.add((owner.fullname, name))


def infos_of(receiver: Type | None) -> list[TypeInfo] | None:
    """The classes whose members an expression of this type has; None if they aren't known."""
    kind = get_proper_type(receiver)
    if kind is None or isinstance(kind, AnyType):
        return None
    if isinstance(kind, Instance):
        return [kind.type]
    if isinstance(kind, UnionType):
        found = [infos_of(item) for item in kind.items]
        return None if None in found else [info for infos in found for info in infos or ()]
    if isinstance(kind, TypeVarType):
        return infos_of(kind.upper_bound)
    if isinstance(kind, TypeType):
        return infos_of(kind.item)
    if isinstance(kind, FunctionLike):
        return [kind.type_object()] if kind.is_type_obj() else []
    if isinstance(kind, TupleType):
        return [kind.partial_fallback.type]
    if isinstance(kind, LiteralType):
        return [kind.fallback.type]
    return []


def unused_members(members: Members, exceptions: Iterable[str] = (), shared: Collection[str] = ()) -> list[str]:
    """The members that nothing uses, as "class.member".

    An overridden member and those that override it are used together; so are those of a protocol and of classes that
    have all of its members. An attribute of an object of unknown class is a use of all members with this name, unless
    it is one of ``shared``, the names of libraries' members. ``exceptions``: patterns of members that are used.
    """
    ours = members.classes
    groups = Groups()
    defined = {(info.fullname, name) for info in ours.values() for name in own_names(info)}
    for info in ours.values():
        for base in info.mro[1:]:
            for name in own_names(info):
                if (base.fullname, name) in defined:
                    groups.join((info.fullname, name), (base.fullname, name))
    for protocol in (info for info in ours.values() if info.is_protocol):
        for info in ours.values():
            owners = [info.get_containing_type_info(name) for name in protocol.protocol_members]
            for name, owner in zip(protocol.protocol_members, owners, strict=True):
                if all(owners) and owner is not None and (owner.fullname, name) in defined:
                    groups.join((owner.fullname, name), (protocol.fullname, name))
    named = {one for one in defined if one[1] in members.by_name and one[1] not in shared}
    excepted = {one for one in defined if any(fnmatch(".".join(one), pattern) for pattern in exceptions)}
    used = {groups.root(one) for one in members.used | named | excepted}
    return sorted(".".join(one) for one in defined if groups.root(one) not in used)


class Groups:
    """Members that are used together."""

    def __init__(self) -> None:
        self._parents: dict[Member, Member] = {}

    def root(self, member: Member) -> Member:
        while member in self._parents:
            member = self._parents[member]
        return member

    def join(self, one: Member, other: Member) -> None:
        first, second = self.root(one), self.root(other)
        if first != second:
            self._parents[first] = second


def own_names(info: TypeInfo) -> Iterator[str]:
    """The members that a class defines, without those that a library calls or reads, and fields of requests."""
    if info.fallback_to_any or info.typeddict_type is not None or info.is_named_tuple:
        return
    libraries = [base for base in info.mro[1:] if not base.module_name.startswith(OURS)]
    for name, symbol in info.names.items():
        special = "-" in name or (name.startswith("__") and name.endswith("__")) or symbol.plugin_generated
        field = isinstance(symbol.node, Var) and SCHEMAS.search(info.module_name)
        if not special and not field and not any(name in base.names for base in libraries):
            yield name
