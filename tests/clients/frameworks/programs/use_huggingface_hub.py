"""huggingface_hub's InferenceClient: chats. Its vectors are in test_embedding.py."""

from __future__ import annotations

from typing import Any

from cases import TASK, Trip, report
from huggingface_hub import InferenceClient

CLIENT = InferenceClient(base_url=TASK.chat)
MESSAGES: Any = [{"role": "user", "content": TASK.question}]
BOOK: Any = {
    "type": "function",
    "function": {"name": "book", "description": "Book a trip.", "parameters": Trip.model_json_schema()},
}


def chat() -> list[Any]:
    reply = CLIENT.chat_completion(MESSAGES, max_tokens=TASK.tokens, temperature=0)
    named = CLIENT.chat.completions.create(model="default", messages=MESSAGES, max_tokens=TASK.tokens, temperature=0)
    return [reply.choices[0].message.content, named.choices[0].message.content, reply.usage.completion_tokens]


def stream() -> str:
    chunks = CLIENT.chat_completion(MESSAGES, max_tokens=TASK.tokens, temperature=0, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def structured_output() -> Any:
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "Trip", "schema": Trip.model_json_schema(), "strict": True},
    }
    reply = CLIENT.chat_completion(MESSAGES, max_tokens=200, temperature=0, response_format=form)
    return Trip.model_validate_json(reply.choices[0].message.content).model_dump()


def tool() -> list[Any]:
    reply = CLIENT.chat_completion(MESSAGES, max_tokens=200, temperature=0, tools=[BOOK], tool_choice="required")
    return [[call.function.name, call.function.arguments] for call in reply.choices[0].message.tool_calls]


if __name__ == "__main__":
    report(chat, stream, structured_output, tool)
