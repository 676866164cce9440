"""An engine that scores by arithmetic, and an app with the plugin's routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from litestar import Litestar, Request
from transformers import AutoTokenizer

from trunkline.core.errors import RequestError
from trunkline.core.server.api.bodies import dialect_of, error_response
from trunkline.core.types import ModelInfo, ServedModel, Submission
from trunkline.plugins.reward import trunkline_routes

FINISH = {"type": "length", "length": 0}


class FakeReply:
    """Over from the beginning."""

    def __init__(self, item: Submission, labels: int) -> None:
        self.rid = item.rid
        self.prompt_tokens = len(item.prompt)
        self.cached_tokens = len(item.prompt) - 1
        self.weight_version = ""
        self.tokens: list[int] = []
        scores = np.array([sum(item.prompt) + label for label in range(labels)], dtype="<f4")
        self.data: Any = {"scores": scores.tobytes()}
        self.finish: dict[str, Any] | None = FINISH
        self.error: RequestError | None = None
        self.created = self.finished = time.perf_counter()

    async def result(self) -> None:
        if self.error is not None:
            raise self.error

    def cancel(self) -> None: ...


class FakeEngine:
    """A label's score is the sum of the ids plus the label's index."""

    def __init__(self, tokenizer: Any, config: dict[str, Any]) -> None:
        info = ModelInfo(
            path="/nowhere", architecture="LlamaForSequenceClassification", model_type="llama", context_length=32,
            vocab_size=512, hidden_size=8, causal=True, score_rows="last", config=config,
        )  # fmt: skip
        served = ServedModel(
            name="fake", model_path="fake", tokenizer_path="fake", info=info, tasks={"reward": False},
            max_total_tokens=1000, max_running_requests=8, dtype="float32", attention_backend="cpu",
        )  # fmt: skip
        self.models = [served]
        self.items: list[Submission] = []
        self._tokenizer = tokenizer

    def choose(self, task: str, name: str | None = None) -> ServedModel:
        assert task == "reward"
        return self.models[0]

    def tokenizer(self, model: str) -> Any:
        return self._tokenizer

    async def off_loop(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        return await asyncio.to_thread(function, *args)

    def submit(self, model: str, task: str, items: Sequence[Submission]) -> list[FakeReply]:
        self.items += items
        return [FakeReply(item, len(self.models[0].info.config.get("id2label", [0]))) for item in items]


@pytest.fixture
def config() -> dict[str, Any]:
    """The model's config.json; tests may change it before the first request."""
    return {"id2label": {"0": "bad", "1": "good"}}


@pytest.fixture
def tokenizer(zoo: Callable[[str], Path]) -> Any:
    """One that puts ``<s>`` before texts, as Llama's does."""
    return AutoTokenizer.from_pretrained(zoo("gemma2-score"))


@pytest.fixture
def engine(tokenizer: Any, config: dict[str, Any]) -> FakeEngine:
    return FakeEngine(tokenizer, config)


@pytest.fixture
async def client(engine: Any) -> AsyncIterator[httpx.AsyncClient]:
    def refuse(request: Request[Any, Any, Any], error: RequestError) -> Any:
        return error_response(error, dialect_of(request))

    settings: Any = {"server": SimpleNamespace(max_batch_size=4)}
    app = Litestar([*trunkline_routes(engine, settings)], exception_handlers={RequestError: refuse})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
