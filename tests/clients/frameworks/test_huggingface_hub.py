"""huggingface_hub's InferenceClient in chats."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("huggingface_hub",)
SET = "`InferenceClient(base_url=…/v1)`; `HF_HUB_OFFLINE` mustn't be set"


@pytest.fixture(scope="module")
def outcome(outcomes: Callable[..., Any], online: Callable[..., str]) -> Any:
    return outcomes(online, "use_huggingface_hub.py")


def test_chats(outcome: Any, native: Any) -> None:
    assert outcome("chat") == [native.answer, native.answer, native.tokens]


def test_streams(outcome: Any, native: Any) -> None:
    assert outcome("stream") == native.answer


def test_structured_output(outcome: Any) -> None:
    assert set(outcome("structured_output")) == {"city", "days"}


def test_required_tools(outcome: Any) -> None:
    for name, arguments in outcome("tool"):
        assert name == "book"
        assert json.loads(arguments).keys() == {"city", "days"}
