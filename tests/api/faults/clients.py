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

from .table import ABORTED, ANSWERED, CUT, FAILED, RETRY

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
    """A request and its answer by an undisturbed server: token ids of ``/generate``, or the vector of ``/encode``.

    ``other``: the answer with other weights, which is as good while they are updated.
    """

    path: str
    body: dict[str, Any]
    expected: Sequence[float]
    other: Sequence[float] | None = None

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    def is_right(self, answer: Any) -> bool:
        """Whether a JSON answer has the expected content."""
        if self.path == "/encode":
            vector = answer.get("embedding", ())
            return any(len(vector) == len(one) and np.allclose(vector, one, atol=1e-4) for one in self._answers)
        return any(answer.get("output_ids") == list(one) for one in self._answers)

    def begins(self, ids: list[int]) -> bool:
        """Whether the answer begins with these tokens."""
        return any(ids == list(one[: len(ids)]) for one in self._answers)

    @property
    def _answers(self) -> list[Sequence[float]]:
        return [self.expected] if self.other is None else [self.expected, self.other]


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
    except httpx.HTTPError:
        return CUT
    except TimeoutError:
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
        return ABORTED if job.begins(last["output_ids"]) else "wrong answer"
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
            body: dict[str, Any] = {
                "input_ids": [5 + (31 * number + 7 * step) % 400 for step in range(8 + 5 * (number % 7))]
            }
            path = "/encode" if len(jobs) % 4 == 3 else "/generate"
            if path == "/generate":
                parameters = {"max_new_tokens": NEW_TOKENS[number % 3], "temperature": 0, "ignore_eos": True}
                body |= {"sampling_params": parameters, "stream": len(jobs) % 2 == 0}
            if (answer := await clear_answer(http, path, body)) is not None:
                jobs.append(Job(path, body, answer))
            if len(jobs) == count:
                return jobs
    raise AssertionError(f"only {len(jobs)} of {PROMPTS} prompts have clear answers")


async def clear_answer(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Sequence[float] | None:
    """What an undisturbed server answers; None if two tokens are about equally likely."""
    if path == "/encode":
        vector: list[float] = (await http.post(path, json=body)).json()["embedding"]
        return vector
    extra = {"return_logprob": True, "top_logprobs_num": 2, "stream": False}
    answer = (await http.post(path, json=body | extra)).json()
    pairs = answer["meta_info"]["output_top_logprobs"]
    ids: list[int] = answer["output_ids"]
    return ids if min(first[0] - second[0] for first, second in pairs) > MARGIN else None
