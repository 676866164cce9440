"""Every field of every request body does something, is refused, or is declared to do nothing."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import cohere
import pytest
from msgspec import Struct
from openai.types import embedding_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
    completion_create_params,
)

from trunkline.core.server.api.fields import fields_of
from trunkline.plugins.embedding.body_schemas import EmbeddingsBody
from trunkline.plugins.generation.chat_schemas import ChatBody, Message, StreamOptions
from trunkline.plugins.rerank.body_schemas import RerankBody

pytestmark = pytest.mark.field

HOLDERS = {"body", "message", "options"}  # what variables that hold a body, or a struct in one, are called


@pytest.fixture(scope="module")
def bodies(load_script: Callable[[str], ModuleType]) -> dict[type[Struct], list[str]]:
    found: dict[type[Struct], list[str]] = load_script("docs/generate.py").bodies()
    return found


def read_names(trees: Iterable[ast.Module]) -> set[str]:
    """Attributes that are read of bodies, and strings that may name such an attribute."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in HOLDERS:
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return names


def unread(schema: type[Struct], trees: Iterable[ast.Module]) -> list[str]:
    """Honoured fields that nothing reads."""
    names = read_names(trees)
    return [path for path, mark in fields_of(schema) if mark is None and path.rsplit(".", 1)[-1] not in names]


def test_honoured_fields_are_read(bodies: dict[type[Struct], list[str]], sources: dict[str, Any]) -> None:
    for schema in bodies:
        package = schema.__module__.rpartition(".")[0]
        own = [source for name, source in sources.items() if name.startswith(f"{package}.")]
        trees = [source.tree for source in own]
        assert len(trees) > 3
        assert unread(schema, trees) == [], schema.__name__


def test_a_field_that_nobody_reads_is_found() -> None:
    class Forgetful(Struct):
        text: str = ""
        forgotten: int = 0

    assert unread(Forgetful, [ast.parse("def run(body): return body.text, other.forgotten")]) == ["forgotten"]


def test_every_json_route_is_in_the_table(bodies: dict[type[Struct], list[str]]) -> None:
    routes = [route for labels in bodies.values() for route in labels]
    assert len(routes) == len(set(routes))
    for path in ("/generate", "/v1/chat/completions", "/encode", "/v1/embeddings", "/embed", "/v2/rerank", "/score"):
        assert f"`{path}`" in routes
    for path in ("/classify", "/v1/classify", "/abort_request", "/update_weights", "/get_weights_by_name"):
        assert f"`{path}`" in routes


# -- clients' own types ----------------------------------------------------------------------

MESSAGES = (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)


def fields(*types: type[Any]) -> set[str]:
    return {name for kind in types for base in kind.__mro__ for name in getattr(base, "__annotations__", ())}


@pytest.mark.parametrize(
    ("schema", "theirs"),
    [
        (ChatBody, fields(completion_create_params.CompletionCreateParamsBase) | {"stream"}),
        (StreamOptions, fields(ChatCompletionStreamOptionsParam)),
        (Message, {name for kind in MESSAGES for name in kind.__annotations__}),
        (EmbeddingsBody, set(embedding_create_params.EmbeddingCreateParams.__annotations__)),
    ],
)
def test_the_openai_sdk_s_fields_are_known(schema: type[Struct], theirs: set[str]) -> None:
    known = {path for path, _ in fields_of(schema)}
    assert len(theirs) > 1
    assert theirs - known == set()


@pytest.mark.parametrize("client", [cohere.Client, cohere.ClientV2])
def test_the_cohere_sdk_s_fields_are_known(client: type[Any]) -> None:
    theirs = set(client.rerank.__annotations__) - {"return", "request_options"}
    assert "documents" in theirs
    assert theirs - {path for path, _ in fields_of(RerankBody)} == set()
