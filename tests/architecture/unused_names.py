"""Names of modules that nothing uses: neither their own module nor one that imports them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

DECORATORS = {"hookimpl", "hookspec", "command", "get", "post", "route"}  # register a function that others call

Name = tuple[str, str]  # module, name


def defined(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """The functions, classes and variables of a module, each with its definition."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If | ast.Try | ast.With):
            pending += [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            words = {word for decorator in node.decorator_list for word in words_of(decorator)}
            if not words & DECORATORS and not node.name.startswith("__"):
                yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for part in (part for target in targets for part in ast.walk(target)):
                if isinstance(part, ast.Name) and not part.id.startswith("__"):
                    yield part.id, node


def words_of(node: ast.AST) -> Iterator[str]:
    """The names and attributes in an expression."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name | ast.Attribute):
            yield part.id if isinstance(part, ast.Name) else part.attr


class Uses:
    """The names that modules use. ``exported``: those that a package only passes on, with their origin."""

    def __init__(self, trees: Mapping[str, ast.Module], packages: set[str]) -> None:
        self._trees = trees
        self._packages = packages
        self.found: set[Name] = set()
        self.exported: dict[Name, Name] = {}
        for module, tree in trees.items():
            self._scan(module, tree)
        while more := {self.exported[name] for name in self.found if name in self.exported} - self.found:
            self.found |= more

    def _scan(self, module: str, tree: ast.Module) -> None:
        modules: dict[str, str] = {}  # local name -> module
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                for alias in node.names:
                    local, target = alias.asname or alias.name, f"{origin}.{alias.name}"
                    if target in self._trees:
                        modules[local] = target
                    elif module in self._packages and node in tree.body:
                        self.exported[module, local] = (origin, alias.name)
                    else:
                        self.found.add((origin, alias.name))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                self.found.add((modules[node.value.id], node.attr))
            elif isinstance(node, ast.Name) and (module, node.id) in self.exported:
                self.found.add((module, node.id))
        for name, definition in defined(tree):
            inside = set(ast.walk(definition))
            if any(name == loaded(node) for node in ast.walk(tree) if node not in inside):
                self.found.add((module, name))

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        base = parts[: len(parts) - node.level + (module in self._packages)]
        return ".".join([*base, *([node.module] if node.module else [])])


def loaded(node: ast.AST) -> str | None:
    """The name that an expression reads. A string may be one, in ``cast("Name", …)``."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return node.id
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def unused_names(trees: Mapping[str, ast.Module], packages: set[str]) -> list[str]:
    """What the modules define and nothing uses, as "module.name". ``packages``: the modules with others in them."""
    used = Uses(trees, packages).found
    every = {(module, name) for module, tree in trees.items() for name, _ in defined(tree)}
    return sorted(f"{module}.{name}" for module, name in every - used)
