"""Two tasks in one forward pass, and not one hook call while they are served."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from trunkline.core import Engine
from trunkline.core.client.client import Client
from trunkline.core.client.supervisor import supervised
from trunkline.core.discovery import Plugin, find
from trunkline.core.engine.scheduling.batch import Batch
from trunkline.core.host import Host
from trunkline.core.server.app import create_app
from trunkline.core.types import Part, Step
from trunkline.plugins.generation.schemas import GenerationParams

PROMPT = list(range(10, 40))


@pytest.fixture
def surprise(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugin]:
    """The example plugin, imported from its folder."""
    monkeypatch.syspath_prepend(repository / "examples" / "trunkline-surprise")
    yield Plugin("surprise", "trunkline_surprise")
    for name in [name for name in sys.modules if name.startswith("trunkline_surprise")]:
        del sys.modules[name]


@pytest.fixture
def engine(zoo: Callable[[str], Path], surprise: Plugin) -> Iterator[Engine]:
    with Engine(
        str(zoo("llama")), host=Host([*find(), surprise]), dtype="float32", chunked_prefill_size=16, threads=1
    ) as engine:
        yield engine


def serve_both(engine: Engine) -> list[Batch]:
    """Score texts while another is generated; the batches that ran."""
    from trunkline_surprise.stage import SurpriseParams

    (lane,) = engine.client.transport.loop.lanes
    batches: list[Batch] = []
    plan = lane.scheduler.plan

    def watched(**options: Any) -> Batch | None:
        batch = plan(**options)
        if batch is not None:
            batches.append(batch)
        return batch

    lane.scheduler.plan = watched  # type: ignore[method-assign]
    alone = engine.submit("generation", PROMPT, GenerationParams(max_new_tokens=24, temperature=0.0, ignore_eos=True))
    expected = alone.result(60).tokens
    assert engine.call("flush_cache")
    batches.clear()
    together = engine.submit(
        "generation", PROMPT, GenerationParams(max_new_tokens=24, temperature=0.0, ignore_eos=True)
    )
    scored = [engine.submit("surprise", PROMPT, SurpriseParams()) for _ in range(3)]
    assert together.result(60).tokens == expected
    bits = {round(ticket.result(60).data["bits"], 3) for ticket in scored}
    assert len(bits) == 1
    return batches


def test_tasks_share_a_forward_pass_and_no_hook_is_called(engine: Engine) -> None:
    calls = engine.host.hook_calls
    batches = serve_both(engine)
    assert any(len({row.request.task for row in batch.rows}) == 2 for batch in batches), "no batch was mixed"
    assert engine.host.hook_calls == calls


def test_a_hook_call_on_the_hot_path_would_be_seen(engine: Engine) -> None:
    (lane,) = engine.client.transport.loop.lanes
    stage: Any = lane.stages["generation"]
    collect = stage.collect

    def leaky(part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        list(engine.host.ask("trunkline_settings"))
        steps: Iterable[Step] = collect(part, tensors)
        return steps

    stage.collect = leaky
    calls = engine.host.hook_calls
    serve_both(engine)
    assert engine.host.hook_calls > calls


async def test_the_front_calls_no_hook_either(zoo: Callable[[str], Path]) -> None:
    from trunkline.core.config import Config

    host = Host.load()
    config = Config.load(
        {"settings": {"engine": {"threads": 1}}, "models": [{"model_path": str(zoo("llama")), "dtype": "float32"}]},
        host,
    )
    engine = Client(config, host, supervised(config))
    await engine.start()
    try:
        app = create_app(host, engine, config.settings, models=config.models)
        calls = host.hook_calls
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            body = {"text": "hello", "sampling_params": {"max_new_tokens": 4}}
            for _ in range(3):
                assert (await http.post("/generate", json=body)).status_code == 200
            assert (await http.get("/get_model_info")).status_code == 200
            assert (await http.post("/generate", json={**body, "stream": True})).text.endswith("[DONE]\n\n")
        assert host.hook_calls == calls
    finally:
        await engine.stop()


@pytest.mark.field
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_its_bits_are_those_of_the_class_s_own_logits(name: str, zoo: Callable[[str], Path], surprise: Plugin) -> None:
    """Cohere scales its logits, Granite divides them and Gemma 2 caps them: the head "lm" does all of it."""
    import transformers
    from trunkline_surprise.stage import SurpriseParams

    model = transformers.AutoModelForCausalLM.from_pretrained(
        zoo(name), attn_implementation="eager", dtype=torch.float32
    )
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT]), use_cache=False).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(PROMPT[1:]), reduction="sum")
    with Engine(str(zoo(name)), host=Host([*find(), surprise]), dtype="float32", threads=1) as engine:
        bits = engine.submit("surprise", PROMPT, SurpriseParams()).result(60).data["bits"]
    assert bits == pytest.approx(float(nats) / 0.6931471805599453, rel=1e-5)
