"""Thousands of random generation requests against a live server, many at once; see fuzz_requests.py.

Whatever is sent, no answer is a 5xx, correct requests are answered as the contract says, wrong ones are refused, the
engine is never restarted, the memory of both processes stays flat, no slot is lost, and a request that is asked again
and again in between gets the same answer each time.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import psutil
import pytest

from trunkline.core.testing import CONTEXT, EOS, VOCABULARY

SECONDS = 100.0  # of the suite's budget
REQUESTS = 20_000  # without a budget
CLIENTS = 16
ROUND = 160  # requests between two looks at the server
PATIENCE = 60.0  # seconds without an answer that count as a stall
TOKENS = 2048  # of the pool: less than the clients ask for, so requests wait, retract and evict
WARM = 5  # rounds until memory is what it will be
GROWTH = 512  # bytes a request by which both processes together may grow after that,
SLACK = 8 << 20  # and in all: allocators take memory in steps
FLAGS = (
    "--dtype", "float32", "--threads", "1", "--chunked-prefill-size", "32", "--max-total-tokens", str(TOKENS),
    "--max-running-requests", "12", "--max-n", "8", "--max-batch-size", "32", "--enable-return-hidden-states",
)  # fmt: skip
ORACLE: list[dict[str, Any]] = [
    {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
    {"temperature": 1, "max_new_tokens": 12, "ignore_eos": True, "sampling_seed": 7, "top_p": 0.9},
    {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, "frequency_penalty": 1.5, "logit_bias": {"9": 1}},
]


@pytest.fixture
def fuzz(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tests/api/fuzz_requests.py")


@pytest.fixture
def model(fuzz: ModuleType) -> Any:
    return fuzz.Model(vocabulary=VOCABULARY, context=CONTEXT, hidden=128, end=EOS)


class Storm:
    """Many clients of one server, which share the cases of a generator."""

    def __init__(self, fuzz: ModuleType, model: Any, server: Any, http: httpx.AsyncClient, seed: int) -> None:
        self.fuzz, self.model, self.server, self.http = fuzz, model, server, http
        self.cases = fuzz.Generator(seed, model)
        self.chance = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.memory: list[int] = []

    async def round(self) -> None:
        """``ROUND`` cases by ``CLIENTS`` clients; now and then the server is paused in between."""
        cases = [self.cases.next() for _ in range(ROUND)]
        mode = self.chance.choice((None, None, None, "abort", "retract", "in_place"))
        if mode == "abort":
            for case in cases:
                case.may_abort = True
        waiting = iter(cases)
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(waiting))
            if mode is not None:
                group.create_task(self._pause(mode))
        self.seen[f"pause {mode}"] += 1

    async def _client(self, waiting: Any) -> None:
        for case in waiting:
            try:
                async with asyncio.timeout(case.leave or PATIENCE):
                    answer = await self._ask(case)
            except TimeoutError:
                assert case.leave is not None, f"stalled: {case.content[:2000]!r}"
                self.seen["hung up"] += 1
                continue
            try:
                self.fuzz.check(case, answer, self.model)
            except (AssertionError, KeyError, TypeError, IndexError) as exc:
                shown = case.content[:3000].decode(errors="replace")
                exc.add_note(f"{case.what}; may abort: {case.may_abort}; request: {shown}")
                exc.add_note(f"answer {answer.status}: {str(answer.value)[:3000]}")
                raise
            self.seen[f"{case.verdict} {answer.status}"] += 1
            self.seen["streamed"] += answer.streamed

    async def _ask(self, case: Any) -> Any:
        """Send a case; another client ends it soon after where it may be aborted."""
        other = asyncio.create_task(self._abort(case)) if case.may_abort and "rid" in case.body else None
        try:
            return await self._send(case)
        finally:
            if other is not None:
                await other

    async def _send(self, case: Any) -> Any:
        headers = {"content-type": "application/json"}
        async with self.http.stream("POST", "/generate", content=case.content, headers=headers) as response:
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                content = await response.aread()
                return self.fuzz.Answer(response.status_code, json.loads(content))
            lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
        done = bool(lines) and lines[-1] == "[DONE]"
        frames = [json.loads(line) for line in lines[: len(lines) - done]]
        return self.fuzz.Answer(response.status_code, frames, streamed=True, done=done)

    async def _abort(self, case: Any) -> None:
        await asyncio.sleep(self.chance.choice((0.0, 0.01, 0.05)))
        rid = case.body["rid"]
        name = rid[0] if isinstance(rid, list) and rid else rid
        usable = isinstance(name, str) and name.isascii() and len(name) <= 1024  # rids are hostile, too
        known = name if usable else "no request has this id"
        answer = await self.http.post("/abort_request", json={"rid": known})
        assert answer.status_code == 200, answer.text

    async def _pause(self, mode: str) -> None:
        await asyncio.sleep(self.chance.uniform(0, 0.3))
        answer = await self.http.post("/pause_generation", json={"mode": mode})
        assert answer.status_code == 200, answer.text
        await asyncio.sleep(0.1)
        answer = await self.http.post("/continue_generation", json={})
        assert answer.status_code == 200, answer.text

    async def oracle(self) -> list[list[int]]:
        """What the same few requests are answered."""
        prompts = [list(range(3, 40)), [*range(3, 20), 77, 78]]
        body = {"input_ids": [prompt for prompt in prompts for _ in ORACLE], "sampling_params": ORACLE * len(prompts)}
        answer = await self.http.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        return [record["output_ids"] for record in answer.json()]

    async def rest(self) -> None:
        """Wait until the server is idle: all slots are free once the cache is flushed. Then note its memory."""
        deadline = time.monotonic() + PATIENCE
        while (state := await self.state())["num_running_reqs"] or state["num_waiting_reqs"]:
            assert time.monotonic() < deadline, state
            await asyncio.sleep(0.1)
        assert (await self.http.post("/flush_cache", params={"timeout": 10})).status_code == 200
        while (state := await self.state())["free_tokens"] != TOKENS:  # heartbeats come once a second
            assert time.monotonic() < deadline, state
            await asyncio.sleep(0.1)
        assert state["engine_restarts"] == 0, state
        processes = [psutil.Process(self.server.process.pid), self.server.engine()]
        self.memory.append(sum(process.memory_info().rss for process in processes))

    async def state(self) -> dict[str, Any]:
        answer = await self.http.get("/get_server_info")
        state: dict[str, Any] = answer.json()["internal_states"][0]
        return state


@pytest.mark.field
@pytest.mark.fuzz
async def test_random_requests(
    suite: Any, fuzz: ModuleType, model: Any, live: Callable[..., Any], zoo: Callable[[str], Path]
) -> None:
    server = live(*FLAGS, str(zoo("llama")))
    until = float("inf") if suite.seconds is None else time.monotonic() + min(SECONDS, max(30.0, suite.left - 15))
    limits = httpx.Limits(max_connections=4 * CLIENTS)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=limits) as http:
        storm = Storm(fuzz, model, server, http, suite.seed)
        golden = await storm.oracle()
        engine = server.engine().pid
        while storm.cases.count < REQUESTS and (time.monotonic() < until or len(storm.memory) < WARM + 2):
            await storm.round()
            assert await storm.oracle() == golden, f"after {storm.cases.count} requests"
            await storm.rest()
            assert await storm.oracle() == golden, "with an empty cache"
    assert server.engine().pid == engine
    assert "Traceback" not in server.log.read_text()
    for kind in ("answered 200", "refused 400", "either 200", "either 400", "streamed", "hung up"):
        assert storm.seen[kind] > 0, storm.seen
    grown = growth(storm.memory[WARM:])
    assert grown < SLACK + GROWTH * storm.cases.count, storm.memory
    suite.notes.append(f"{storm.cases.count} generation requests, seed {suite.seed}, memory {grown / 2**20:+.1f} MiB")


def growth(sizes: list[int]) -> float:
    """By how much the sizes grow from the first to the last, by the slope between the medians of their halves."""
    half = len(sizes) // 2
    early, late = sizes[:half], sizes[-half:]
    slope = (statistics.median(late) - statistics.median(early)) / (len(sizes) - half)
    return slope * (len(sizes) - 1)


def test_growth_is_the_slope() -> None:
    assert growth([100, 100, 130, 100, 100, 100]) == 0
    assert growth([0, 10, 20, 30, 40, 50, 60]) == pytest.approx(60)
