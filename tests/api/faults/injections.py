"""How each fault of table.py is caused, in the middle of a load of requests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from .clients import PATIENCE, POLL, Job, client_of, send
from .fault_plugin import KILLS, RAISES, WATCHED
from .table import CLOSED, DROPPED, FAILED, RETRY

READERS = 4  # clients that don't read, or that disconnect
GROWTH = 64 << 20  # bytes by which a process may grow because of clients that don't read
HEADROOM = 128 << 20  # bytes that a process with a memory limit may still allocate
UNREAD = "closed a stream that its client left unread"

SAMPLING = {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True}


@dataclass
class Bench:
    """A server under test. ``start`` starts it, again if it has ended; ``checkpoints``: of weight updates, by fault.

    Per repetition: its ``number``; ``happened``: the time of the fault, by time.monotonic; ``outcomes``: those of
    requests that the fault itself sends.
    """

    start: Callable[[], Any]
    jobs: list[Job]
    checkpoints: dict[str, Path]
    number: int = 0
    happened: asyncio.Future[float] = field(default_factory=asyncio.Future)
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def server(self) -> Any:
        return self.start()

    def mark(self, time_of_fault: float | None = None) -> None:
        """The fault has just happened; from now on, the time until the server answers is measured.

        Only the first call of a repetition counts.
        """
        if not self.happened.done():
            self.happened.set_result(time_of_fault or time.monotonic())

    async def call(self, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """A POST request that isn't counted."""
        async with client_of(self.server.url) as http:
            return await asyncio.wait_for(http.post(path, json=body or {}), PATIENCE)

    async def arm(self, point: str = "", error: str = "", count: int = 1) -> dict[str, Any]:
        """Arm a fault in the engine; what happened there so far."""
        answer = await self.call("/fault", {"point": point, "error": error, "count": count})
        assert answer.status_code == 200, answer.text
        report: dict[str, Any] = answer.json()
        return report

    async def health(self) -> int:
        async with client_of(self.server.url) as http:
            return (await http.get("/health")).status_code

    async def state(self) -> dict[str, Any]:
        """The server's figures of its first model."""
        async with client_of(self.server.url) as http:
            found: dict[str, Any] = (await http.get("/get_server_info")).json()["internal_states"][0]
        return found


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a condition; AssertionError after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not await condition():
        assert time.monotonic() < deadline, condition
        await asyncio.sleep(POLL)


Injection = Callable[[Bench], Awaitable[None]]
INJECTIONS: dict[str, Injection] = {}


def injection(name: str) -> Callable[[Injection], Injection]:
    """Register a function as the cause of a fault."""

    def register(function: Injection) -> Injection:
        INJECTIONS[name] = function
        return function

    return register


# -- the process -------------------------------------------------------------------------------


@injection("kill -9")
async def kill(bench: Bench) -> None:
    bench.server.engine().kill()
    bench.mark()


@injection("kill -STOP")
async def stop(bench: Bench) -> None:
    engine = bench.server.engine()
    engine.suspend()
    bench.mark()
    await until(lambda: is_health(bench, 503))
    await until(lambda: is_health(bench, 200))
    assert bench.server.engine().pid != engine.pid


@injection("kill -STOP, then -CONT")
async def stop_and_continue(bench: Bench) -> None:
    engine = bench.server.engine()
    engine.suspend()
    await until(lambda: is_health(bench, 503))
    engine.resume()
    bench.mark()
    await until(lambda: is_health(bench, 200))
    assert bench.server.engine().pid == engine.pid


async def is_health(bench: Bench, status: int) -> bool:
    return await bench.health() == status


