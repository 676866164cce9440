"""The project's own source files, parsed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDERS = ("core", "kernels", "plugins")


@dataclass(frozen=True)
class Source:
    """A file of the package: ``module`` as imported, ``name`` without the leading ``trunkline.``."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return self.module.removeprefix("trunkline.")

    @property
    def package(self) -> str:
        return self.module if self.path.name == "__init__.py" else self.module.rpartition(".")[0]

    def imports(self, *, for_types: bool = False) -> Iterator[str]:
        """Absolute dotted names of all imports, lazy ones too; those for type checkers only with ``for_types``.

        ``from a import b`` gives ``a.b``, which may be a module or a name in one.
        """
        pending: list[ast.AST] = [self.tree]
        while pending:
            node = pending.pop()
            if not for_types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                pending.extend(node.orelse)
                continue
            pending.extend(ast.iter_child_nodes(node))
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{self._origin(node)}.{alias.name}" for alias in node.names)

    def _origin(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        base = ".".join(parts[: len(parts) - node.level + 1])
        return f"{base}.{node.module}" if node.module else base


@pytest.fixture(scope="session")
def sources(repository: Path) -> dict[str, Source]:
    """Every file under core/, kernels/ and plugins/ by module name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((repository / folder).rglob("*.py")):
            parts = path.relative_to(repository).with_suffix("").parts
            module = ".".join(("trunkline", *parts)).removesuffix(".__init__")
            text = path.read_text()
            found[module] = Source(path, module, text, ast.parse(text))
    assert len(found) > 20
    return found


def graph(sources: dict[str, Source], *, for_types: bool = False) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        targets = set()
        for name in source.imports(for_types=for_types):
            target = name if name in sources else name.rpartition(".")[0]
            if target in sources and target != module:
                targets.add(target)
        found[module] = targets
    return found


@pytest.fixture(scope="session")
def edges(sources: dict[str, Source]) -> dict[str, set[str]]:
    return graph(sources)
