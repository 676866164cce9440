"""How the faults of table.py are caused in the middle of a load: processes, passes and clients.

Those of weight updates are in failed_updates.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter

import httpx
import psutil

from .bench import Bench, Injections, is_health, until
from .clients import Job, client_of, send
from .fault_plugin import KILLS, RAISES, WATCHED
from .table import CLOSED, DROPPED, FAILED, RETRY

INJECTIONS = Injections()

READERS = 4  # clients that don't read, or that disconnect
GROWTH = 64 << 20  # bytes by which a process may grow because of clients that don't read
HEADROOM = 128 << 20  # bytes that a process with a memory limit may still allocate
UNREAD = "closed a stream that its client left unread"

SAMPLING = {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True}


# -- the process -------------------------------------------------------------------------------


@INJECTIONS.causes("kill -9")
async def kill(bench: Bench) -> None:
    bench.server.engine().kill()
    bench.mark()


@INJECTIONS.causes("kill -STOP")
async def stop(bench: Bench) -> None:
    engine = bench.server.engine()
    engine.suspend()
    bench.mark()
    await until(lambda: is_health(bench, 503))
    await until(lambda: is_health(bench, 200))
    assert bench.server.engine().pid != engine.pid


@INJECTIONS.causes("kill -STOP, then -CONT")
async def stop_and_continue(bench: Bench) -> None:
    engine = bench.server.engine()
    engine.suspend()
    await until(lambda: is_health(bench, 503))
    engine.resume()
    bench.mark()
    await until(lambda: is_health(bench, 200))
    assert bench.server.engine().pid == engine.pid


@INJECTIONS.causes("SIGTERM")
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


@INJECTIONS.causes("a pass raises once")
async def raise_once(bench: Bench) -> None:
    await fire(bench, "RuntimeError")


@INJECTIONS.causes("out of memory in a pass")
async def out_of_memory(bench: Bench) -> None:
    await fire(bench, "OutOfMemoryError")
    await fire(bench, "MemoryError")


@INJECTIONS.causes("an allocation fails")
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


@INJECTIONS.causes("a pass raises for one request")
async def raise_for_one(bench: Bench) -> None:
    job = Job("/generate", {"input_ids": [9, 8, *RAISES, 7], "sampling_params": SAMPLING}, ())
    bench.mark()
    async with client_of(bench.server.url) as http:
        outcome = await send(http, job)
    assert outcome == FAILED
    bench.outcomes[outcome] += 1


@INJECTIONS.causes("a request kills the engine")
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


@INJECTIONS.causes("a full pool")
async def fill_pool(bench: Bench) -> None:
    """All jobs once more, at the same time."""
    before = (await bench.arm())["resets"]
    bench.mark()
    async with client_of(bench.server.url) as http, asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(http, job)) for job in bench.jobs]
    bench.outcomes += Counter(task.result() for task in tasks)
    assert (await bench.arm())["resets"] > before, "no request was retracted"


# -- clients -----------------------------------------------------------------------------------


@INJECTIONS.causes("a slow reader")
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


@INJECTIONS.causes("a dropped client")
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
