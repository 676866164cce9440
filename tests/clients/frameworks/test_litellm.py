"""LiteLLM's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("litellm",)
SET = (
    "`api_base=…/v1` and `api_key`; the model is `openai/NAME` or `hosted_vllm/NAME`, for completions "
    "`text-completion-openai/NAME`"
)


@pytest.fixture(scope="module")
def outcome(outcomes: Callable[..., Any], applications: Callable[..., str]) -> Any:
    return outcomes(applications, "use_litellm.py")


@pytest.mark.parametrize("case", ["answer", "stream", "responses"])
def test_answers_whole_streamed_and_from_the_responses_api(outcome: Any, native: Any, case: str) -> None:
    assert outcome(case) == [native.answer, native.tokens]


def test_structured_output(outcome: Any) -> None:
    assert set(outcome("structured_output")) == {"city", "days"}


def test_forced_tools(outcome: Any) -> None:
    name, arguments = outcome("tool")
    assert name == "book"
    assert set(arguments) == {"city", "days"}


def test_completions(outcome: Any, native: Any) -> None:
    assert outcome("completion") == [native.completion] * 2


@pytest.mark.parametrize("case", ["embeddings", "embeddings_as_of_vllm"])
def test_embeddings(outcome: Any, native: Any, case: str) -> None:
    np.testing.assert_allclose(np.array(outcome(case)), native.vectors, atol=1e-5)
