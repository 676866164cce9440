"""LangChain's integration for OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("langchain-openai",)
SET = (
    "`base_url=…/v1` and `api_key` of `ChatOpenAI`, `OpenAI` and `OpenAIEmbeddings`, the last with "
    "`check_embedding_ctx_length=False`: by default it sends token ids of OpenAI's tokenizer"
)


@pytest.fixture(scope="module")
def outcome(outcomes: Callable[..., Any], applications: Callable[..., str]) -> Any:
    return outcomes(applications, "use_langchain.py")


def test_answers(outcome: Any, native: Any) -> None:
    assert outcome("answer") == [native.answer, native.tokens]


def test_streams(outcome: Any, native: Any) -> None:
    assert outcome("stream") == native.answer


def test_the_responses_api(outcome: Any, native: Any) -> None:
    assert outcome("responses") == native.answer


def test_structured_output_by_json_schema_and_by_function_calling(outcome: Any) -> None:
    assert [set(trip) for trip in outcome("structured_output")] == [{"city", "days"}] * 2


def test_forced_tools_and_their_results_in_the_history(outcome: Any) -> None:
    [call], result, after = outcome("tools")
    assert call["name"] == "Trip"
    assert result == f"Booked: {call['args']['days']} days in {call['args']['city']}."
    assert after


def test_completions(outcome: Any, native: Any) -> None:
    assert outcome("completion") == [native.completion, native.completion, [native.completion] * 2]


def test_embeddings(outcome: Any, native: Any) -> None:
    np.testing.assert_allclose(np.array(outcome("embeddings")), native.vectors, atol=1e-5)


def test_embeddings_of_token_ids_are_refused_with_advice(outcome: Any) -> None:
    message = outcome("embeddings_of_token_ids")
    assert "vocab size (30522)" in message
    assert "text" in message
