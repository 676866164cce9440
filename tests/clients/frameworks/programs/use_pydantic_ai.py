"""Agents of Pydantic AI, with both of its models for OpenAI's API."""

from __future__ import annotations

from typing import Any

from cases import TASK, Trip, report
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.embeddings import Embedder
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

PROVIDER = OpenAIProvider(base_url=TASK.chat, api_key="none")
MODELS = [make("default", provider=PROVIDER) for make in (OpenAIChatModel, OpenAIResponsesModel)]
SETTINGS: Any = {"temperature": 0, "max_tokens": TASK.tokens}
LONGER: Any = {"temperature": 0, "max_tokens": 200}


def answer() -> list[Any]:
    results = [Agent(model, model_settings=SETTINGS).run_sync(TASK.question) for model in MODELS]
    return [[result.output, result.usage.output_tokens] for result in results]


async def stream() -> list[Any]:
    found = []
    for model in MODELS:
        async with Agent(model, model_settings=SETTINGS).run_stream(TASK.question) as result:
            found.append("".join([delta async for delta in result.stream_text(delta=True, debounce_by=None)]))
    return found


def structured_output() -> list[Any]:
    """By a JSON Schema and by the call of a tool, with each model."""
    forms = (NativeOutput(Trip), ToolOutput(Trip))
    agents = [Agent(model, output_type=form, model_settings=LONGER) for model in MODELS for form in forms]
    return [agent.run_sync("Plan a trip.").output.model_dump() for agent in agents]


def embeddings() -> list[Any]:
    provider = OpenAIProvider(base_url=TASK.vectors, api_key="none")
    embedder = Embedder(OpenAIEmbeddingModel("default", provider=provider))
    return [list(vector) for vector in embedder.embed_documents_sync(TASK.texts).embeddings]


if __name__ == "__main__":
    report(answer, stream, structured_output, embeddings)