@injection("SIGTERM")
async def terminate(bench: Bench) -> None:
    """New requests are sent while the running ones finish; then a new server is started in place of this one."""
    server = bench.server
    await bench.call("/slow_down", {"forward_sleep_time": 0.01})
    began = time.monotonic()
    async with client_of(server.url) as http:
        ending = asyncio.create_task(asyncio.to_thread(server.terminate))
        while (await http.get("/health")).status_code != 503:
            await asyncio.sleep(0.005)
        late = Counter([await send(http, job) for job in bench.jobs[:8]])
    assert late == {RETRY: 8}
    bench.outcomes += late
    assert await ending == 0
    await asyncio.to_thread(bench.start)
    bench.mark(began)


# -- passes ------------------------------------------------------------------------------------


@injection("a pass raises once")
async def raise_once(bench: Bench) -> None:
    await fire(bench, "RuntimeError")


@injection("out of memory in a pass")
async def out_of_memory(bench: Bench) -> None:
    await fire(bench, "OutOfMemoryError")
    await fire(bench, "MemoryError")


@injection("an allocation fails")
async def limited(bench: Bench) -> None:
    engine = bench.server.engine()
    before = engine.rlimit(psutil.RLIMIT_AS)
    engine.rlimit(psutil.RLIMIT_AS, (engine.memory_info().vms + HEADROOM, before[1]))
    try:
        await fire(bench, "allocate")
    finally:
        engine.rlimit(psutil.RLIMIT_AS, before)


async def fire(bench: Bench, error: str) -> None:
    """Make the next pass fail; a request makes sure that there is one."""
    before = (await bench.arm("pass", error))["fired"]
    bench.mark()
    async with client_of(bench.server.url) as http:
        bench.outcomes[await send(http, bench.jobs[1])] += 1
    assert (await bench.arm())["fired"] == before + 1


@injection("a pass raises for one request")
async def raise_for_one(bench: Bench) -> None:
    job = Job("/generate", {"input_ids": [9, 8, *RAISES, 7], "sampling_params": SAMPLING}, ())
    bench.mark()
    async with client_of(bench.server.url) as http:
        outcome = await send(http, job)
    assert outcome == FAILED
    bench.outcomes[outcome] += 1


@injection("a request kills the engine")
async def kill_by_request(bench: Bench) -> None:
    """It is sent until it is rejected; the time is that from the second death on."""
    body = {"input_ids": [9 + bench.number, 8, *KILLS, 7], "sampling_params": SAMPLING}
    job, before = Job("/generate", body, ()), (await bench.state())["engine_restarts"]
    async with client_of(bench.server.url) as http:
        bench.outcomes[await send(http, job)] += 1
        await until(lambda: is_health(bench, 200))
        bench.outcomes[second := await send(http, job)] += 1
        bench.mark()
        await until(lambda: is_health(bench, 200))
        bench.outcomes[third := await send(http, job)] += 1
    assert (second, third) == (FAILED, FAILED)
    assert (await bench.state())["engine_restarts"] == before + 2


@injection("a full pool")
async def fill_pool(bench: Bench) -> None:
    """The load does it; this waits for a retraction."""
    before = (await bench.arm())["resets"]
    bench.mark()
    async with client_of(bench.server.url) as http, asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(http, job)) for job in bench.jobs]
    bench.outcomes += Counter(task.result() for task in tasks)
    assert (await bench.arm())["resets"] > before, "no request was retracted"


# -- clients -----------------------------------------------------------------------------------


@injection("a slow reader")
async def slow_readers(bench: Bench) -> None:
    server = bench.server
    processes = [server.engine(), psutil.Process(server.process.pid)]
    before, closed = [one.memory_info().rss for one in processes], server.log.read_text().count(UNREAD)
    body = {"input_ids": [9, 8, 7], "sampling_params": SAMPLING, "stream": True}
    request = httpx.Request("POST", server.url, json=body | {"return_logprob": True, "top_logprobs_num": 20})
    head = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(request.content)}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(READERS):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(head.encode() + request.content)
        bench.mark()

        async def all_closed() -> bool:
            return bool(server.log.read_text().count(UNREAD) >= closed + READERS)

        await until(all_closed)
    bench.outcomes[CLOSED] += READERS
    assert all(one.memory_info().rss - rss < GROWTH for one, rss in zip(processes, before, strict=True))


