"""DSPy: its language models, a signature, and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.clients

PROMPT = "The capital of France is"
CLIENTS = ("dspy",)
SET = (
    '`dspy.LM("openai/NAME", api_base=…/v1, api_key=…)` with any `model_type`; `dspy.JSONAdapter()` sends a schema '
    "only for names that it knows, such as `openai/gpt-4o-mini`"
)


@pytest.fixture(scope="module")
def outcome(outcomes: Callable[..., Any], applications: Callable[..., str]) -> Any:
    return outcomes(applications, "use_dspy.py")


def test_answers(outcome: Any, native: Any) -> None:
    assert outcome("answer") == [native.answer, native.tokens]


def test_the_model_types_text_and_responses(outcome: Any, native: Any, generated: Callable[..., Any]) -> None:
    assert outcome("completion") == generated(f"{PROMPT}\n\nBEGIN RESPONSE:", 16)["text"]  # as DSPy ends the prompt
    assert outcome("responses") == native.answer


def test_typed_fields_of_a_signature(outcome: Any) -> None:
    assert outcome("structured_output") in ("Paris", "Rome", "Oslo")


def test_embeddings(outcome: Any, native: Any) -> None:
    np.testing.assert_allclose(np.array(outcome("embeddings")), native.vectors, atol=1e-5)
