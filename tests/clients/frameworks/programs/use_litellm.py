"""LiteLLM's functions for servers with OpenAI's API."""

from __future__ import annotations

import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else a list of prices is downloaded at the import

import litellm
from cases import TASK, Trip, report

CHAT: Any = {"model": "openai/default", "api_base": TASK.chat, "api_key": "none", "temperature": 0, "num_retries": 0}
ASKED: Any = {**CHAT, "messages": [{"role": "user", "content": TASK.question}], "max_tokens": TASK.tokens}
BOOK = {
    "type": "function",
    "function": {"name": "book", "description": "Book a trip.", "parameters": Trip.model_json_schema()},
}


def answer() -> list[Any]:
    reply = litellm.completion(**ASKED)
    return [reply.choices[0].message.content, reply.usage.completion_tokens]


def stream() -> list[Any]:
    chunks = list(litellm.completion(**ASKED, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return [text, litellm.stream_chunk_builder(chunks).usage.completion_tokens]


def structured_output() -> Any:
    reply = litellm.completion(**{**ASKED, "max_tokens": 200}, response_format=Trip)
    return Trip.model_validate_json(reply.choices[0].message.content).model_dump()


def tool() -> list[Any]:
    choice = {"type": "function", "function": {"name": "book"}}
    reply = litellm.completion(**{**ASKED, "max_tokens": 200}, tools=[BOOK], tool_choice=choice)
    [call] = reply.choices[0].message.tool_calls
    return [call.function.name, Trip.model_validate_json(call.function.arguments).model_dump()]


def completion() -> list[Any]:
    asked = {**CHAT, "model": "text-completion-openai/default", "prompt": TASK.prompt, "max_tokens": TASK.tokens}
    chunks = litellm.text_completion(**asked, stream=True)
    return [litellm.text_completion(**asked).choices[0].text, "".join(chunk.choices[0].text or "" for chunk in chunks)]


def responses() -> list[Any]:
    asked: Any = {"model": "openai/default", "api_base": TASK.chat, "api_key": "none", "temperature": 0}
    reply = litellm.responses(**asked, input=TASK.question, max_output_tokens=TASK.tokens)
    return [reply.output[0].content[0].text, reply.usage.output_tokens]


def embeddings() -> list[Any]:
    reply = litellm.embedding(model="openai/default", api_base=TASK.vectors, api_key="none", input=TASK.texts)
    return [entry["embedding"] for entry in reply.data]


def embeddings_as_of_vllm() -> list[Any]:
    reply = litellm.embedding(model="hosted_vllm/default", api_base=TASK.vectors, api_key="none", input=TASK.texts)
    return [entry["embedding"] for entry in reply.data]


if __name__ == "__main__":
    report(answer, stream, structured_output, tool, completion, responses, embeddings, embeddings_as_of_vllm)
