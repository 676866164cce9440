"""The hook specifications are the plugin author's manual, so they have to be right."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
from msgspec import Meta, Struct

from trunkline.core import hookspecs, types
from trunkline.core.discovery import Plugin
from trunkline.core.host import Host
from trunkline.plugins import generation
from trunkline.plugins.generation import hooks as generation_hooks


def specified(module: ModuleType) -> dict[str, Any]:
    """The hooks that a module specifies, by name."""
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function) and hasattr(function, "trunkline_spec")
    }


HOOKS = specified(hookspecs)
OF_GENERATION = specified(generation_hooks)
ALL = HOOKS | OF_GENERATION


def example(function: Any) -> str:
    """The indented block after ``::`` in a docstring."""
    lines = inspect.cleandoc(function.__doc__).splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith("::"))
    return textwrap.dedent("\n".join(lines[start + 1 :]))


def test_there_are_hooks() -> None:
    assert len(HOOKS) >= 10
    assert len(OF_GENERATION) >= 2


@pytest.mark.parametrize("name", ALL)
def test_documented_with_process_and_moment(name: str) -> None:
    """The first paragraph says what the hook is for, the second when it is called."""
    first, second = inspect.cleandoc(ALL[name].__doc__ or "").split("\n\n")[:2]
    assert first.endswith("."), first
    assert re.match(r"(Front|Engine): once", second), "the second paragraph says in which process and how often"


@pytest.mark.parametrize("name", ALL)
def test_annotated(name: str) -> None:
    signature = inspect.signature(ALL[name])
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("name", ALL)
def test_the_example_runs_and_is_a_plugin(name: str) -> None:
    module = ModuleType(f"example_{name}")
    names = vars(types) | {"hookimpl": hookspecs.hookimpl, "Struct": Struct, "Annotated": Annotated, "Meta": Meta}
    space = names | {"__name__": module.__name__}
    exec(compile(example(ALL[name]), f"<{name}>", "exec"), space)
    assert name in space, "the example implements its own hook"
    setattr(module, name, space[name])
    if name == "trunkline_hookspecs":
        return  # its example names a module of the author's
    specifying = [Plugin("generation", generation.__name__)] if name in OF_GENERATION else []
    host = Host([*specifying, Plugin("example", module.__name__, module=module)], required=["example"])
    assert host.plugins["example"].hooks == [name]


def asked(tree: ast.AST) -> set[str]:
    """The strings that a file's code uses, among them the hooks that it asks for."""
    return {
        node.value
        for parent in ast.walk(tree)
        if not isinstance(parent, ast.Expr)  # a docstring
        for node in ast.iter_child_nodes(parent)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def called(tree: ast.AST) -> set[str]:
    """The methods that a file calls of an object named ``host``, ``_host`` or ``self.host``."""
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {
        function.attr
        for function in functions
        if isinstance(function, ast.Attribute) and ast.unparse(function.value).rpartition(".")[2].lstrip("_") == "host"
    }


@pytest.mark.parametrize("name", HOOKS)
def test_asked_by_the_host(name: str, sources: dict[str, Any]) -> None:
    files = (sources["trunkline.core.host"], sources["trunkline.core.registry"])
    assert any(name in asked(file.tree) for file in files)


def test_only_code_asks_and_calls() -> None:
    tree = ast.parse("# host.a()\n'b'\nask('c')\nself._host.d()\nhost.e\n'host.f()'")
    assert asked(tree) == {"c"}
    assert called(tree) == {"d"}


HOST_METHODS = [name.removeprefix("trunkline_") for name in HOOKS if name != "trunkline_hookspecs"]


@pytest.mark.parametrize("method", HOST_METHODS)
def test_answers_are_used(method: str, sources: dict[str, Any]) -> None:
    """The host's method of the hook's name is called."""
    assert any(method in called(source.tree) for source in sources.values()), f"host.{method}() is called nowhere"


@pytest.mark.parametrize("name", HOOKS)
def test_tested(name: str, repository: Path) -> None:
    texts = [path.read_text() for path in (repository / "tests" / "core").rglob("test_*.py")]
    assert any(name in text for text in texts)


@pytest.mark.parametrize("name", OF_GENERATION)
def test_those_of_generation_are_asked_and_tested(name: str, sources: dict[str, Any], repository: Path) -> None:
    assert name in asked(sources["trunkline.plugins.generation"].tree)
    texts = [path.read_text() for path in (repository / "tests" / "plugins" / "generation").rglob("test_*.py")]
    assert any(name in text for text in texts)
