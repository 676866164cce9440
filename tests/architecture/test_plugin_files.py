"""Plugins look alike: a file's name says what is in it, so who knows one plugin finds the way in the others."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from .conftest import Source

HTTP = {"route", "get", "post", "put", "delete"}  # litestar's decorators
ALWAYS = {"__init__", "service", "offline", "schemas"}


def bases(source: Source) -> set[str]:
    """Names of all base classes in a file."""
    classes = [node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]
    return {base.id for node in classes for base in node.bases if isinstance(base, ast.Name)}


def defined(source: Source) -> set[str]:
    return {node.name for node in source.tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def decorators(source: Source) -> set[str]:
    nodes = [node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    calls = [one.func if isinstance(one, ast.Call) else one for node in nodes for one in node.decorator_list]
    return {call.id for call in calls if isinstance(call, ast.Name)}


def misnamed(source: Source) -> str:
    """What a plugin's file lacks that its name promises, or has that belongs elsewhere; "" when nothing."""
    name = source.path.stem
    if ("Stage" in bases(source)) != (name == "stage"):
        return f"{source.name}: stages are in stage.py, and only there"
    if ("hookimpl" in decorators(source)) != (name == "__init__" and source.name.count(".") == 1):
        return f"{source.name}: hooks are in the plugin's __init__.py, and only there"
    if (name == "routes" or name.endswith("_routes")) != bool(HTTP & decorators(source)):
        return f"{source.name}: route handlers are in routes.py and *_routes.py, and only there"
    if name == "settings" and "Struct" not in bases(source):
        return f"{source.name} has no settings"
    if name == "service" and "Service" not in defined(source):
        return f"{source.name} has no Service"
    if name.endswith("schemas") and not any(
        base in ("Struct", "TypedDict") or base.endswith("Body") for base in bases(source)
    ):
        return f"{source.name} has no schema"
    return ""


def in_plugins(sources: Iterable[Source]) -> list[Source]:
    return [one for one in sources if one.name.startswith("plugins.")]


def test_files_hold_what_their_names_say(sources: dict[str, Source]) -> None:
    assert [problem for one in in_plugins(sources.values()) if (problem := misnamed(one))] == []


def test_every_plugin_has_a_service_for_routes_and_scripts(repository: Path) -> None:
    folders = [path.parent for path in (repository / "plugins").glob("*/__init__.py")]
    assert len(folders) >= 5
    for folder in folders:
        assert {file.stem for file in folder.glob("*.py")} >= ALWAYS, folder.name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("stage", "X = 1"),
        ("recorder", "class A(Stage): ..."),
        ("routes", "def routes(): ..."),
        ("chat_routes", "def routes(): ..."),
        ("openai", "def routes():\n    @post('/v1/x')\n    async def x(): ..."),
        ("settings", 'TASK = "x"'),
        ("heads", "@hookimpl\ndef trunkline_heads(): ..."),
    ],
)
def test_a_misnamed_file_is_found(name: str, text: str) -> None:
    assert misnamed(Source(Path(f"{name}.py"), f"trunkline.plugins.odd.{name}", text, ast.parse(text)))


def test_what_the_engine_imports_of_a_plugin_needs_no_http(sources: dict[str, Source]) -> None:
    names = [one.module for one in in_plugins(sources.values()) if one.path.stem in ("stage", "recorder")]
    assert len(names) >= 5
    script = f"import sys, {', '.join(names)}; sys.exit('litestar' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
