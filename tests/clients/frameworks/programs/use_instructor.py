"""instructor: objects of a pydantic model, in the modes that OpenAI's API has."""

from __future__ import annotations

import contextlib
from typing import Any

import instructor
import openai
from cases import TASK, Trip, report
from instructor.core.exceptions import InstructorError

MESSAGES: list[Any] = [{"role": "user", "content": "Plan a trip of five days to Oslo."}]
FIELDS: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 200, "max_retries": 0}


def extract(mode: Any) -> list[Any]:
    """The object, and the completion tokens of the reply that it was made of."""
    with openai.OpenAI(base_url=TASK.chat, api_key="none", max_retries=0) as client:
        patched = instructor.from_openai(client, mode=mode)
        trip, reply = patched.create_with_completion(response_model=Trip, messages=MESSAGES, **FIELDS)
    return [trip.model_dump(), reply.usage.completion_tokens]


def json_mode() -> list[Any]:
    """The server is only asked for some JSON object: the model must find the schema in the prompt."""
    found = []
    with openai.OpenAI(base_url=TASK.chat, api_key="none", max_retries=0) as client:
        patched = instructor.from_openai(client, mode=instructor.Mode.JSON)
        patched.on("completion:response", lambda reply: found.append(reply))
        with contextlib.suppress(InstructorError):
            patched.create(response_model=Trip, messages=MESSAGES, **FIELDS)
    return [[reply.choices[0].message.content, reply.choices[0].finish_reason] for reply in found]


def json_schema_mode() -> list[Any]:
    return extract(instructor.Mode.JSON_SCHEMA)


def tools_mode() -> list[Any]:
    return extract(instructor.Mode.TOOLS)


def partial_objects() -> list[Any]:
    with openai.OpenAI(base_url=TASK.chat, api_key="none", max_retries=0) as client:
        patched = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
        found = [trip.model_dump() for trip in patched.create_partial(response_model=Trip, messages=MESSAGES, **FIELDS)]
    return found


if __name__ == "__main__":
    report(json_mode, json_schema_mode, tools_mode, partial_objects)
