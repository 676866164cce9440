"""The engine in the caller's process: whatever happens to it, nobody waits forever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trunkline.core import Engine
from trunkline.core.client.engine import Ticket
from trunkline.core.errors import ConfigError, EngineDown, RequestError
from trunkline.plugins.generation.schemas import GenerationParams


@pytest.fixture
def engine(zoo: Callable[[str], Path]) -> Iterator[Engine]:
    with Engine(str(zoo("llama")), dtype="float32", threads=1) as engine:
        yield engine


def submit(engine: Engine, new: int = 4) -> Ticket:
    return engine.submit("generation", [5, 6, 7], GenerationParams(max_new_tokens=new, temperature=0, ignore_eos=True))


def test_tokens_come_one_by_one_and_as_a_result(engine: Engine) -> None:
    ticket = submit(engine)
    assert list(ticket) == ticket.result(60).tokens
    assert len(ticket.reply.tokens) == 4
    assert ticket.reply.finish == {"type": "length", "length": 4}
    assert engine.call("flush_cache") is True


def test_a_refused_request_raises_and_the_next_is_fine(engine: Engine) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        engine.submit("generation", [10**6], GenerationParams()).result(60)
    with pytest.raises(RequestError, match="no model named 'other'"):
        engine.encode("hi", "other")
    assert submit(engine).result(60).tokens


def test_a_cancelled_request_ends(engine: Engine) -> None:
    ticket = submit(engine, 400)
    ticket.cancel()
    assert (ticket.result(60).finish or {})["type"] == "abort"


def test_closing_ends_what_runs_and_refuses_what_comes(engine: Engine) -> None:
    ticket = submit(engine, 400)
    engine.close()
    with pytest.raises(EngineDown, match="closed"):
        ticket.result(60)
    with pytest.raises(EngineDown, match="closed"):
        list(ticket)
    with pytest.raises(EngineDown, match="closed"):
        submit(engine)
    with pytest.raises(EngineDown, match="closed"):
        engine.call("flush_cache")
    ticket.cancel()
    engine.close()  # twice is fine


@pytest.mark.parametrize("trouble", [RuntimeError, SystemExit])
def test_a_loop_that_breaks_fails_every_ticket(engine: Engine, trouble: type[BaseException]) -> None:
    def broken(**options: object) -> None:
        raise trouble("a defect")

    (lane,) = engine.client.transport.loop.lanes
    lane.scheduler.plan = broken  # type: ignore[assignment, method-assign]
    ticket = submit(engine)
    with pytest.raises(EngineDown, match="broke"):
        ticket.result(60)
    with pytest.raises(EngineDown, match="broke"):
        submit(engine)


def test_an_unknown_setting_is_named(zoo: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="'thread'"):
        Engine(str(zoo("llama")), thread=1)
