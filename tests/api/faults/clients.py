"""Clients that send a mixed load and account for every request: answered, refused with a clear error, or lost."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from .table import ABORTED, ANSWERED, FAILED, RETRY

LOST = ("no reply", "stream without an end", "wrong answer", "unclear reply")

PATIENCE = 120.0  # seconds without a reply after which a request is lost
POLL = 0.1  # seconds between two attempts; more of them would slow down the start of an engine
FRAMES = 8  # of all streams together, after which the load is in its middle
MARGIN = 1e-3  # between the two best tokens' log-probabilities, so that rounding doesn't choose another one


_CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # unused, but httpx would load certificates for each client


def client_of(url: str) -> httpx.AsyncClient:
    """A client with connections of its own and no timeout."""
    return httpx.AsyncClient(base_url=url, timeout=None, verify=_CONTEXT)


@dataclass(frozen=True)
class Job:
    """A request and its answer by an undisturbed server: token ids of ``/generate``, or the vector of ``/encode``."""

    path: str
    body: dict[str, Any]
    expected: Sequence[float]

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    def is_right(self, answer: Any) -> bool:
        """Whether a JSON answer has the expected content."""
        if self.path == "/encode":
            vector = answer.get("embedding", ())
            return len(vector) == len(self.expected) and bool(np.allclose(vector, self.expected, atol=1e-4))
        return bool(answer.get("output_ids") == list(self.expected))


async def send(http: httpx.AsyncClient, job: Job, on_frame: Callable[[], None] = lambda: None) -> str:
    """Send a request; its outcome, one of ``table.OUTCOMES`` or of LOST.

    ``on_frame`` is called after each frame of a stream.
    """
    try:
        async with asyncio.timeout(PATIENCE):
            if job.streamed:
                return await _stream(http, job, on_frame)
            reply = await http.post(job.path, json=job.body)
            return _outcome(job, reply)
    except (httpx.HTTPError, TimeoutError):
        return "no reply"


def _outcome(job: Job, reply: httpx.Response) -> str:
    if reply.status_code == 200:
        return ANSWERED if job.is_right(reply.json()) else "wrong answer"
    if reply.status_code == 503 and "retry-after" in reply.headers:
        return RETRY
    return FAILED if reply.status_code == 500 else "unclear reply"


async def _stream(http: httpx.AsyncClient, job: Job, on_frame: Callable[[], None]) -> str:
    last: dict[str, Any] = {}
    async with http.stream("POST", job.path, json=job.body) as reply:
        if reply.status_code != 200:
            await reply.aread()
            return _outcome(job, reply)
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                return _ending(job, last)
            if line:
                last = json.loads(line.removeprefix("data: "))
                on_frame()
    return "stream without an end"


def _ending(job: Job, last: dict[str, Any]) -> str:
    """The outcome of a stream by its last record. One that was aborted must have begun with the right tokens."""
    if "error" in last:  # nothing had been computed
        return ABORTED if last["error"]["code"] == 503 else "unclear reply"
    finish = last["meta_info"]["finish_reason"]
    if finish["type"] == "abort" and finish["status_code"] == 500:
        return FAILED
    if finish["type"] == "abort" and finish["status_code"] == 503:
        ids = last["output_ids"]
        return ABORTED if ids == list(job.expected[: len(ids)]) else "wrong answer"
    return ANSWERED if job.is_right(last) else "wrong answer"


@dataclass
class Load:
    """Clients that send their jobs one after another. ``outcomes``: how many requests ended in which way."""

    url: str
    clients: Sequence[Sequence[Job]]
    outcomes: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)  # streams have had ``FRAMES`` frames

    async def run(self, fault: Callable[[], Awaitable[None]] | None = None) -> Counter[str]:
        """Send all requests; in the middle of them, cause the fault."""
        async with asyncio.TaskGroup() as group:
            for jobs in self.clients:
                group.create_task(self._client(jobs))
            if fault is not None:
                await asyncio.wait_for(self.begun.wait(), PATIENCE)
                await fault()
        return self.outcomes

    async def _client(self, jobs: Sequence[Job]) -> None:
        async with client_of(self.url) as http:
            for job in jobs:
                self.outcomes[await send(http, job, self._on_frame)] += 1

    def _on_frame(self) -> None:
        self.frames += 1
        if self.frames == FRAMES:
            self.begun.set()


async def seconds_to_serve(url: str, job: Job, since: float) -> tuple[float, Counter[str]]:
    """Send a request again and again until it is answered: the seconds since ``since``, and all outcomes."""
    outcomes: Counter[str] = Counter()
    async with client_of(url) as http:
        while not outcomes[ANSWERED]:
            assert time.monotonic() - since < PATIENCE, f"no answer after {PATIENCE:g} s: {outcomes}"
            outcomes[await send(http, job)] += 1
            await asyncio.sleep(POLL)
    return time.monotonic() - since, outcomes


PROMPTS = 120
NEW_TOKENS = (48, 96, 192)


async def jobs_of(url: str, count: int) -> list[Job]:
    """Generation requests, every second one streamed, and every fourth job an embedding.

    The server must be undisturbed: what it answers is expected from now on. Prompts for which two tokens are about
    equally likely are left out.
    """
    jobs: list[Job] = []
    async with client_of(url) as http:
        for number in range(PROMPTS):
            ids = [5 + (31 * number + 7 * step) % 400 for step in range(8 + 5 * (number % 7))]
            if len(jobs) % 4 == 3:
                body: dict[str, Any] = {"input_ids": ids}
                answer = (await http.post("/encode", json=body)).json()
                jobs.append(Job("/encode", body, answer["embedding"]))
            else:
                body = {"input_ids": ids, "sampling_params": {
                    "max_new_tokens": NEW_TOKENS[number % 3], "temperature": 0, "ignore_eos": True,
                }}  # fmt: skip
                extra = {"return_logprob": True, "top_logprobs_num": 2}
                answer = (await http.post("/generate", json=body | extra)).json()
                pairs = answer["meta_info"]["output_top_logprobs"]
                if min(first[0] - second[0] for first, second in pairs) > MARGIN:
                    jobs.append(Job("/generate", body | {"stream": len(jobs) % 2 == 0}, answer["output_ids"]))
            if len(jobs) == count:
                return jobs
    raise AssertionError(f"only {len(jobs)} of {PROMPTS} prompts have clear answers")