@injection("a dropped client")
async def drop(bench: Bench) -> None:
    await bench.call("/slow_down", {"forward_sleep_time": 0.01})
    rids = [f"{WATCHED}{bench.number}-{index}" for index in range(READERS)]
    tasks = [asyncio.create_task(_drop(bench, rid, stream=index % 2 == 0)) for index, rid in enumerate(rids)]
    await asyncio.gather(*tasks)
    bench.mark()
    passes = (await bench.arm())["passes"]  # the engine gets this call after the aborts

    async def released() -> bool:
        return set(rids) <= (await bench.arm())["released"].keys()

    await until(released)
    at = (await bench.arm())["released"]
    assert all(at[rid] <= passes + 2 for rid in rids), (passes, at)
    await bench.call("/slow_down", {"forward_sleep_time": None})
    bench.outcomes[DROPPED] += READERS


async def _drop(bench: Bench, rid: str, *, stream: bool) -> None:
    """Send a request and disconnect: in the middle of its stream, or while it is computed."""
    body = {"input_ids": [9, 8, 7], "sampling_params": SAMPLING, "rid": rid, "stream": stream}
    async with client_of(bench.server.url) as http:
        if stream:
            async with http.stream("POST", "/generate", json=body) as reply:
                async for _ in reply.aiter_lines():
                    return
        waiting = asyncio.create_task(http.post("/generate", json=body))

        async def admitted() -> bool:
            return rid in (await bench.arm())["admitted"]

        await until(admitted)
        waiting.cancel()


# -- weight updates ----------------------------------------------------------------------------


async def update(bench: Bench, checkpoint: str, label: str = "new") -> httpx.Response:
    """The reply to an update. One that may kill the engine needs a label of its own, or it is rejected later."""
    body = {"model_path": str(bench.checkpoints[checkpoint]), "weight_version": label}
    return await bench.call("/update_weights_from_disk", body)


def refused(name: str, point: str = "", error: str = "") -> None:
    """Register the fault of an update that is refused: by its checkpoint, or by a fault at ``point``."""

    @injection(name)
    async def inject(bench: Bench) -> None:
        before = (await bench.arm(point, error))["fired"]
        bench.mark()
        answer = await update(bench, "sound" if point else name)
        assert (answer.status_code, answer.json()["success"]) == (400, False), answer.text
        assert (await bench.arm())["fired"] == before + bool(point)


for name in ("another config", "a tensor is missing", "an unknown tensor", "a wrong shape", "a wrong dtype"):
    refused(f"update: {name}")
refused("update: a cut file")
refused("update: a damaged header")
refused("update: no memory", "memory")
refused("update: reading raises", "read", "RuntimeError")
refused("update: packing raises", "pack", "MemoryError")
refused("update: the last step raises", "last step", "RuntimeError")


@injection("update: the swap raises")
async def break_swap(bench: Bench) -> None:
    await bench.arm("swap", "RuntimeError")
    await lost_update(bench, asyncio.create_task(update(bench, "sound", f"swap {bench.number}")))
    bench.mark()


@injection("update: kill -9")
async def kill_update(bench: Bench) -> None:
    await bench.arm("read", "hang")
    updating = asyncio.create_task(update(bench, "sound", f"kill {bench.number}"))
    words = f"loading {str(bench.checkpoints['sound'])!r} into"
    seen = bench.server.log.read_text().count(words)

    async def loading() -> bool:
        return bool(bench.server.log.read_text().count(words) > seen)

    await until(loading)
    bench.server.engine().kill()
    bench.mark()
    await lost_update(bench, updating)


async def lost_update(bench: Bench, updating: asyncio.Task[httpx.Response]) -> None:
    """The reply to an update during which the engine ended."""
    answer = await updating
    assert answer.status_code == 503, answer.text
    assert "retry-after" in answer.headers
