"""Every field of every request body does something, is refused, or is declared to do nothing."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Annotated, Any, get_args, get_type_hints

import pytest
from msgspec import Struct

from trunkline.core.server.api.chat_messages import ChatMessage
from trunkline.core.server.api.fields import Refused, declared, fields_of
from trunkline.plugins.generation.native.body_schemas import GenerateBody
from trunkline.plugins.generation.openai.chat_schemas import ChatBody

pytestmark = pytest.mark.field

Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(scope="module")
def bodies(load_script: Callable[[str], ModuleType]) -> dict[type[Struct], list[str]]:
    found: dict[type[Struct], list[str]] = load_script("docs/generate.py").bodies()
    return found


def structs_of(schema: type[Struct]) -> set[type[Struct]]:
    """A body and the honoured structs in it."""
    inner = (
        part for name, hint in get_type_hints(schema).items() if name not in declared(schema) for part in in_hint(hint)
    )
    return {schema}.union(*(structs_of(part) for part in inner))


def package_of(struct: type[Struct]) -> str:
    """The package whose functions read a struct: that of its module, or the whole plugin."""
    parts = struct.__module__.split(".")
    return ".".join(parts[:3] if "plugins" in parts else parts[:-1])


def in_hint(hint: Any) -> Iterator[type[Struct]]:
    if isinstance(hint, type) and issubclass(hint, Struct):
        yield hint
    for part in get_args(hint):
        yield from in_hint(part)


def nodes_of(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function or module without those of functions inside it."""
    pending: list[ast.AST] = [*ast.iter_child_nodes(scope)]
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, Function):
            pending += ast.iter_child_nodes(node)


def holders(function: Function, structs: set[str]) -> set[str]:
    """Variables of a function that hold one of the structs: annotated parameters, and results of ``read_body``."""
    found = set()
    for node in nodes_of(function):
        if isinstance(node, ast.arg) and node.annotation and structs & names_in(node.annotation):
            found.add(node.arg)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Await):
            call = node.value.value
            if isinstance(call, ast.Call) and structs & names_in(*call.args):
                found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def functions_in(
    scope: ast.AST, structs: set[str], outer: frozenset[str] = frozenset()
) -> Iterator[tuple[Function, frozenset[str]]]:
    """All functions in a module or function, with the variables of each that hold one of the structs."""
    for function in (node for node in nodes_of(scope) if isinstance(node, Function)):
        nodes = list(nodes_of(function))
        bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
        bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        held = frozenset(holders(function, structs) | (outer - bound))
        yield function, held
        yield from functions_in(function, structs, held)


def targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def names_in(*nodes: ast.AST) -> set[str]:
    return {node.id for top in nodes for node in ast.walk(top) if isinstance(node, ast.Name)}


def strings_in(*nodes: ast.AST) -> set[str]:
    constants = (node for top in nodes for node in ast.walk(top) if isinstance(node, ast.Constant))
    return {node.value for node in constants if isinstance(node.value, str)}


def read_of(structs: set[str], trees: Sequence[ast.Module]) -> set[str]:
    """Attributes that functions read of variables that hold one of ``structs``.

    ``getattr(body, name)`` reads what the strings may name that ``name`` is one of in a loop.
    """
    constants: dict[str, ast.AST] = {}
    for tree in trees:
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
                constants |= dict.fromkeys(names_in(*targets(node)), node.value)
    names = set()
    for function, held in (found for tree in trees for found in functions_in(tree, structs)):
        loops = [node for node in nodes_of(function) if isinstance(node, ast.For | ast.comprehension)]
        for node in nodes_of(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in held:
                names.add(node.attr)
            elif isinstance(node, ast.Call) and names_in(node.func) == {"getattr"} and names_in(node.args[0]) & held:
                listed = [loop.iter for loop in loops if names_in(loop.target) & names_in(node.args[1])]
                mentioned = [constants[name] for name in names_in(*listed) & constants.keys()]
                names |= strings_in(*listed, *mentioned)
    return names


def unread(schema: type[Struct], trees: Sequence[ast.Module]) -> list[str]:
    """Honoured fields that nothing reads."""
    names = read_of({struct.__name__ for struct in structs_of(schema)}, trees)
    return [path for path, mark in fields_of(schema) if mark is None and path.rsplit(".", 1)[-1] not in names]


def test_honoured_fields_are_read(bodies: dict[type[Struct], list[str]], sources: dict[str, Any]) -> None:
    for schema in bodies:
        packages = tuple(f"{package_of(struct)}." for struct in structs_of(schema))
        trees = [source.tree for name, source in sources.items() if name.startswith(packages)]
        assert len(trees) > 3
        assert unread(schema, trees) == [], schema.__name__


class Part(Struct):
    kind: str = ""
    size: int = 0


class Attentive(Struct):
    text: str = ""
    count: int = 0
    part: Part | None = None
    parts: list[Part] = []


class Forgetful(Struct):
    text: str = ""
    count: int = 0
    dropped: Annotated[Any, Refused()] = None


ROUTES = """
OTHERS = ("count", "part")
UNUSED = "size"

def routes():
    async def attentive(request: AnyRequest) -> Response:
        body = await read_body(request, Attentive)
        return run(body.text, [kind(part) for part in body.parts], *(getattr(body, name) for name in OTHERS))

    async def forgetful(request: AnyRequest) -> Response:
        body = await read_body(request, Forgetful)
        return run(texts(body), "count")

def texts(given: Forgetful | None) -> str:
    return given.text

def kind(part: Part) -> str:
    return part.kind

def counted(body: Attentive) -> int:
    return body.count
"""


def test_a_field_that_nobody_reads_is_found() -> None:
    """Also where another body's route reads a field of that name, or a string names it."""
    trees = [ast.parse(ROUTES)]
    assert unread(Forgetful, trees) == ["count"]
    assert unread(Attentive, trees) == ["part.size", "parts[].size"]
    assert unread(Attentive, [ast.parse(ROUTES.replace("in OTHERS", "in ()"))]) == ["part", "part.size", "parts[].size"]


@pytest.mark.parametrize(
    ("schema", "module", "read"),
    [
        (ChatBody, "trunkline.plugins.generation.openai.chat_jobs", "body.reasoning_effort"),
        (GenerateBody, "trunkline.plugins.generation.native.make_job", "body.extra_key"),
        (ChatMessage, "trunkline.core.server.api.chat_messages", "role"),
    ],
)
def test_a_route_that_stops_reading_a_field_is_found(
    sources: dict[str, Any], schema: type[Struct], module: str, read: str
) -> None:
    packages = tuple(f"{package_of(struct)}." for struct in structs_of(schema))
    texts = {name: source.text for name, source in sources.items() if name.startswith(packages)}
    field = read.removeprefix("body.")
    assert unread(schema, [ast.parse(text) for text in texts.values()]) == []
    texts[module] = re.sub(rf"(body|message)\.{field}", "None", texts[module])
    assert unread(schema, [ast.parse(text) for text in texts.values()]) == [field]


def test_every_json_route_is_in_the_table(bodies: dict[type[Struct], list[str]]) -> None:
    routes = [route for labels in bodies.values() for route in labels]
    assert len(routes) == len(set(routes))
    for path in (
        "/generate",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/encode",
        "/v1/embeddings",
        "/embed",
        "/v2/rerank",
        "/score",
    ):
        assert f"`{path}`" in routes
    for path in ("/classify", "/v1/classify", "/abort_request", "/update_weights", "/get_weights_by_name"):
        assert f"`{path}`" in routes
