"""instructor: objects of a pydantic model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("instructor",)
SET = "`instructor.from_openai(OpenAI(base_url=…/v1, api_key=…), mode=…)`; `Mode.JSON_SCHEMA` is enforced by a grammar"


@pytest.fixture(scope="module")
def outcome(outcomes: Callable[..., Any], with_instructor: Callable[..., str]) -> Any:
    return outcomes(with_instructor, "use_instructor.py")


@pytest.mark.parametrize("mode", ["json_schema_mode", "tools_mode"])
def test_objects_by_json_schema_and_by_a_tool(outcome: Any, mode: str) -> None:
    trip, tokens = outcome(mode)
    assert set(trip) == {"city", "days"}
    assert 0 < tokens < 200


def test_some_json_object(outcome: Any) -> None:
    """The server is only asked for an object; the small model doesn't find the schema in the prompt."""
    [[text, reason]] = outcome("json_mode")
    assert text.lstrip().startswith("{")
    assert reason == "length" or isinstance(json.loads(text), dict)


def test_partial_objects(outcome: Any) -> None:
    *partial, last = outcome("partial_objects")
    assert len(partial) > 2
    assert last.keys() == {"city", "days"}
    assert all(last["city"].startswith(trip["city"] or "") for trip in partial)
