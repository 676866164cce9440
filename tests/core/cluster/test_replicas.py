"""Weight updates reach all replicas or none, and replicas that come later."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from trunkline.core.client.supervisor import WatchdogLimits
from trunkline.core.cluster import renewal, replicas
from trunkline.core.engine.messages import Abort, Call
from trunkline.core.errors import EngineDown, RequestError
from trunkline.core.server.two_phases import update_all
from trunkline.core.types import Submission, on_replica

SHORT = WatchdogLimits(unhealthy=0.3, silent=1.0, one_pass=5.0, tick=0.05)
NEW = {"model_path": "new", "weight_version": "2"}


async def calls_of(client: Any, name: str) -> list[str]:
    """The controls of updates that a replica was asked for."""
    with on_replica(name):
        return [control for control, _, _ in await client.call("calls", model="m")]


def serving(client: Any) -> list[str]:
    """The replicas that get requests."""
    return [link.name for link in client.transport._groups[0].replicas.up]


def versions(client: Any) -> list[Any]:
    return [(model.model_path, model.weight_version, model.update_number) for model in client.models]


def lose(relay: Any, control: str) -> None:
    """The connection ends when a front calls a control, before the replica gets the call."""
    forward = relay._forward

    def cut(front: Any, message: Any) -> Any:
        if isinstance(message, Call) and message.control == control:
            relay._forward = forward
            front.abort()
            return Abort(0)  # which the engine ignores
        return forward(front, message)

    relay._forward = cut


@pytest.mark.parametrize("late", [{}, {"r0": 0.2}, {"r1": 0.2, "r2": 0.1}])
async def test_all_replicas_load_and_then_all_apply(
    cluster: Callable[..., Any], handle: type[Any], until: Any, late: dict[str, float]
) -> None:
    client, started = await cluster(3)
    other = await started.front(handle(started.handle.relays))
    await until(lambda: len(serving(other)) == 3)
    started.handle.delay(**late)
    assert await update_all(client, "update_weights", "m", **NEW) == {"success": True, "message": "applied"}
    await asyncio.sleep(0.5)
    for front in (client, other):
        await until(lambda front=front: len(serving(front)) == 3)  # type: ignore[misc]
        assert versions(front) == [("new", "2", 1)]
    for name in ("r0", "r1", "r2"):
        with on_replica(name):
            assert await client.call("applied", model="m") == [1]
    await update_all(client, "update_weights", "m", model_path="newer", weight_version="3")
    await until(lambda: len(serving(other)) == 3 and versions(other) == [("newer", "3", 2)])


async def test_one_refuses_and_none_changes(
    cluster: Callable[..., Any], configure: Callable[..., Any], until: Any
) -> None:
    client, started = await cluster(2)
    await started.add("r2", configure({"model_path": "m", "chat_template": "new"}))
    await until(lambda: len(serving(client)) == 3)
    assert await update_all(client, "update_weights", "m", **NEW) == {"success": False, "message": "refused"}
    assert versions(client) == [("m", "default", 0)]
    for name in ("r0", "r1", "r2"):
        assert await calls_of(client, name) == ["update_weights", "cancel_update"]
    assert len(serving(client)) == 3


async def test_one_is_lost_while_it_loads_and_none_changes(cluster: Callable[..., Any], until: Any) -> None:
    client, started = await cluster(2, limits=SHORT)
    lose(started.handle.relays["r1"], "update_weights")
    with pytest.raises(EngineDown, match="replica r1"):
        await update_all(client, "update_weights", "m", **NEW)
    assert versions(client) == [("m", "default", 0)]
    assert await calls_of(client, "r0") == ["update_weights", "cancel_update"]


async def test_one_is_lost_when_it_should_apply_them(cluster: Callable[..., Any], until: Any) -> None:
    client, started = await cluster(2)
    lose(started.handle.relays["r1"], "commit_update")
    assert (await update_all(client, "update_weights", "m", **NEW))["success"]
    await until(lambda: serving(client) == ["r0", "r1"])  # it has loaded them again
    assert await calls_of(client, "r1") == ["update_weights", "cancel_update", "update_weights"]
    assert versions(client) == [("new", "2", 1)]


async def test_a_client_that_hangs_up_does_not_end_it_halfway(cluster: Callable[..., Any], until: Any) -> None:
    client, _ = await cluster(2)
    update = asyncio.create_task(update_all(client, "update_weights", "m", **NEW))
    await asyncio.sleep(0)
    update.cancel()
    await until(lambda: versions(client) == [("new", "2", 1)] and len(serving(client)) == 2)


async def test_a_replica_that_comes_later_gets_the_weights_first(
    cluster: Callable[..., Any], handle: type[Any], until: Any
) -> None:
    client, started = await cluster(1)
    await update_all(client, "update_weights", "m", **NEW)
    await started.add("late")
    await until(lambda: len(serving(client)) == 2)
    assert await calls_of(client, "late") == ["update_weights"]
    assert versions(client) == [("new", "2", 1)]
    # A front that comes later sees the old weights of one that comes later still, perhaps first.
    second = handle(started.handle.relays)
    second.delay(r0=0.3, late=0.3)
    await started.add("later")
    front = await started.front(second)
    await until(lambda: len(serving(front)) == len(serving(client)) == 3)
    assert versions(front) == versions(client) == [("new", "2", 1)]


async def test_a_restarted_engine_has_the_weights(cluster: Callable[..., Any], until: Any) -> None:
    client, started = await cluster(2, limits=SHORT)
    await update_all(client, "update_weights", "m", **NEW)
    relay = started.handle.relays["r0"]
    with on_replica("r0"), pytest.raises(EngineDown):
        await client.call("die", model="m")
    await until(lambda: relay.engine.up and relay.engine.restarts == 1)
    await until(lambda: len(serving(client)) == 2)
    assert await calls_of(client, "r0") == []  # of the new engine
    assert versions(client) == [("new", "2", 1)]


async def test_sent_weights_outlive_a_pause_beside_a_replica_without_them(
    cluster: Callable[..., Any], until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client, started = await cluster(1)
    await update_all(client, "update_weights_from_tensor", "m", path=os.devnull, weight_version="sent")
    await started.add("late")
    await until(lambda: "late" in client.transport.replicas)
    for control in ("pause", "continue"):
        for name in ("late", "r0"):
            with on_replica(name):
                await client.call(control, model="m")
    await asyncio.sleep(0.3)
    assert serving(client) == ["r0"]
    assert versions(client) == [("m", "sent", 1)]
    await asyncio.sleep(1.0)  # heartbeats
    assert caplog.text.count("lacks weights that were sent") == 1
    await update_all(client, "update_weights", "m", **NEW)
    await until(lambda: len(serving(client)) == 2)


async def test_a_label_reaches_replicas_that_missed_it(cluster: Callable[..., Any], until: Any) -> None:
    client, started = await cluster(2)
    await update_all(client, "update_weights_from_tensor", "m", path=os.devnull, weight_version="sent")
    await until(lambda: len(serving(client)) == 2)
    with on_replica("r0"):
        await client.call("update_weight_version", model="m", new_version="label")
    await until(lambda: started.handle.relays["r1"].engine.ready.models[0].weight_version == "label")
    assert len(serving(client)) == 2
    assert await calls_of(client, "r1") == [
        "update_weights_from_tensor",
        "commit_update",
        "update_weight_version",
    ]


async def test_a_label_does_not_make_other_weights_current(cluster: Callable[..., Any], until: Any) -> None:
    client, started = await cluster(1)
    await update_all(client, "update_weights_from_tensor", "m", path=os.devnull, weight_version="sent")
    await started.add("late")
    await until(lambda: "late" in client.transport.replicas)
    with on_replica("late"):
        await client.call("update_weight_version", model="m", new_version="label")
    await asyncio.sleep(0.3)
    assert serving(client) == ["r0"]
    assert versions(client) == [("m", "sent", 1)]


async def test_a_lost_replica_with_sent_weights_may_come_back(
    cluster: Callable[..., Any], until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewal, "GRACE", 1.5)
    client, started = await cluster(1)
    await update_all(client, "update_weights_from_tensor", "m", path=os.devnull, weight_version="sent")
    await started.add("late")
    await until(lambda: "late" in client.transport.replicas)
    await started.handle.cut("r0")
    await asyncio.sleep(0.3)
    assert serving(client) == []
    started.handle.mend()
    await until(lambda: serving(client) == ["r0"])
    assert versions(client) == [("m", "sent", 1)]
    await started.handle.cut("r0")
    started.handle.show("late")
    await until(lambda: serving(client) == ["late"])
    assert versions(client)[0][2] == 0


async def test_a_replica_that_missed_a_continue_does_not_pause_the_others(
    cluster: Callable[..., Any], until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "AGAIN", 0.05)
    client, started = await cluster(2)
    await client.call("pause", model="m")
    await until(lambda: len(serving(client)) == 2)
    await started.handle.cut("r1")
    await until(lambda: client.transport.replicas == ["r0"])
    await client.call("continue", model="m")
    started.handle.mend()
    await until(lambda: len(serving(client)) == 2)
    assert all(relay.engine.ready.paused == [False] for relay in started.handle.relays.values())


async def test_a_request_has_the_label_of_its_replica(cluster: Callable[..., Any], params: Any) -> None:
    client, started = await cluster(2)
    started.prefer("r1")
    [reply] = client.submit("m", "echo", [Submission(prompt=[1], params=params(n=3, queue=0.5), rid="r")])
    await asyncio.sleep(0.1)
    with on_replica("r0"):
        await client.call("update_weights", model="m", **NEW, update_number=1)
    # Calls that would make it follow are ignored.
    started.handle.relays["r1"]._forward = lambda front, message: Abort(0)
    await reply.result()
    assert reply.weight_version == "default"


async def test_sent_weights_that_no_replica_has_any_more(cluster: Callable[..., Any], until: Any) -> None:
    client, started = await cluster(1, limits=SHORT)
    await update_all(client, "update_weights_from_tensor", "m", path=os.devnull, weight_version="sent")
    with pytest.raises(EngineDown):
        await client.call("die", model="m")
    await until(lambda: started.handle.relays["r0"].engine.restarts == 1 and serving(client) == ["r0"])
    assert versions(client)[0][2] == 0


async def test_a_replica_that_cannot_load_the_weights_gets_no_requests(
    cluster: Callable[..., Any], configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    monkeypatch.setattr(renewal, "AGAIN", 0.05)
    client, started = await cluster(1)
    await update_all(client, "update_weights", "m", **NEW)
    await started.add("late", configure({"model_path": "m", "chat_template": "new"}))
    await until(lambda: "late" in client.transport.replicas)
    await asyncio.sleep(0.3)
    assert serving(client) == ["r0"]
    assert len(await calls_of(client, "late")) > 1  # it tries again


async def test_a_front_that_is_gone_holds_no_update(cluster: Callable[..., Any], until: Any) -> None:
    client, started = await cluster(1)
    with on_replica("r0"):
        await client.call("update_weights", model="m", **NEW, hold="token", update_number=1)
    relay = started.handle.relays["r0"]
    assert relay._held._held
    await started.handle.cut("r0")
    await until(lambda: not relay._fronts)
    assert not relay._held._held
    await until(lambda: client.transport.restarts > 0)
    started.handle.mend()
    await until(lambda: client.transport.up)
    assert await calls_of(client, "r0") == ["update_weights", "cancel_update"]
    with pytest.raises(RequestError, match="nothing is held"):
        await client.call("commit_update", model="m", hold="token")


async def test_only_requests_of_the_replica_that_changes_get_the_new_label(
    cluster: Callable[..., Any], params: Any, until: Any
) -> None:
    client, started = await cluster(2)
    replies = []
    for name in ("r0", "r1"):
        started.prefer(name)
        [reply] = client.submit("m", "echo", [Submission(prompt=[1], params=params(n=200, delay=0.01), rid=name)])
        await reply.wait()
        replies.append(reply)
    with on_replica("r0"):
        await client.call("update_weights", model="m", **NEW, update_number=1)
    await until(lambda: replies[0].weight_version == "2")
    assert replies[1].weight_version == "default"
    for reply in replies:
        reply.cancel()


async def test_a_replica_that_comes_later_is_paused_and_continued_with_the_others(
    cluster: Callable[..., Any], handle: type[Any], until: Any
) -> None:
    client, started = await cluster(1)
    await client.call("pause", model="m", mode="retract")
    await started.add("late")
    await until(lambda: len(serving(client)) == 2)
    assert all(relay.engine.ready.paused == [True] for relay in started.handle.relays.values())
    # A front that comes later may see one that isn't paused first.
    await started.add("later")
    second = handle(started.handle.relays)
    second.delay(r0=0.3, late=0.3)
    front = await started.front(second)
    await until(lambda: len(serving(front)) == len(serving(client)) == 3)
    assert all(relay.engine.ready.paused == [True] for relay in started.handle.relays.values())
    await client.call("continue", model="m")
    await until(lambda: not any(relay.engine.ready.paused[0] for relay in started.handle.relays.values()))
    await until(lambda: len(serving(front)) == len(serving(client)) == 3)


async def test_an_engine_that_is_started_again_is_still_paused(cluster: Callable[..., Any], until: Any) -> None:
    client, started = await cluster(1, limits=SHORT)
    await client.call("pause", model="m")
    with pytest.raises(EngineDown):
        await client.call("die", model="m")
    await until(lambda: started.handle.relays["r0"].engine.restarts == 1 and serving(client) == ["r0"])
    assert started.handle.relays["r0"].engine.ready.paused == [True]
    assert client.transport._groups[0].replicas._renewal.paused
