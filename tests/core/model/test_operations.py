"""Models and stages run every operation of the backend that they were given, and no other kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from trunkline.core import Engine
from trunkline.core.engine import candidates
from trunkline.kernels.backend import Backend, choose
from trunkline.kernels.cpu.threads import Kernel
from trunkline.plugins.generation.schemas import GenerationParams

EVERY = {"rms_norm", "linear"}  # of each decoder
# By name in the zoo: operations beside attention that the model and its stages must have run.
EXPECTED = {
    "llama": EVERY | {"rope", "glu", "decode", "extend", "sample"},
    "gemma2": EVERY | {"rope", "glu", "decode", "sample"},
    "qwen2-moe": EVERY | {"rope", "expert_counts", "grouped_linear", "decode", "sample"},
    "olmoe": {"expert_counts", "grouped_linear", "decode", "write", "sample"},
    "bert": {"layer_norm", "activate", "linear", "extend", "pool"},
    "bert-score": {"layer_norm", "activate", "linear", "extend", "pool"},
}


def counting(backend: Backend, calls: Counter[str]) -> Backend:
    """A backend of another name, which counts the calls of each operation; "linear" counts products."""

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return operation(*args, **kwargs)

        return call

    values = {one.name: getattr(backend, one.name) for one in fields(backend)}
    operations: dict[str, Any] = {name: value for name, value in values.items() if callable(value)}
    linear = operations.pop("linear")
    found = {name: counted(name, operation) for name, operation in operations.items()}
    found["linear"] = type("Counted", (linear,), {"forward": counted("linear", linear.forward)})
    return Backend(name="another", **found)


@pytest.fixture
def start(zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """``start(name)``: an engine on a backend that counts, in whose process no compiled kernel can run."""
    engines: list[Engine] = []

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel of the CPU was called")

    def start_engine(name: str) -> tuple[Engine, Counter[str]]:
        calls: Counter[str] = Counter()
        monkeypatch.setattr(candidates, "choose", lambda *_, **__: counting(choose("torch_native", "cpu"), calls))
        monkeypatch.setattr(Kernel, "run", refuse)
        engines.append(Engine(str(zoo(name)), dtype="float32", threads=1))
        calls.clear()
        return engines[-1], calls

    yield start_engine
    for engine in engines:
        engine.close()


def test_fused_layers_write_keys_with_their_rotation(start: Callable[[str], Any]) -> None:
    engine, calls = start("llama")
    engine.submit("generation", [5, 6, 7], GenerationParams(max_new_tokens=3)).result(60)
    assert calls["rope"] == calls["decode"] + calls["extend"]
    assert calls["write"] == 0


@pytest.mark.parametrize("name", EXPECTED)
def test_every_operation_is_the_backends(name: str, start: Callable[[str], Any]) -> None:
    engine, calls = start(name)
    (lane,) = engine.client.transport.loop.lanes
    for stage in lane.stages.values():
        request = stage.probe(key=-1)
        params = replace(request.params, max_new_tokens=3) if stage.stage.decodes else request.params
        engine.submit(stage.task, request.tokens * 3, params).result(60)
    assert {name for name, count in calls.items() if count} >= EXPECTED[name]
