"""Size of files and functions, and bounds of numbers that users set."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

from msgspec import Struct
from msgspec import inspect as schema_types

from trunkline.core.commands import compat
from trunkline.core.commands.serve import all_flags
from trunkline.core.config import settings_groups
from trunkline.core.host import Host
from trunkline.core.settings import ModelSettings, PluginSelection

FILE, FUNCTION = 300, 60  # lines; a function's docstring doesn't count
FOLDER = 18  # modules, without __init__.py
FLAGS = 75  # of `trunkline serve`: who adds one changes this number, and has asked whether a default would do


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def test_files_are_short(sources: dict[str, Any]) -> None:
    lines = {source.name: source.text.count("\n") for source in sources.values()}
    assert {name: count for name, count in lines.items() if count > FILE} == {}


def test_folders_are_small(sources: dict[str, Any]) -> None:
    modules = Counter(source.path.parent for source in sources.values() if source.path.name != "__init__.py")
    assert {str(folder): count for folder, count in modules.items() if count > FOLDER} == {}


def test_functions_are_short(sources: dict[str, Any]) -> None:
    long = {
        f"{source.name}.{node.name}": length(node)
        for source in sources.values()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > FUNCTION
    }
    assert long == {}


def numbers(described: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, type) of every int and float in a field's type."""
    if isinstance(described, schema_types.IntType | schema_types.FloatType):
        yield path, described
    for child in ("type", "item_type", "value_type"):
        if hasattr(described, child):
            yield from numbers(getattr(described, child), path)
    for children in ("types", "item_types"):
        for one in getattr(described, children, ()):
            yield from numbers(one, path)


def unbounded(schema: type[Struct]) -> list[str]:
    """Fields with a number that may grow without limit (a float needs one bound, an int two)."""
    described = schema_types.type_info(schema)
    assert isinstance(described, schema_types.StructType)
    bad = []
    for field in described.fields:
        for path, number in numbers(field.type, f"{schema.__name__}.{field.name}"):
            low = number.ge is not None or number.gt is not None
            high = number.le is not None or number.lt is not None
            if not (low and high if isinstance(number, schema_types.IntType) else low or high):
                bad.append(path)
    return bad


def schemas() -> list[type[Struct]]:
    return [ModelSettings, PluginSelection, *(group.schema for group in settings_groups(Host.load()).values())]


def test_the_number_of_flags() -> None:
    """Of our own: SGLang's flags that are accepted without an effect are not counted."""
    flags = {flag.field for flag in all_flags(Host.load()) if flag.group != compat.GROUP}
    assert len(flags) == FLAGS


def test_settings_are_described_and_bounded() -> None:
    for schema in schemas():
        assert unbounded(schema) == []
        described = schema_types.type_info(schema)
        assert isinstance(described, schema_types.StructType)
        for field in described.fields:
            assert "description" in str(field.type), f"{schema.__name__}.{field.name} has no description"


def test_request_bodies_are_bounded(sources: dict[str, Any]) -> None:
    modules = [module for module in sources if module.startswith("trunkline.plugins.") and module.endswith("schemas")]
    assert modules
    for name in modules:
        module = importlib.import_module(name)
        for schema in vars(module).values():
            if inspect.isclass(schema) and issubclass(schema, Struct) and schema.__module__ == name:
                assert unbounded(schema) == []


def test_an_unbounded_number_is_found() -> None:
    class Loose(Struct):
        deep: list[dict[str, int | None]] = []
        fine: bool = False

    assert unbounded(Loose) == ["Loose.deep"]
