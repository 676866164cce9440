"""Pydantic AI: agents with its models for the Chat Completions and the Responses API, and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("pydantic-ai-slim",)
SET = "`OpenAIChatModel(model, provider=OpenAIProvider(base_url=…/v1, api_key=…))`, or `OpenAIResponsesModel`"


@pytest.fixture(scope="module")
def outcome(outcomes: Callable[..., Any], applications: Callable[..., str]) -> Any:
    return outcomes(applications, "use_pydantic_ai.py")


def test_answers(outcome: Any, native: Any) -> None:
    assert outcome("answer") == [[native.answer, native.tokens]] * 2


def test_streams(outcome: Any, native: Any) -> None:
    assert outcome("stream") == [native.answer] * 2


def test_output_by_json_schema_and_by_a_tool(outcome: Any) -> None:
    assert [set(trip) for trip in outcome("structured_output")] == [{"city", "days"}] * 4


def test_embeddings(outcome: Any, native: Any) -> None:
    np.testing.assert_allclose(np.array(outcome("embeddings")), native.vectors, atol=1e-5)
