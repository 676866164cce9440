"""Calls, models and loads of a client whose transport has several engine replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from trunkline.core.client.client import Client
from trunkline.core.client.contracts import Failures
from trunkline.core.client.metrics import CoreMetrics
from trunkline.core.config import Config
from trunkline.core.engine.messages import Answer, Call, Heartbeat, Load
from trunkline.core.errors import RequestError
from trunkline.core.types import current_replica, on_replica


class Cluster:
    """A transport to replicas that answer calls with their names, "b" last; those in ``failing`` with an error."""

    restarts = 0
    up = healthy = True

    def __init__(self, deliver: Any, down: Any) -> None:
        self.replicas = ("a", "b", "c")
        self.failing: set[str] = set()
        self.sent: list[Call] = []
        self._deliver = deliver

    @property
    def ready(self) -> Any:
        return SimpleNamespace(models=[f"model of {current_replica.get()}"], plan=[])

    @property
    def beat(self) -> Heartbeat:
        running = " abc".index(current_replica.get() or " ")
        return Heartbeat(0.0, [Load("m", 0, running, 0, 9, 10)])

    def replicas_of(self, model: str) -> tuple[str, ...]:
        return ("a",) if model == "other" else self.replicas

    def write(self, messages: list[Any]) -> None:
        self.sent += messages
        for call in sorted(messages, key=lambda call: call.replica == "b"):
            error = (503, f"{call.replica} is busy", None) if call.replica in self.failing else None
            delay = 0.02 if call.replica == "b" else 0.0
            answer = Answer(call.key, call.replica, error=error)
            asyncio.get_running_loop().call_later(delay, self._deliver, answer)


@pytest.fixture
async def client(configure: Callable[..., Config], host: Any) -> Client[Any]:
    return Client(configure(), host, Cluster)


async def test_a_call_goes_to_all_and_the_first_answers_after_all(client: Client[Any]) -> None:
    assert await client.call("look", model="m", much=1) == "a"
    assert [(call.replica, call.control, call.model, call.arguments) for call in client.transport.sent] == [
        (name, "look", "m", {"much": 1}) for name in "abc"
    ]
    assert client._calls == {}
    client.transport.failing = {"b"}
    with pytest.raises(RequestError, match="b is busy"):
        await client.call("look")


async def test_a_call_about_a_model_goes_to_its_replicas(client: Client[Any]) -> None:
    await client.call("look", model="other")
    assert [call.replica for call in client.transport.sent] == ["a"]


async def test_calls_of_one_iteration_go_to_the_replicas_that_they_name(client: Client[Any]) -> None:
    async def look(name: str) -> Any:
        with on_replica(name):
            return await client.call("look")

    assert await asyncio.gather(*map(look, "cba")) == ["c", "b", "a"]
    assert [call.replica for call in client.transport.sent] == ["c", "b", "a"]


async def test_a_call_that_is_given_up_leaves_nothing(client: Client[Any]) -> None:
    call = client.call("look")
    assert isinstance(call, asyncio.Task)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert client._calls == {}


async def test_models_and_loads_are_those_of_the_chosen_one(client: Client[Any]) -> None:
    assert client.replicas == ("a", "b", "c")
    with on_replica("b"):
        assert [*map(str, client.models)] == ["model of b"]
        assert [load.running for load in client.status.loads()] == [2]
    client.transport.replicas = ()
    assert [load.running for load in client.status.loads()] == [0]
    await client.call("look")
    assert client.transport.sent[-1].replica == ""


async def test_gauges_have_the_replica_as_label(client: Client[Any]) -> None:
    metrics = CoreMetrics(client.transport, lambda: 0.0, str, Failures())

    def samples() -> list[Any]:
        [family] = [family for family in metrics.collect() if family.name == "sglang:num_running_reqs"]
        return [(sample.labels, sample.value) for sample in family.samples]

    assert samples() == [({"model_name": "m", "replica": name}, " abc".index(name)) for name in "abc"]
    client.transport.replicas = ()
    assert samples() == [({"model_name": "m"}, 0)]
