"""Requests to OpenAI's routes, and the chunks of their streams."""

from __future__ import annotations

import json
from typing import Any

import httpx

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hello"}


async def chat(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post(CHAT, json={"model": "any", "messages": [USER], **body})


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post(COMPLETIONS, json={"model": "any", "prompt": "hello", **body})


def chunks_of(answer: httpx.Response | str) -> list[dict[str, Any]]:
    """The chunks of a stream that has ended."""
    text = answer if isinstance(answer, str) else answer.text
    assert text.endswith("data: [DONE]\n\n"), text
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
