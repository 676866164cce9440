"""Requests and calls reach replicas, and outlive those that are lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from trunkline.core.client.supervisor import WatchdogLimits
from trunkline.core.cluster import link, replicas
from trunkline.core.cluster.messages import Hello, decode_address
from trunkline.core.engine.messages import Abort, Call, Started, frame
from trunkline.core.errors import EngineDown, RequestError
from trunkline.core.types import Submission

SHORT = WatchdogLimits(unhealthy=0.3, silent=1.0, one_pass=5.0, tick=0.05)


def submit(client: Any, prompt: list[int], params: Any, rid: str = "r") -> Any:
    [reply] = client.submit("m", "echo", [Submission(prompt=prompt, params=params, rid=rid)])
    return reply


async def test_requests_run_on_all_replicas(cluster: Callable[..., Any], params: Any) -> None:
    client, started = await cluster(2)
    replies = [submit(client, [10 * n + 1, 10 * n + 2], params(n=4, delay=0.05), f"r{n}") for n in range(8)]
    await asyncio.gather(*(reply.result() for reply in replies))
    assert [reply.tokens for reply in replies] == [[10 * n + 1, 10 * n + 2] * 2 for n in range(8)]
    assert [reply.cached_tokens for reply in replies] == [1] * 8
    assert set(started.submitted) == {"r0", "r1"}


async def test_an_abort_reaches_the_replica(cluster: Callable[..., Any], params: Any, until: Any) -> None:
    client, started = await cluster(2)
    reply = submit(client, [1], params(n=1000, delay=0.01))
    await reply.wait()
    reply.cancel()
    relay = started.handle.relays[started.submitted[0]]
    await until(lambda: not relay._jobs)
    assert reply.finish["type"] == "abort"


async def test_a_request_that_gave_nothing_runs_elsewhere(cluster: Callable[..., Any], params: Any, until: Any) -> None:
    client, started = await cluster(2, limits=SHORT)
    reply = submit(client, [1, 2], params(n=4, queue=0.5))
    await until(lambda: len(started.submitted) == 1)
    first = started.submitted[0]
    await started.handle.relays[first].stop()  # its engine is gone
    await reply.result()
    assert reply.tokens == [1, 2, 1, 2]
    assert len(set(started.submitted)) == 2


async def test_a_request_with_results_fails_at_once(cluster: Callable[..., Any], params: Any) -> None:
    client, started = await cluster(2, limits=SHORT)
    lost = submit(client, [1], params(n=1000, delay=0.01), "lost")
    await lost.wait()
    first = started.submitted[0]
    started.prefer(*{"r0", "r1"} - {first})
    kept = submit(client, [2], params(n=50, delay=0.01), "kept")
    await started.handle.relays[first].stop()
    with pytest.raises(EngineDown) as caught:
        await lost.result()
    assert caught.value.retry_after
    await kept.result()
    assert kept.tokens == [2] * 50


async def test_a_connection_that_breaks_loses_the_replica(cluster: Callable[..., Any], params: Any, until: Any) -> None:
    client, started = await cluster(2)
    lost = submit(client, [1], params(n=1000, delay=0.01))
    await lost.wait()
    first = started.submitted[0]
    await started.handle.cut(first)
    with pytest.raises(EngineDown, match=f"replica {first}"):
        await lost.result()
    assert client.transport.replicas == [name for name in ("r0", "r1") if name != first]
    await until(lambda: not started.handle.relays[first]._jobs)  # it was aborted there
    assert client.transport.restarts == 1


async def test_a_request_that_kills_engines_is_stopped(cluster: Callable[..., Any], params: Any) -> None:
    client, _ = await cluster(3, limits=SHORT)
    with pytest.raises(EngineDown):
        await submit(client, [1], params(fatal=0.0), "r1").result()
    with pytest.raises(RequestError, match="stopped twice"):
        await submit(client, [1], params(fatal=0.0), "r2").result()
    with pytest.raises(RequestError, match="stopped twice"):
        submit(client, [1], params(fatal=0.0), "r3")
    await submit(client, [1], params(), "r4").result()


async def test_a_replica_that_drains_finishes_its_requests(
    cluster: Callable[..., Any], params: Any, until: Any
) -> None:
    client, started = await cluster(2)
    reply = submit(client, [1], params(n=40, delay=0.02), "r1")
    await reply.wait()
    first = started.submitted[0]
    other = {"r0": "r1", "r1": "r0"}[first]
    started.handle.show(other)
    await until(lambda: client.transport.replicas == [other])
    await submit(client, [1], params(), "r2").result()
    assert started.submitted[1] == other
    await reply.result()
    assert reply.tokens == [1] * 40
    await until(lambda: not started.handle.relays[first]._fronts)  # its connection was closed


async def test_two_fronts_share_replicas(
    cluster: Callable[..., Any], handle: type[Any], params: Any, until: Any
) -> None:
    client, started = await cluster(1)
    second = await started.front(handle(started.handle.relays))
    replies = [submit(one, [n], params(n=5, delay=0.02)) for n, one in enumerate((client, second))]
    await asyncio.gather(*(reply.result() for reply in replies))
    assert [reply.tokens for reply in replies] == [[0] * 5, [1] * 5]
    await second.stop()
    await until(lambda: len(started.handle.relays["r0"]._fronts) == 1)
    await submit(client, [3], params()).result()


async def test_messages_of_a_lost_attempt_are_not_delivered(
    cluster: Callable[..., Any], params: Any, until: Any
) -> None:
    client, started = await cluster(2, limits=SHORT)
    started.handle.delay(r0=0.5)
    started.prefer("r0", "r1")
    reply = submit(client, [1, 2], params(n=100, delay=0.02))
    await until(lambda: bool(started.handle.relays["r0"]._jobs))
    await asyncio.sleep(0.2)  # it has results, which the front hasn't
    await started.handle.cut("r0")
    await reply.result()
    assert reply.tokens == [1, 2] * 50
    assert started.submitted == ["r0", "r1"]


async def test_a_last_message_that_is_lost_with_its_connection(
    cluster: Callable[..., Any], params: Any, until: Any
) -> None:
    client, started = await cluster(2)
    started.handle.delay(r0=0.3, r1=0.3)
    started.prefer("r0", "r1")
    reply = submit(client, [1, 2], params(n=2))
    await until(lambda: started.submitted == ["r0"] and not started.handle.relays["r0"]._jobs)
    await started.handle.cut("r0")
    await reply.result()
    assert reply.tokens == [1, 2]
    assert started.submitted == ["r0", "r1"]


async def test_a_connection_is_made_again(
    cluster: Callable[..., Any], params: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "AGAIN", 0.05)
    client, started = await cluster(1)
    await started.handle.cut("r0")
    await until(lambda: client.transport.restarts == 1)
    await asyncio.sleep(0.2)  # it is tried in vain
    started.handle.mend()
    await until(lambda: client.transport.up)
    await submit(client, [1], params()).result()


async def test_an_abort_leaves_nothing(cluster: Callable[..., Any], params: Any, until: Any) -> None:
    client, _ = await cluster(2, limits=SHORT)
    with pytest.raises(EngineDown):
        await submit(client, [1], params(fatal=0.0), "r1").result()
    suspect = submit(client, [1], params(fatal=60.0), "r2")  # another content
    suspects = [submit(client, [1], params(fatal=0.0, seed=0), f"s{n}") for n in range(2)]
    for reply in (suspect, *suspects):
        reply.cancel()
    await until(lambda: not client._suspects._contents)
    assert not any(client._suspects._queues.values())


async def test_calls_reach_a_replica(cluster: Callable[..., Any]) -> None:
    client, _ = await cluster(2)
    assert await client.call("flush_cache") is True
    with pytest.raises(RequestError, match="no such control"):
        await client.call("sing")


async def test_no_replica_is_up(cluster: Callable[..., Any], params: Any, until: Any) -> None:
    client, started = await cluster(1)
    await started.handle.relays["r0"].stop()
    await until(lambda: not client.transport.up)
    assert not client.transport.healthy
    with pytest.raises(EngineDown):
        submit(client, [1], params())


async def test_a_request_that_replicas_are_lost_with_is_stopped(
    cluster: Callable[..., Any], params: Any, until: Any
) -> None:
    client, started = await cluster(4)
    for relay in started.handle.relays.values():
        relay._forward = _start_and_hang  # type: ignore[method-assign]
    reply = submit(client, [1], params())
    for count in (1, 2):
        await until(lambda count=count: len(started.submitted) == count)  # type: ignore[misc]
        job = next(iter(client.transport._groups[0]._jobs.values()))
        await until(lambda job=job: job.begun)  # type: ignore[misc]
        await started.handle.cut(started.submitted[-1])
    with pytest.raises(EngineDown):
        await reply.result()
    assert len(started.submitted) == 2
    assert list(client._suspects._deaths.values()) == [1]


def _start_and_hang(front: Any, message: Any) -> Abort:
    """A request is started, and has no result: the engine gets something that it ignores."""
    front.send(Started(message.key, 0))
    return Abort(0)


async def test_a_request_that_replicas_refuse_is_no_suspect(
    cluster: Callable[..., Any], params: Any, until: Any
) -> None:
    client, started = await cluster(3)
    for relay in started.handle.relays.values():
        relay.engine.up = False  # the front doesn't know yet
    with pytest.raises(EngineDown):
        await submit(client, [1], params()).result()
    assert len(set(started.submitted)) >= 2
    assert not client._suspects._deaths


async def test_all_requests_of_a_lost_replica_fail_together(
    cluster: Callable[..., Any], params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, started = await cluster(2)
    started.prefer("r0")
    replies = [submit(client, [n], params(n=1000, delay=0.01), f"r{n}") for n in range(20)]
    for reply in replies:
        await reply.wait()
    group, told = client.transport._groups[0], []
    down = group._down
    monkeypatch.setattr(group, "_down", lambda *arguments: (told.append(arguments), down(*arguments)))
    await started.handle.cut("r0")
    results = await asyncio.gather(*(reply.result() for reply in replies), return_exceptions=True)
    assert all(isinstance(result, EngineDown) for result in results)
    assert len(told) == 1


async def test_a_silent_replica_is_lost(
    cluster: Callable[..., Any], params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LOST", 0.5)
    monkeypatch.setattr(link, "TICK", 0.05)
    client, started = await cluster(2)
    started.prefer("r0", "r1")
    kept = submit(client, [1, 2], params(n=4, queue=1.0))
    started.handle.delay(r0=60.0)
    await kept.result()
    assert kept.tokens == [1, 2, 1, 2]
    assert started.submitted == ["r0", "r1"]


async def test_only_fronts_with_a_ticket_are_accepted(cluster: Callable[..., Any]) -> None:
    client, started = await cluster(1)
    relay = started.handle.relays["r0"]
    attached = relay.attach()
    address = decode_address(await anext(attached))
    call = Call(1, "flush_cache", "", {})
    too_long = (1 << 20).to_bytes(4, "little")
    refused = [[Hello(b"x" * 32)], [call], [Hello(b""), call]]
    for first in (*map(frame, refused), too_long, b"\x04\0\0\0abcd", frame([Hello(address.ticket)])):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(first)
        answer = await reader.read(4)
        writer.close()
        assert bool(answer) == (first == frame([Hello(address.ticket)]))
    with contextlib.suppress(StopAsyncIteration):  # it has ended with its connection
        await anext(attached)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(frame([Hello(address.ticket)]))
    assert await reader.read() == b""  # a ticket is for one connection
    writer.close()
    assert await client.call("flush_cache") is True


async def test_requests_of_all_fronts_are_aborted_by_their_names(
    cluster: Callable[..., Any], handle: type[Any], params: Any
) -> None:
    client, started = await cluster(2)
    second = await started.front(handle(started.handle.relays))
    replies = [submit(second, [n], params(n=1000, delay=0.01), f"{name}{n}") for n in range(4) for name in ("a", "b")]
    for reply in replies:
        await reply.wait()
    assert await client.call("abort_requests", prefix="", everything=False) == 0
    await client.call("abort_requests", prefix="a", everything=False)
    for reply in replies[::2]:
        await reply.result()
        assert reply.finish["type"] == "abort"
    assert not any(reply.finish for reply in replies[1::2])
    await client.call("abort_requests", prefix="", everything=True)
    for reply in replies[1::2]:
        await reply.result()


async def test_a_cache_that_was_flushed_is_forgotten(cluster: Callable[..., Any], params: Any) -> None:
    client, started = await cluster(2, limits=SHORT)
    await submit(client, list(range(100)), params()).result()
    first = started.submitted[0]
    cached = client.transport._groups[0].replicas.routing._replicas[first].cached
    assert cached
    assert await client.call("flush_cache") is True
    assert not cached


async def test_a_restarted_engine_has_nothing_cached(cluster: Callable[..., Any], params: Any, until: Any) -> None:
    client, _ = await cluster(1, limits=SHORT)
    await submit(client, list(range(100)), params()).result()
    cached = client.transport._groups[0].replicas.routing._replicas["r0"].cached
    assert cached
    with pytest.raises(EngineDown):
        await client.call("die")
    await until(lambda: not cached)
