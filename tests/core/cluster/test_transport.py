"""Requests and calls reach replicas, and outlive those that are lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from trunkline.core.client.supervisor import WatchdogLimits
from trunkline.core.cluster import replicas
from trunkline.core.cluster.messages import decode_submit
from trunkline.core.engine.messages import Started
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
    assert set(started.handle.submitted) == {"r0", "r1"}


async def test_an_abort_reaches_the_replica(cluster: Callable[..., Any], params: Any, until: Any) -> None:
    client, started = await cluster(2)
    reply = submit(client, [1], params(n=1000, delay=0.01))
    await reply.wait()
    reply.cancel()
    relay = started.handle.relays[started.handle.submitted[0]]
    await until(lambda: not relay._jobs)
    assert reply.finish["type"] == "abort"


async def test_a_request_that_gave_nothing_runs_elsewhere(cluster: Callable[..., Any], params: Any, until: Any) -> None:
    client, started = await cluster(2, limits=SHORT)
    reply = submit(client, [1, 2], params(n=4, queue=0.5))
    await until(lambda: len(started.handle.submitted) == 1)
    first = started.handle.submitted[0]
    await started.handle.relays[first].stop()  # its engine is gone
    await reply.result()
    assert reply.tokens == [1, 2, 1, 2]
    assert len(set(started.handle.submitted)) == 2


async def test_a_request_with_results_fails_at_once(cluster: Callable[..., Any], params: Any) -> None:
    client, started = await cluster(2, limits=SHORT)
    lost = submit(client, [1], params(n=1000, delay=0.01), "lost")
    await lost.wait()
    first = started.handle.submitted[0]
    started.handle.accepts = {"r0", "r1"} - {first}
    kept = submit(client, [2], params(n=50, delay=0.01), "kept")
    await started.handle.relays[first].stop()
    with pytest.raises(EngineDown) as caught:
        await lost.result()
    assert caught.value.retry_after
    await kept.result()
    assert kept.tokens == [2] * 50


async def test_a_stream_that_breaks_loses_the_replica(cluster: Callable[..., Any], params: Any) -> None:
    client, started = await cluster(2)
    lost = submit(client, [1], params(n=1000, delay=0.01))
    await lost.wait()
    first = started.handle.submitted[0]
    started.handle.cut.add(first)
    with pytest.raises(EngineDown, match="the stream was cut"):
        await lost.result()
    assert client.transport.replicas == [name for name in ("r0", "r1") if name != first]
    assert not started.handle.relays[first]._jobs  # it was aborted there
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
    first = started.handle.submitted[0]
    other = {"r0": "r1", "r1": "r0"}[first]
    started.handle.show(other)
    await until(lambda: client.transport.replicas == [other])
    await submit(client, [1], params(), "r2").result()
    assert started.handle.submitted[1] == other
    await reply.result()
    assert reply.tokens == [1] * 40
    await until(lambda: not started.handle.relays[first]._fronts)  # its stream was closed


async def test_two_fronts_share_replicas(
    cluster: Callable[..., Any], handle: type[Any], params: Any, until: Any
) -> None:
    client, started = await cluster(1)
    second = await started.front(handle(started.handle.relays))
    replies = [submit(one, [n], params(n=5, delay=0.02)) for n, one in enumerate((client, second))]
    await asyncio.gather(*(reply.result() for reply in replies))
    assert [reply.tokens for reply in replies] == [[0] * 5, [1] * 5]
    await second.stop()
    await until(lambda: list(started.handle.relays["r0"]._fronts) == [client.transport._groups[0]._front])


async def test_messages_of_a_lost_attempt_are_not_delivered(
    cluster: Callable[..., Any], params: Any, until: Any
) -> None:
    client, started = await cluster(2, limits=SHORT)
    started.handle.slow = {"r0": 0.5}
    started.handle.accepts = {"r0"}
    reply = submit(client, [1, 2], params(n=100, delay=0.02))
    await until(lambda: bool(started.handle.relays["r0"]._jobs))
    await asyncio.sleep(0.2)  # it has results, which the front hasn't
    started.handle.accepts = None
    await started.handle.relays["r0"].stop()
    await reply.result()
    assert reply.tokens == [1, 2] * 50
    assert started.handle.submitted == ["r0", "r1"]


async def test_a_last_message_that_is_lost_with_its_stream(
    cluster: Callable[..., Any], params: Any, until: Any
) -> None:
    client, started = await cluster(2)
    started.handle.slow = {"r0": 0.3, "r1": 0.3}
    started.handle.accepts = {"r0"}
    reply = submit(client, [1, 2], params(n=2))
    await until(lambda: started.handle.submitted == ["r0"] and not started.handle.relays["r0"]._jobs)
    started.handle.accepts = None
    started.handle.cut.add("r0")
    await reply.result()
    assert reply.tokens == [1, 2]
    assert started.handle.submitted == ["r0", "r1"]


async def test_a_stream_is_opened_again(
    cluster: Callable[..., Any], params: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "AGAIN", 0.05)
    client, started = await cluster(1)
    started.handle.cut.add("r0")
    await until(lambda: client.transport.restarts > 0)
    started.handle.cut.clear()
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
    for name in ("r0", "r1", "r2", "r3"):
        started.handle.relays[name].submit = _start_and_hang(started.handle.relays[name])  # type: ignore[method-assign]
    reply = submit(client, [1], params(queue=60.0))
    for count in (1, 2):
        await until(lambda count=count: len(started.handle.submitted) == count)  # type: ignore[misc]
        job = next(iter(client.transport._groups[0]._jobs.values()))
        await until(lambda job=job: job.link is not None)  # type: ignore[misc]
        started.handle.cut.add(started.handle.submitted[-1])
    with pytest.raises(EngineDown):
        await reply.result()
    assert len(started.handle.submitted) == 2
    assert list(client._suspects._deaths.values()) == [1]


def _start_and_hang(relay: Any) -> Callable[..., Any]:
    """A request is started, and has no result."""

    async def submit(front: str, body: bytes) -> bytes:
        relay._fronts[front].send(Started(decode_submit(body).key, 0))
        await asyncio.sleep(60)
        return b""

    return submit


async def test_a_request_that_replicas_refuse_is_no_suspect(
    cluster: Callable[..., Any], params: Any, until: Any
) -> None:
    client, started = await cluster(3)
    for relay in started.handle.relays.values():
        relay.engine.up = False  # the front doesn't know yet
    with pytest.raises(EngineDown):
        await submit(client, [1], params()).result()
    assert len(set(started.handle.submitted)) >= 2
    assert not client._suspects._deaths
