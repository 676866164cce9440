"""Agents of OpenAI's SDK for Python, with its models for the Responses and the Chat Completions API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("openai-agents",)
SET = (
    "`OpenAIResponsesModel(model, AsyncOpenAI(base_url=…/v1, api_key=…))` or `OpenAIChatCompletionsModel` with the "
    "same arguments; `set_tracing_disabled(True)`"
)


@pytest.fixture(scope="module")
def outcome(outcomes: Callable[..., Any], applications: Callable[..., str]) -> Any:
    return outcomes(applications, "use_openai_agents.py")


def test_answers(outcome: Any, native: Any) -> None:
    assert outcome("answer") == [[native.answer, native.tokens]] * 2


def test_streams(outcome: Any, native: Any) -> None:
    assert outcome("stream") == [[native.answer] * 2] * 2


def test_output_types(outcome: Any) -> None:
    assert [set(trip) for trip in outcome("structured_output")] == [{"city", "days"}] * 2


def test_forced_tools_and_their_results_in_the_history(outcome: Any) -> None:
    for trips, first, kinds in outcome("tool"):
        assert len(trips) >= 2
        assert first == f"Booked: {trips[0]['days']} days."
        assert kinds[:2] == ["tool_call_item", "tool_call_output_item"]
        assert kinds[-1] == "message_output_item"
