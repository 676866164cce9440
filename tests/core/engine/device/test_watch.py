"""No forward pass and no launch of a stage makes the host wait for the device, or has shapes that depend on values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.core import Engine
from trunkline.core.testing import ANSWERERS, DECODERS, ENCODERS, SCORERS, ZOO
from trunkline.core.types import Launched, Part
from trunkline.plugins.embedding.schemas import EmbeddingParams
from trunkline.plugins.generation.schemas import GenerationParams, LogprobParams

from .watch import Found, watched


def watch(engine: Engine) -> Found:
    """Watch all later passes of the engine."""
    found = Found()
    for lane in engine.client.transport.loop.lanes:
        lane.runner._forward = watched(lane.runner._forward, found)
        for stage in lane.stages.values():
            stage.stage.launch = watched(stage.stage.launch, found)
    return found


PADDED = {"deberta", "deberta-labels", "mpnet", "mpnet-score"}  # their attention can't be replaced
NAMES = sorted({**ZOO, **ENCODERS, **DECODERS, **SCORERS, **ANSWERERS}.keys() - PADDED)


@pytest.fixture
def start(zoo: Callable[[str], Path]) -> Iterator[Callable[..., tuple[Engine, Found]]]:
    """An engine whose kernels are plain torch, and what is found in its passes from now on."""
    engines: list[Engine] = []

    def start_engine(name: str, **options: Any) -> tuple[Engine, Found]:
        engines.append(Engine(str(zoo(name)), dtype="float32", threads=1, attention_backend="torch_native", **options))
        return engines[-1], watch(engines[-1])

    yield start_engine
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_launch(name: str, start: Callable[..., tuple[Engine, Found]]) -> None:
    engine, found = start(name)
    (lane,) = engine.client.transport.loop.lanes
    for stage in lane.stages.values():
        request = stage.probe(key=-1)
        engine.submit(stage.task, request.tokens * 3, request.params).result(60)
    assert found == []


def test_everything_that_generation_returns(start: Callable[..., tuple[Engine, Found]]) -> None:
    """In chunks, beside a request without any of it; routed experts are read by the plugin's observer."""
    engine, found = start("qwen2-moe", enable_return_hidden_states=True, chunked_prefill_size=8)
    params = GenerationParams(
        max_new_tokens=6,
        ignore_eos=True,
        min_new_tokens=3,
        frequency_penalty=0.5,
        logit_bias=((7, 2.0),),
        logprobs=LogprobParams(start=0, top=3, ids=(1, 2)),
        hidden_states="all",
        experts_from=0,
    )
    tickets = [engine.submit("generation", list(range(5, 30)), each) for each in (params, GenerationParams())]
    for ticket in tickets:
        ticket.result(60)
    assert found == []


@pytest.mark.parametrize("options", [{}, {"dimensions": 16}, {"normalize": False, "skip": 3}])
def test_every_option_of_embedding(options: dict[str, Any], start: Callable[..., tuple[Engine, Found]]) -> None:
    engine, found = start("llama", task=("embedding",), chunked_prefill_size=8, matryoshka=True)
    for each in (EmbeddingParams(), EmbeddingParams(**options)):
        engine.submit("embedding", list(range(5, 30)), each)
    engine.submit("embedding", list(range(9)), EmbeddingParams(**options)).result(60)
    assert found == []


@pytest.mark.parametrize("bug", ["item", "tensor", "nonzero", "mask"])
def test_what_waits_is_found(bug: str, start: Callable[..., tuple[Engine, Found]]) -> None:
    engine, found = start("llama")
    stage = engine.client.transport.loop.lanes[0].stages["generation"].stage
    launch = stage.launch

    def waits(part: Part, hidden: torch.Tensor) -> Launched:
        if bug == "item":
            hidden.sum().item()
        elif bug == "tensor":
            torch.tensor([row.end for row in part.rows])
        elif bug == "nonzero":
            hidden.nonzero()
        else:
            hidden[hidden[:, 0] > 0]
        launched: Launched = launch.__wrapped__(part, hidden)
        return launched

    stage.launch = watched(waits, found)
    engine.submit("generation", [5, 6, 7], GenerationParams(max_new_tokens=2)).result(60)
    assert len(found) >= 2
    assert all(bug in each or bug == "mask" for each in found)
