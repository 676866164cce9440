"""smolagents: its model for OpenAI's API, and agents that call tools and write code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("smolagents",)
SET = "`OpenAIModel(model, api_base=…/v1, api_key=…)`"


@pytest.fixture(scope="module")
def outcome(outcomes: Callable[..., Any], applications: Callable[..., str]) -> Any:
    return outcomes(applications, "use_smolagents.py")


@pytest.mark.parametrize("case", ["answer", "stream"])
def test_answers_whole_and_streamed(outcome: Any, native: Any, case: str) -> None:
    assert outcome(case) == [native.answer, native.tokens]


def test_required_tools(outcome: Any) -> None:
    calls = outcome("tool")
    assert calls
    for name, arguments in calls:
        assert name == "book"
        assert json.loads(arguments).keys() == {"city", "days"}


def test_an_agent_that_calls_tools(outcome: Any) -> None:
    names, error = outcome("tool_calling_agent")
    assert names
    assert set(names) <= {"book", "final_answer"}
    assert error is None


def test_an_agent_with_structured_code(outcome: Any) -> None:
    text, tokens = outcome("code_agent")
    assert re.match(r'\{\s*"thought"', text)
    assert 0 < tokens <= 60
