"""Calls and updates at replicas that are removed, and what breaks a connection or doesn't."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trunkline.core.client.supervisor import WatchdogLimits
from trunkline.core.cluster import link, replicas
from trunkline.core.cluster.replica import relay
from trunkline.core.engine.messages import Answer
from trunkline.core.errors import EngineDown
from trunkline.core.server.two_phases import update_all
from trunkline.core.types import Submission, on_replica

SHORT = WatchdogLimits(unhealthy=0.3, silent=1.0, one_pass=5.0, tick=0.05)
NEW = {"model_path": "new", "weight_version": "2"}


def submit(client: Any, prompt: list[int], params: Any, rid: str = "r") -> Any:
    [reply] = client.submit("m", "echo", [Submission(prompt=prompt, params=params, rid=rid)])
    return reply


async def test_a_call_at_a_replica_that_is_removed_is_answered(cluster: Callable[..., Any], until: Any) -> None:
    client, started = await cluster(2)
    with on_replica("r1"):
        answered = client.call("late", model="m", seconds=0.5)
    await asyncio.sleep(0.1)
    started.handle.show("r0")
    assert await answered is True
    await until(lambda: not started.handle.relays["r1"]._fronts)


async def test_requests_are_lost_at_once_although_the_call_that_carried_the_connection_goes_on(
    cluster: Callable[..., Any], params: Any, until: Any
) -> None:
    client, started = await cluster(2)
    lost = submit(client, [1], params(n=1000, delay=0.01))
    await lost.wait()
    name = started.submitted[0]
    other = {"r0": "r1", "r1": "r0"}[name]
    started.handle.held.clear()
    await started.handle.cut(name)
    await asyncio.sleep(0.1)
    started.handle.show(other)  # while the call is being ended
    async with asyncio.timeout(5):
        with pytest.raises(EngineDown, match=f"replica {name}"):
            await lost.result()
    started.handle.held.set()
    await submit(client, [1], params()).result()
    assert client.transport.replicas == [other]
    await until(lambda: not client.transport._groups[0].replicas._draining)


async def test_a_call_ends_with_its_replica(cluster: Callable[..., Any]) -> None:
    client, started = await cluster(2)
    with on_replica("r1"):
        call = asyncio.ensure_future(client.call("never", model="m"))
    await asyncio.sleep(0.1)
    await started.handle.cut("r1")
    with pytest.raises(EngineDown):
        await call
    assert not client.transport._groups[0].replicas._asked


async def test_an_update_ends_although_a_replica_is_removed(cluster: Callable[..., Any]) -> None:
    client, started = await cluster(2)
    slow = started.handle.relays["r1"]
    deliver, loop = slow._deliver, asyncio.get_running_loop()
    slow.engine._deliver = lambda message: (
        loop.call_later(0.5, deliver, message) if isinstance(message, Answer) else deliver(message)
    )
    update = asyncio.ensure_future(update_all(client, "update_weights", "m", **NEW))
    await asyncio.sleep(0.2)
    started.handle.show("r0")
    assert (await update)["success"]
    assert client.models[0].model_path == "new"


async def test_an_update_that_a_draining_replica_holds_is_committed(
    cluster: Callable[..., Any], params: Any, until: Any
) -> None:
    client, started = await cluster(2)
    reply = submit(client, [1], params(n=50, delay=0.02))
    await reply.wait()
    name = started.submitted[0]
    with on_replica(name):
        await client.call("update_weights", model="m", **NEW, hold="t", update_number=1)
    started.handle.show(*({"r0", "r1"} - {name}))
    await until(lambda: name not in client.transport.replicas)
    with on_replica(name):
        assert (await client.call("commit_update", model="m", hold="t"))["success"]
    await reply.result()


async def test_a_flush_at_a_draining_replica_is_answered(cluster: Callable[..., Any], params: Any) -> None:
    client, started = await cluster(2)
    started.handle.delay(r0=0.3, r1=0.3)
    with on_replica("r0"):
        flushed = client.call("flush_cache", model="m")
    await asyncio.sleep(0.05)
    started.handle.show("r1")
    assert await flushed is True


async def test_a_call_that_fails_at_the_replica_ends_nothing_else(cluster: Callable[..., Any], params: Any) -> None:
    client, _ = await cluster(1)
    reply = submit(client, [1], params(n=20, delay=0.02))
    await reply.wait()
    # Without the arguments that they must have:
    assert await client.call("abort_requests") == 0
    await client.call("update_weights_from_tensor", model="m", update_number=0)
    await reply.result()
    assert reply.finish["type"] == "length"
    assert client.transport.restarts == 0


async def test_a_file_in_a_closed_folder_is_copied(
    cluster: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = await cluster(1)
    file = tmp_path / "sent"
    file.write_bytes(b"x")
    monkeypatch.setattr(relay.os, "access", lambda path, mode: False)  # root may read all
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    await update_all(client, "update_weights_from_tensor", "m", path=str(file), weight_version="sent")
    with on_replica("r0"):
        [[path, _]] = await client.call("contents", model="m")
    assert path != str(file)


async def test_a_call_is_not_blamed_for_what_others_do(cluster: Callable[..., Any], params: Any, until: Any) -> None:
    client, _ = await cluster(1, limits=SHORT)
    for number in range(2):
        await until(lambda: client.transport.healthy)
        call = asyncio.ensure_future(client.call("never", model="m"))
        await asyncio.sleep(0.05)
        fatal = submit(client, [1], params(fatal=0.0, seed=number))
        results = await asyncio.gather(call, fatal.result(), return_exceptions=True)
        assert all(isinstance(result, EngineDown) for result in results)
    await until(lambda: client.transport.healthy)
    assert sorted(client._suspects._deaths.values()) == [1, 1]  # of the two requests


async def test_an_engine_that_starts_slowly_keeps_the_connection(
    cluster: Callable[..., Any], until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LOST", 1.5)
    monkeypatch.setattr(link, "TICK", 0.1)
    client, started = await cluster(1, limits=SHORT)
    engine = started.handle.relays["r0"].engine
    engine._command = ["/bin/sh", "-c", 'sleep 3; exec "$@"', "sh", *engine._command]
    engine._process._child.kill()
    await until(lambda: not client.transport.up)
    await until(lambda: client.transport.up)
    assert client.transport._groups[0].replicas.broken == 0


async def test_a_front_that_was_stopped_keeps_its_connections(
    cluster: Callable[..., Any], params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LOST", 1.0)
    monkeypatch.setattr(link, "TICK", 0.2)
    client, _ = await cluster(1)
    reply = submit(client, [1], params(n=60, delay=0.05))
    await reply.wait()
    time.sleep(2)  # the whole loop
    await reply.result()
    assert reply.tokens == [1] * 60


async def test_a_silent_replica_is_unhealthy(
    cluster: Callable[..., Any], until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "SILENT", 0.5)
    monkeypatch.setattr(link, "TICK", 0.1)
    client, started = await cluster(1)
    assert client.transport.healthy
    started.handle.delay(r0=60.0)
    await until(lambda: not client.transport.healthy)
    assert client.transport.up


async def test_an_error_of_what_carries_the_call_is_the_reason(
    cluster: Callable[..., Any], until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "AGAIN", 60.0)
    client, started = await cluster(1)
    relay_of = started.handle.relays["r0"]
    attached = client.transport._groups[0].replicas.links["r0"]
    error = RuntimeError("the actor died")
    started.handle.ended["r0"].set_exception(error)
    await until(lambda: not client.transport.up)
    assert "the actor died" in attached.broken
    await until(lambda: not relay_of._fronts)
