"""Lines about passes, as scripts that were written for SGLang read them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trunkline.core import Engine
from trunkline.core.engine.control.pass_log import PassLog
from trunkline.core.engine.messages import Load
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.generation.schemas import GenerationParams

# From SGLang 0.5.23's debug_utils/log_parser.py, without what it has before "Decode batch".
DECODE = re.compile(
    r"Decode batch( \[\d+\])?,\s+"
    r"#running-req:\s*(?P<num_running_req>\d+),\s+"
    r"#token:\s*(?P<num_token>\d+),\s+"
    r"token usage:\s*(?P<token_usage>[0-9.]+),\s+"
    r".*?"
    r"gen throughput \(token/s\):\s*(?P<gen_throughput>[0-9.]+),\s+"
    r"#queue-req:\s*(?P<queue_req>\d+),"
)
PREFILL = re.compile(
    r"Prefill batch, #new-seq: (?P<seq>\d+), #new-token: (?P<new>\d+), #cached-token: (?P<cached>\d+), "
    r"#token: \d+, token usage: [0-9.]+, #running-req: \d+, #queue-req: \d+, "
)


def fake(rows: int, decodes: int, tokens: int = 1, started: tuple[int, ...] = ()) -> tuple[Any, Any]:
    """A batch, and its steps; ``started``: cached tokens of each request that began."""
    batch = SimpleNamespace(
        rows=[None] * rows, decodes=decodes, tokens=decodes + 10 * (rows - decodes),
        started=[SimpleNamespace(cached=cached) for cached in started],
    )  # fmt: skip
    return batch, [SimpleNamespace(tokens=(1,) * tokens)] * rows


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeLane:
    served = SimpleNamespace(name="m")
    scheduler = SimpleNamespace(waiting=7, running=3)

    def current_load(self) -> Load:
        return Load("m", 7, 3, 0, free_slots=900, slots=1000)


@pytest.fixture
def lane() -> Any:
    return FakeLane()


def test_every_so_many_decode_passes(lane: Any, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = PassLog(3, clock)
    caplog.set_level(logging.INFO, "trunkline.engine")
    for _ in range(7):
        clock.now += 0.5
        log.after_pass(lane, *fake(2, 2))
    assert [record.getMessage() for record in caplog.records] == [
        "Decode batch, #running-req: 2, #token: 100, token usage: 0.10, "
        f"gen throughput (token/s): {rate}, #queue-req: 7, model: m"
        for rate in ("6.00", "4.00")  # the first pass began the clock
    ]
    assert all(DECODE.search(record.getMessage()) for record in caplog.records)


def test_passes_that_only_read_prompts_have_lines_of_their_own(lane: Any, caplog: pytest.LogCaptureFixture) -> None:
    log = PassLog(2, Clock())
    caplog.set_level(logging.INFO, "trunkline.engine")
    log.after_pass(lane, *fake(3, 0, started=(5, 6, 0)))
    log.after_pass(lane, *fake(3, 2, started=(1,)))  # a prompt beside two that decode
    assert not caplog.records
    log.after_pass(lane, *fake(1, 0))
    (record,) = caplog.records
    found = PREFILL.search(record.getMessage())
    assert found is not None
    assert found.groupdict() == {"seq": "4", "new": "50", "cached": "12"}


def test_lanes_are_counted_apart(lane: Any, caplog: pytest.LogCaptureFixture) -> None:
    log = PassLog(2, Clock())
    caplog.set_level(logging.INFO, "trunkline.engine")
    for one in (lane, FakeLane()):
        log.after_pass(one, *fake(1, 1))
    assert not caplog.records
    log.after_pass(lane, *fake(1, 1))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("interval", [0, 5])
def test_engines_log(zoo: Callable[[str], Path], caplog: pytest.LogCaptureFixture, interval: int) -> None:
    caplog.set_level(logging.INFO, "trunkline.engine")
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "decode_log_interval": interval}
    with Engine(str(zoo("llama")), task=("generation", "embedding"), **options) as engine:
        params = GenerationParams(max_new_tokens=12, temperature=0, ignore_eos=True)
        engine.submit("generation", [5, 6, 7], params).result(60)
        for text in ("a", "b", "c", "d", "e"):
            encode(engine, [text])
    lines = [record.getMessage() for record in caplog.records]
    decodes = [found for line in lines if (found := DECODE.search(line))]
    assert len(decodes) == (2 if interval else 0)  # of 11 passes
    assert all(found["num_running_req"] == "1" and found["queue_req"] == "0" for found in decodes)
    assert any(PREFILL.search(line) for line in lines) == bool(interval)
