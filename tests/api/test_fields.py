"""Every refused field of every route, sent to a live server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import httpx
import pytest
from msgspec import Struct

from trunkline.core.server.api.fields import Refused, fields_of

pytestmark = pytest.mark.field

# What each body must have at least.
REQUIRED: dict[str, dict[str, Any]] = {
    "GenerateBody": {"text": "a", "sampling_params": {"max_new_tokens": 0}},
    "ChatBody": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "ResponsesBody": {"input": "a", "max_output_tokens": 1},
    "CompletionBody": {"prompt": "a", "max_tokens": 1},
    "TokenizeBody": {"messages": [{"role": "user", "content": "a"}]},
    "EncodeBody": {"text": "a"},
    "EmbeddingsBody": {"input": "a"},
    "EmbedBody": {"inputs": "a"},
    "CohereEmbedBody": {"inputs": [{"content": [{"type": "text", "text": "a"}]}]},
    "RerankBody": {"query": "a", "documents": ["b"]},
    "ScoreBody": {"text_1": "a", "text_2": "b"},
    "ClassifyBody": {"text": "a"},
    "OpenAIClassifyBody": {"input": "a"},
}


@pytest.fixture(scope="module")
def bodies(load_script: Callable[[str], ModuleType]) -> dict[type[Struct], list[str]]:
    found: dict[type[Struct], list[str]] = load_script("docs/generate.py").bodies()
    return found


def refused(bodies: dict[type[Struct], list[str]]) -> Iterator[tuple[str, str, Refused, dict[str, Any]]]:
    """(route, field, its declaration, a body without it) of all refused fields."""
    for schema, routes in bodies.items():
        for path, mark in fields_of(schema):
            if isinstance(mark, Refused):
                for route in routes:
                    yield route.strip("`"), path, mark, REQUIRED.get(schema.__name__, {})


def put(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The body with ``value`` at ``path``, such as ``messages[].audio``."""
    head, _, rest = path.partition(".")
    if not rest:
        return body | {head: value}
    if head.endswith("[]"):
        name = head.removesuffix("[]")
        return body | {name: [put(body[name][0], rest, value), *body[name][1:]]}
    return body | {head: put(body.get(head, {}), rest, value)}


def message(answer: httpx.Response) -> str:
    told = answer.json() if answer.content else {}
    error = (told.get("error") or told) if isinstance(told, dict) else {}
    return str(error.get("message", ""))


def test_values_that_ask_for_something_are_a_400_that_names_the_field(
    http: httpx.Client, bodies: dict[type[Struct], list[str]]
) -> None:
    count = 0
    for route, path, mark, body in refused(bodies):
        for value in ("x", [1], {"a": 1}, *(() if mark.empty else (0, {}))):
            answer = http.post(route, json=put(body, path, value))
            expected = mark.message.format(field=path.replace("[]", "[0]"))
            assert (answer.status_code, message(answer)) == (400, expected), (route, path, value)
            count += 1
    assert count > 300


def test_neutral_values_are_never_the_reason_for_a_400(
    http: httpx.Client, bodies: dict[type[Struct], list[str]]
) -> None:
    for route, path, mark, body in refused(bodies):
        empty: tuple[Any, ...] = (False, 0, "", [], {}) if mark.empty else ()
        plain = message(http.post(route, json=body))
        for value in (None, *empty, *mark.neutral):
            answer = http.post(route, json=put(body, path, value))
            assert message(answer) == plain, (route, path, value)
