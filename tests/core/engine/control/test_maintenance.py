"""Small controls of the engine."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trunkline.core import Engine
from trunkline.core.errors import RequestError
from trunkline.plugins.generation.schemas import GenerationParams


@pytest.fixture(scope="module")
def engine(zoo: Callable[[str], Path]) -> Iterator[Engine]:
    with Engine(str(zoo("llama")), dtype="float32", threads=1, decode_log_interval=0) as engine:
        yield engine


def run(engine: Engine, new: int = 4) -> float:
    """Seconds that it takes."""
    params = GenerationParams(max_new_tokens=new, temperature=0, ignore_eos=True)
    began = time.monotonic()
    engine.submit("generation", list(range(5, 40)), params).result(60)
    return time.monotonic() - began


def test_slow_down(engine: Engine) -> None:
    loop = engine.client.transport.loop
    engine.call("slow_down", forward_sleep_time=0.2)
    engine.call("slow_down", forward_sleep_time=0.15)  # instead, not beside
    assert len(loop.after_pass) == 1
    assert run(engine, 4) >= 0.45
    for off in (None, 0, -1.0):
        engine.call("slow_down", forward_sleep_time=0.1)
        engine.call("slow_down", forward_sleep_time=off)
        assert loop.after_pass == []
    with pytest.raises(RequestError, match="<= 10"):
        engine.call("slow_down", forward_sleep_time=10.5)
    assert loop.after_pass == []


def test_sleeping_is_no_hang(engine: Engine) -> None:
    """The watchdog and health checks know of it."""
    loop = engine.client.transport.loop
    engine.call("slow_down", forward_sleep_time=0.3)
    params = GenerationParams(max_new_tokens=2, temperature=0, ignore_eos=True)
    ticket = engine.submit("generation", [5, 6], params)
    seen = set()
    while not ticket.done:
        seen.add(loop.heartbeat().work)
        time.sleep(0.02)
    assert "sleeping after each pass, as /slow_down said" in seen
    engine.call("slow_down")


def test_freeze(frozen: None, engine: Engine) -> None:
    before = gc.get_freeze_count()
    assert engine.call("freeze_gc") > before
    run(engine)


def test_log_level(engine: Engine) -> None:
    root = logging.getLogger()
    level = root.level
    try:
        engine.call("log_level", level="error")
        assert root.level == logging.ERROR
    finally:
        root.setLevel(level)
