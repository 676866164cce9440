"""A plugin from outside observes requests of a real engine: every event, in order, for each way in which they end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trunkline.core import Engine
from trunkline.core.client.engine import Ticket
from trunkline.core.discovery import Plugin, find
from trunkline.core.errors import RequestError
from trunkline.core.host import Host
from trunkline.plugins.generation.schemas import GenerationParams

SOURCE = """
from trunkline.core.hookspecs import hookimpl
from trunkline.core.types import RequestObserver

class Trace(RequestObserver):
    def __init__(self):
        self.events = {}

    def submitted(self, reply):
        self.events[reply.rid] = [(reply.model_label, reply.task), "submitted"]

    def started(self, reply):
        self.events[reply.rid].append("started")

    def progressed(self, reply, tokens):
        self.events[reply.rid].append(tokens)

    def ended(self, reply):
        self.events[reply.rid].append(reply.error.status if reply.error else reply.finish["type"])

trace = Trace()

@hookimpl
def trunkline_request_observers(settings):
    return [trace]
"""


@pytest.fixture
def plugin() -> ModuleType:
    module = ModuleType("trace_plugin")
    exec(SOURCE, module.__dict__)
    return module


@pytest.fixture
def engine(zoo: Callable[[str], Path], plugin: ModuleType) -> Iterator[Engine]:
    host = Host([*find(), Plugin("trace", "trace_plugin", module=plugin)])
    with Engine(str(zoo("llama")), host=host, dtype="float32", threads=1, served_model_name="tiny") as engine:
        yield engine


def submit(engine: Engine, rid: str, new: int = 4, prompt: tuple[int, ...] = (5, 6, 7)) -> Ticket:
    params = GenerationParams(max_new_tokens=new, temperature=0, ignore_eos=True)
    return engine.submit("generation", list(prompt), params, rid=rid)


def over(ticket: Ticket) -> None:
    with contextlib.suppress(RequestError):
        ticket.result(60)


def test_every_event_of_requests_that_end_in_each_way(engine: Engine, plugin: ModuleType) -> None:
    def broken(**options: object) -> None:
        raise SystemExit("a defect")

    calls = engine.host.hook_calls
    tickets = {"stop": submit(engine, "stop"), "error": submit(engine, "error", prompt=(10**6,))}
    tickets["abort"] = submit(engine, "abort", 400)
    next(iter(tickets["abort"]))
    tickets["abort"].cancel()
    for ticket in tickets.values():
        over(ticket)
    tickets["death"] = submit(engine, "death", 400)
    next(iter(tickets["death"]))
    (lane,) = engine.client.transport.loop.lanes
    lane.scheduler.plan = broken  # type: ignore[assignment, method-assign]
    over(tickets["death"])
    assert engine.host.hook_calls == calls, "no hook is called for a request"
    events: dict[str, list[Any]] = plugin.trace.events
    assert events.keys() == tickets.keys()
    assert all(told[:2] == [("tiny", "generation"), "submitted"] for told in events.values())
    assert {rid: told[-1] for rid, told in events.items()} == {
        "stop": "length",
        "error": 400,
        "abort": "abort",
        "death": 503,
    }
    assert events["error"][2:] == [400], "a request that is refused never starts"
    for rid in ("stop", "abort", "death"):
        assert events[rid][2] == "started"
        assert sum(events[rid][3:-1]) == len(tickets[rid].reply.tokens)
        assert 0 not in events[rid][3:-1]
