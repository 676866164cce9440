"""What ``core.server.api`` exports is used by plugins, and documented."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from inspect import isclass, isfunction
from pathlib import Path
from types import ModuleType

from trunkline.core.server import api

USERS = ("plugins", "examples", "tests/third_party")


def imported(texts: Iterable[str]) -> set[str]:
    """Names that some files import from ``core.server.api``."""
    nodes = (node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom))
    return {alias.name for node in nodes if node.module == api.__name__ for alias in node.names}


def undocumented(module: ModuleType) -> list[str]:
    """Classes and functions that a module exports without a docstring."""
    exported = {name: getattr(module, name) for name in module.__all__}
    return [name for name, value in exported.items() if (isclass(value) or isfunction(value)) and not value.__doc__]


def test_every_export_is_used_by_a_plugin_or_an_example(repository: Path) -> None:
    files = [path for folder in USERS for path in (repository / folder).rglob("*.py")]
    assert imported(path.read_text() for path in files) == set(api.__all__)


def test_every_export_has_a_docstring() -> None:
    assert undocumented(api) == []


def test_what_lacks_a_docstring_is_found() -> None:
    module = ModuleType("odd")
    exec("__all__ = ['f', 'X']\ndef f(): ...\nX = 1", module.__dict__)
    assert undocumented(module) == ["f"]
