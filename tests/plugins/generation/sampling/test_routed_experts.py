"""Routed experts of single requests equal those of transformers' own routers, however they are scheduled."""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trunkline.core.errors import RequestError
from trunkline.core.types import ExpertLayers, Request
from trunkline.plugins.generation.sampling.routed_experts import MISSING, RoutedExpertsCapturer, capturer_of
from trunkline.plugins.generation.schemas import GenerationParams

MIXTURES = ["gpt-oss", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3", "llama4"]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 8}
STARTS = [0, 7, 41]


def prompts() -> list[list[int]]:
    """Prompts of 23 and 41 tokens; the second is repeated."""
    draw = torch.Generator().manual_seed(9)
    first, second = (torch.randint(4, 500, (n,), generator=draw).tolist() for n in (23, 41))
    return [first, second, second]


@cache
def whole_model(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)


def chosen_by_routers(path: Path, ids: list[int]) -> dict[int, np.ndarray]:
    """Decoder layer -> sorted expert ids ``[T, k]`` of transformers' own routers; Llama 4's have scores > 0."""
    found: dict[int, np.ndarray] = {}
    handles = []
    for name, module in whole_model(path).named_modules():
        if "Router" not in type(module).__name__:
            continue
        layer = int(name.split("layers.")[1].split(".")[0])

        def note(module: Any, _: Any, output: Any, layer: int = layer) -> None:
            indices = output[2] if len(output) == 3 else output[0].nonzero()[:, 1].view(len(output[0]), -1)
            found[layer] = indices.sort(-1).values.numpy()

        handles.append(module.register_forward_hook(note))
    with torch.inference_mode():
        whole_model(path)(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def check(path: Path, record: dict[str, Any], prompt: list[int], start: int, depth: int = 2) -> None:
    ids = prompt + record["output_ids"]
    expected = chosen_by_routers(path, ids[:-1])
    raw = np.frombuffer(base64.b64decode(record["meta_info"]["routed_experts"]), "<i4")
    found = raw.reshape(len(ids) - 1 - start, depth, -1)
    for layer in range(depth):
        if layer in expected:
            assert np.array_equal(np.sort(found[:, layer]), expected[layer][start:])
        else:
            assert (found[:, layer] == MISSING).all()


@pytest.mark.parametrize("name", MIXTURES)
def test_routed_experts_are_those_of_the_routers(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any], name: str
) -> None:
    """In chunks, in mixed batches, with cached prefixes and retraction, beside the recorder of moe_stats."""
    path = zoo(name)
    engine = recorded_engine(path, chunked_prefill_size=9, enable_expert_distribution_metrics=True)
    retracted: set[int] = set()

    def must_retract(request: Request) -> bool:
        if request.key in retracted or request.output_len < 3:
            return False
        retracted.add(request.key)
        return True

    engine.must_retract = must_retract
    plain = engine(input_ids=prompts(), sampling_params=GREEDY)
    for record, prompt in zip(plain, prompts(), strict=True):
        assert "routed_experts" not in record["meta_info"], prompt
    for start in STARTS[:2]:
        records = engine(
            input_ids=prompts(), sampling_params=GREEDY, return_routed_experts=True, routed_experts_start_len=start
        )
        for record, prompt in zip(records, prompts(), strict=True):
            check(path, record, prompt, start)
            assert record["meta_info"]["cached_tokens"] == min(start, len(prompt) - 1)
    assert len(retracted) == 9
    (capturer,) = [each for each in engine.lane.model.expert_observers if isinstance(each, RoutedExpertsCapturer)]
    assert not capturer.active, "requests that have ended are still captured"


def test_a_start_at_the_end_of_the_prompt_returns_the_output_only(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any]
) -> None:
    engine = recorded_engine(zoo("mixtral"))
    prompt = prompts()[0]
    body = {"return_routed_experts": True, "routed_experts_start_len": len(prompt)}
    for _ in range(2):
        (record,) = engine(input_ids=[prompt], sampling_params=GREEDY, **body)
        check(engine.path, record, prompt, len(prompt))
    assert record["meta_info"]["cached_tokens"] == len(prompt) - 1
    (none,) = engine(input_ids=[prompt], sampling_params={"max_new_tokens": 0}, return_routed_experts=True)
    check(engine.path, none, prompt, 0)


def test_a_retracted_request_reuses_the_prefix_that_was_observed(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any]
) -> None:
    engine = recorded_engine(zoo("mixtral"), chunked_prefill_size=9)
    retracted: list[Request] = []

    def must_retract(request: Request) -> bool:
        if retracted or request.output_len < 4:
            return False
        retracted.append(request)
        return True

    engine.must_retract = must_retract
    (record,) = engine(input_ids=[prompts()[1]], sampling_params=GREEDY, return_routed_experts=True)
    check(engine.path, record, prompts()[1], 0)
    assert retracted[0].needs.reuse_up_to == 41 + 3


def test_dense_models_and_experts_that_cannot_be_observed_are_refused() -> None:
    with pytest.raises(RequestError, match="needs a MoE model"):
        capturer_of(SimpleNamespace(name="tiny", expert_layers=None))  # type: ignore[arg-type]
    hidden = SimpleNamespace(name="tiny", expert_layers=ExpertLayers((), 2, 8, "padding would be counted."))
    with pytest.raises(RequestError, match=r"expert choices of tiny can't be seen. padding would be counted\."):
        capturer_of(hidden)  # type: ignore[arg-type]


class Row:
    def __init__(self, key: int, start: int, end: int) -> None:
        self.request = Request(key, str(key), "generation", GenerationParams(), list(range(99)), 99)
        self.start, self.end = start, end


def observe_pass(capturer: RoutedExpertsCapturer, *rows: Row, layer: int = 1) -> None:
    """Run a pass in which position p of request q is routed to expert 100 q + p."""
    capturer.begin_pass(rows)
    chosen = [[100 * row.request.key + p] for row in rows for p in range(row.start, row.end)]
    capturer.observe(layer, torch.tensor(chosen))
    capturer.end_pass()


def test_other_requests_are_not_captured_and_repeated_positions_are_overwritten() -> None:
    capturer = RoutedExpertsCapturer(ExpertLayers((1,), 2, 8))
    experts = capturer.start(2, 3)
    observe_pass(capturer, Row(1, 0, 4), Row(2, 0, 5))
    assert experts.known_end == 5
    observe_pass(capturer, Row(2, 2, 6), Row(3, 0, 2))
    assert experts.known_end == 6
    assert experts.read(6)[:, 1, 0].tolist() == [203, 204, 205]
    assert (experts.read(6)[:, 0] == MISSING).all()


def test_a_pass_that_was_not_observed_leaves_a_gap() -> None:
    capturer = RoutedExpertsCapturer(ExpertLayers((1,), 2, 8))
    experts = capturer.start(2, 0)
    observe_pass(capturer, Row(2, 0, 2))
    observe_pass(capturer, Row(2, 4, 5))
    assert experts.known_end == 2
    assert experts.read(5)[:, 1, 0].tolist() == [200, 201, MISSING, MISSING, 204]


def test_a_pass_with_another_number_of_tokens_raises() -> None:
    capturer = RoutedExpertsCapturer(ExpertLayers((1,), 2, 8))
    capturer.start(2, 0)
    capturer.begin_pass([Row(2, 0, 2)])
    capturer.observe(1, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="3 tokens were routed in a pass of 2"):
        capturer.end_pass()
