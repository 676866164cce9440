"""LangChain's models for OpenAI's API."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import openai
from cases import TASK, Trip, report
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

SERVER: Any = {"base_url": TASK.chat, "api_key": "none", "model": "default", "temperature": 0, "max_retries": 0}
VECTORS: Any = {"base_url": TASK.vectors, "api_key": "none", "max_retries": 0}


@tool
def book(city: str, days: int) -> str:
    """Book a trip."""
    return f"Booked: {days} days in {city}."


def answer() -> list[Any]:
    message = ChatOpenAI(**SERVER, max_tokens=TASK.tokens).invoke(TASK.question)
    return [message.content, message.usage_metadata["output_tokens"]]


def stream() -> str:
    return "".join(str(chunk.content) for chunk in ChatOpenAI(**SERVER, max_tokens=TASK.tokens).stream(TASK.question))


def responses() -> str:
    message = ChatOpenAI(**SERVER, max_tokens=TASK.tokens, use_responses_api=True).invoke(TASK.question)
    return "".join(block["text"] for block in message.content_blocks if block["type"] == "text")


def structured_output() -> list[Any]:
    model = ChatOpenAI(**SERVER, max_tokens=200)
    methods: Any = ("json_schema", "function_calling")
    return [model.with_structured_output(Trip, method=method).invoke("Plan a trip.").model_dump() for method in methods]


def tools() -> list[Any]:
    """A forced call with its result, and the answer after it."""
    model = ChatOpenAI(**SERVER, max_tokens=200)
    asked = ("user", "A week in Rome, please.")
    call = model.bind_tools([Trip], tool_choice="any", parallel_tool_calls=False).invoke([asked])
    result = book.invoke(
        {"name": "book", "args": call.tool_calls[0]["args"], "id": call.tool_calls[0]["id"], "type": "tool_call"}
    )
    after = model.bind_tools([Trip], tool_choice="none").invoke([asked, call, result])
    return [call.tool_calls, result.content, after.content]


def completion() -> list[Any]:
    model = OpenAI(**SERVER, max_tokens=TASK.tokens)
    return [model.invoke(TASK.prompt), "".join(model.stream(TASK.prompt)), model.batch([TASK.prompt] * 2)]


def embeddings() -> list[Any]:
    return OpenAIEmbeddings(**VECTORS, check_embedding_ctx_length=False).embed_documents(TASK.texts)


def embeddings_of_token_ids() -> str:
    """By default, texts are sent as the ids of a tokenizer of OpenAI's."""
    # The vocabulary would be downloaded; litellm has a copy of it.
    [folder] = find_spec("litellm").submodule_search_locations
    os.environ["TIKTOKEN_CACHE_DIR"] = os.path.join(folder, "litellm_core_utils", "tokenizers")
    try:
        OpenAIEmbeddings(**VECTORS).embed_query("Trunkline answers SentenceTransformers' questions.")
    except openai.BadRequestError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    report(answer, stream, responses, structured_output, tools, completion, embeddings, embeddings_of_token_ids)
