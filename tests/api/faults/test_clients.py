"""The accounting of the fault matrix: what counts as an answer, as a clear error, and as lost."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from . import clients
from .clients import LOST, Job, send
from .table import ABORTED, ANSWERED, CUT, FAILED, OUTCOMES, RETRY

WAITING = Job("/generate", {}, (5, 6, 7))
STREAM = Job("/generate", {"stream": True}, (5, 6, 7))
VECTOR = Job("/encode", {}, (0.5, 0.25))
UPDATED = Job("/generate", {"stream": True}, (5, 6, 7), (5, 8, 9))
DONE = "data: [DONE]\n\n"
STOP = {"type": "length", "length": 3}
LATER = {"retry-after": "5"}


def record(ids: list[int], finish: dict[str, Any] | None) -> str:
    return f"data: {json.dumps({'output_ids': ids, 'meta_info': {'finish_reason': finish}})}\n\n"


def aborted(ids: list[int], status: int | None = 503) -> str:
    return record([5], None) + record(ids, {"type": "abort", "status_code": status}) + DONE


async def outcome_of(job: Job, reply: httpx.Response) -> str:
    transport = httpx.MockTransport(lambda request: reply)
    async with httpx.AsyncClient(base_url="http://server", transport=transport) as http:
        return await send(http, job)


@pytest.mark.parametrize(
    ("job", "reply", "outcome"),
    [
        (WAITING, httpx.Response(200, json={"output_ids": [5, 6, 7]}), ANSWERED),
        (WAITING, httpx.Response(200, json={"output_ids": [5, 6]}), "wrong answer"),
        (WAITING, httpx.Response(503, headers=LATER), RETRY),
        (WAITING, httpx.Response(503), "unclear reply"),
        (WAITING, httpx.Response(500), FAILED),
        (WAITING, httpx.Response(404), "unclear reply"),
        (VECTOR, httpx.Response(200, json={"embedding": [0.5, 0.25]}), ANSWERED),
        (VECTOR, httpx.Response(200, json={"embedding": [0.5, 0.26]}), "wrong answer"),
        (VECTOR, httpx.Response(200, json={"embedding": [0.5]}), "wrong answer"),
        (STREAM, httpx.Response(200, text=record([5], None) + record([5, 6, 7], STOP) + DONE), ANSWERED),
        (STREAM, httpx.Response(200, text=record([5, 6, 8], STOP) + DONE), "wrong answer"),
        (STREAM, httpx.Response(200, text=record([5, 6, 7], STOP)), "stream without an end"),
        (STREAM, httpx.Response(200, text=aborted([5, 6])), ABORTED),
        (STREAM, httpx.Response(200, text=aborted([5, 7])), "wrong answer"),
        (STREAM, httpx.Response(200, text=aborted([5, 6], 500)), FAILED),
        (STREAM, httpx.Response(200, text=aborted([5, 6], None)), "wrong answer"),
        (STREAM, httpx.Response(200, text='data: {"error": {"code": 503}}\n\n' + DONE), ABORTED),
        (STREAM, httpx.Response(200, text='data: {"error": {"code": 400}}\n\n' + DONE), "unclear reply"),
        (STREAM, httpx.Response(503, headers=LATER), RETRY),
        (UPDATED, httpx.Response(200, text=record([5, 8, 9], STOP) + DONE), ANSWERED),
        (UPDATED, httpx.Response(200, text=record([5, 6, 9], STOP) + DONE), "wrong answer"),
        (UPDATED, httpx.Response(200, text=aborted([5, 8])), ABORTED),
        (UPDATED, httpx.Response(200, text=aborted([6, 8])), "wrong answer"),
    ],
)
async def test_outcomes(job: Job, reply: httpx.Response, outcome: str) -> None:
    assert await outcome_of(job, reply) == outcome
    assert (outcome in LOST) == (outcome not in OUTCOMES)


async def test_a_connection_without_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("closed")

    async def hang(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(3600)
        raise AssertionError

    monkeypatch.setattr(clients, "PATIENCE", 0.05)
    for handler, outcome in ((refuse, CUT), (hang, "no reply")):
        async with httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(handler)) as http:
            assert await send(http, WAITING) == outcome
            assert await send(http, STREAM) == outcome
