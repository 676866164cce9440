"""Recorded traffic for the simulation of replicas, and its comparison with real replicas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from trunkline.core.cluster.routing import Prompt


@pytest.fixture
def trace(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/cluster/trace.py")


@pytest.fixture
def check(load_script: Callable[[str], ModuleType]) -> Any:
    return load_script("benchmarks/cluster_check.py")


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """``file(request, …)``: a trace of these lines."""

    def write(*requests: dict[str, Any]) -> Path:
        path = tmp_path / "trace.jsonl"
        path.write_bytes(b"\n".join(map(msgspec.json.encode, requests)))
        return path

    return write


def line(timestamp: float, input_length: int, output_length: int, *hash_ids: int) -> dict[str, Any]:
    return {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output_length,
        "hash_ids": hash_ids,
        "type": "other fields are ignored",
    }


def test_prompts_begin_equally_as_far_as_their_blocks_do(trace: Any, file: Callable[..., Path]) -> None:
    path = file(line(5000, 700, 3, 0, 1), line(4000, 1024, 7, 0, 2), line(6500, 700, 3, 0, 1))
    first, second, third = trace.read_trace(path, block=512, speed=2.0, longest=2000)
    assert [first.at, second.at, third.at] == [0.0, 0.5, 1.25]
    (one,), (two,), (three,) = first.jobs, second.jobs, third.jobs
    assert [len(one.prompt), len(two.prompt), len(one.output)] == [1024, 700, 7]
    assert (one.prompt[:512] == two.prompt[:512]).all()
    assert (one.prompt[512:700] != two.prompt[512:]).any()
    assert (two.prompt == three.prompt).all()
    assert (two.output != three.output).any()


def test_long_prompts_are_cut(trace: Any, file: Callable[..., Path]) -> None:
    (session,) = trace.read_trace(file(line(0, 1024, 24, 0, 1)), block=512, speed=1.0, longest=1000)
    assert len(session.jobs[0].prompt) == 976


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (line(0, 1024, 1, 0, 1, 2), r"trace\.jsonl:2: 3 blocks for 1024 tokens aren't blocks of 512 tokens"),
        (line(0, 512, 1000, 0), r"trace\.jsonl:2: the output has 1000 tokens; give a --longest above that"),
    ],
)
def test_what_cannot_be_replayed(trace: Any, file: Callable[..., Path], request_: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace.read_trace(file(line(0, 1, 1, 0), request_), block=512, speed=1.0, longest=1000)


def test_a_recording_is_read_as_it_was(trace: Any, tmp_path: Path) -> None:
    """Three prompts: the second extends the first, the third has the first block in the place of its second."""
    block = list(range(trace.BLOCK))
    prompts = [[*block, 7], [*block, 7, 8], [1] * trace.BLOCK + block]
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"".join(trace.trace_lines((0.25 * at, prompt, at + 1) for at, prompt in enumerate(prompts))))
    assert [msgspec.json.decode(each)["hash_ids"] for each in path.read_bytes().splitlines()] == [
        [0, 1],
        [0, 2],
        [3, 4],
    ]
    sessions = trace.read_trace(path, block=trace.BLOCK, speed=1.0, longest=1000)
    assert [session.at for session in sessions] == [0.0, 0.25, 0.5]
    assert [len(session.jobs[0].prompt) for session in sessions] == [len(prompt) for prompt in prompts]
    assert [len(session.jobs[0].output) for session in sessions] == [1, 2, 3]


def test_the_recorder_writes_what_clients_submit(
    load_script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script("benchmarks/record_traffic.py")
    recorder = script.Recorder()

    def submit(client: Any, model: str, task: str, items: Any) -> Any:
        finishes = [None if item.rid == "runs" else {"type": "length"} for item in items]
        return [SimpleNamespace(created=recorder.began + 2, tokens=[1, 2], finish=finish) for finish in finishes]

    monkeypatch.setattr(script.Client, "submit", submit)
    kinds = {"a": True, "probe": False, "runs": True}
    items = [SimpleNamespace(prompt=[1, 2, 3], rid=rid, cacheable=cacheable) for rid, cacheable in kinds.items()]
    with recorder.recording():
        assert len(script.Client.submit(None, "m", "t", items)) == 3
    assert script.Client.submit is submit
    path = tmp_path / "trace.jsonl"
    assert recorder.write(path) == 1
    assert msgspec.json.decode(path.read_bytes()) == {
        "timestamp": 2000.0,
        "input_length": 3,
        "output_length": 2,
        "hash_ids": [0],
    }


def test_least_loaded_routing(check: Any) -> None:
    routing = check.LeastLoadedRouting()
    for name in ("b", "a"):
        routing.add(name, 1000)
    long, short = (Prompt.of(np.arange(count, dtype="<i4").tobytes()) for count in (200, 100))
    assert routing.choose(long) == ["a", "b"]
    sent = routing.sent("a", long)
    assert routing.choose(long) == ["b", "a"], "although its prefix is at a"
    routing.sent("b", short)
    assert routing.choose(short) == ["b", "a"]
    routing.ended(sent)
    assert routing.choose(short) == ["a", "b"]


def test_the_table(check: Any) -> None:
    """Names of points, a column for each value, and the bars if all points are there."""
    times = np.array([0.1, 0.2])
    served = [
        check.Served(cached=cached, waits=times * scale, firsts=times, rate=1.0, output_rate=2.0)
        for cached, scale in ((0.8, 1), (0.4, 1), (0.76, 2))
    ]
    pairs = {name: check.Pair(one, one, 0.004) for name, one in zip(("one", "least", "prefix"), served, strict=True)}
    assert check.row("x", pairs["one"]).count("|") == check.HEAD.splitlines()[0].count("|")
    assert check.row("x", pairs["one"]).startswith("| x | 0.800 | 0.800 | 150 / 195 / 199 |")
    assert list(check.bars(pairs))[1] == (
        "measured: cached ÷ one server 0.95 by prefix, 0.50 least loaded; p99 wait ÷ least loaded 2.00"
    )
    del pairs["one"]
    assert list(check.bars(pairs)) == []


@pytest.mark.soak
@pytest.mark.parametrize("point", ["one", "prefix"])
async def test_real_replicas_serve_what_the_simulation_says(check: Any, point: str) -> None:
    setting = check.Setting(check.Size(slots=30_000), check.Cost(0.03, 0.0003, 0.0001), seconds=16.0)
    sessions = list(check.Traffic(seed=1, replicas=2, mix=check.Mix(think=1.0, answer=8)).sessions(2.0, 16.0))
    pair = await check.compare(setting, check.POINTS[point], sessions, 2)
    assert pair.overhead > 0
    assert pair.measured.rate == pytest.approx(pair.simulated.rate, rel=0.1)
    assert pair.measured.cached == pytest.approx(pair.simulated.cached, abs=0.1)
    assert (pair.measured.firsts >= 0.03 / (2 if point == "one" else 1)).all()
