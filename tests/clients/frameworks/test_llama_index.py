"""LlamaIndex: its models for servers with OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("llama-index-llms-openai-like", "llama-index-embeddings-openai-like", "llama-index-core")
SET = (
    "`api_base=…/v1` and `api_key` of `OpenAILike` and `OpenAILikeEmbedding`; `is_chat_model=True` for chats, "
    "`is_function_calling_model=True` for tools, `should_use_structured_outputs=True` for JSON Schemas"
)


@pytest.fixture(scope="module")
def outcome(outcomes: Callable[..., Any], llama_index: Callable[..., str]) -> Any:
    return outcomes(llama_index, "use_llama_index.py")


def test_completions_with_the_defaults(outcome: Any, native: Any) -> None:
    assert outcome("completion") == [native.completion] * 2


def test_chats_whole_and_streamed(outcome: Any, native: Any) -> None:
    assert outcome("chat") == [native.answer, native.answer, native.tokens]


def test_structured_output_by_json_schema_and_by_a_required_tool(outcome: Any) -> None:
    assert [set(trip) for trip in outcome("structured_output")] == [{"city", "days"}] * 2


def test_embeddings(outcome: Any, native: Any) -> None:
    for vectors in outcome("embeddings"):
        np.testing.assert_allclose(np.array(vectors), native.vectors, atol=1e-5)


def test_an_index_with_a_query_engine(outcome: Any) -> None:
    sources, answer = outcome("index")
    assert sources == ["The sea is calm."]
    assert answer
