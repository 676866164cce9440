"""Routed experts of single requests: those of transformers' own routers, whatever the scheduler does."""

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
from trunkline.plugins.generation.sampling.experts import UNSEEN, ChoiceKeeper, keeper_of
from trunkline.plugins.generation.schemas import GenerationParams

MIXTURES = ["gpt-oss", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3", "llama4"]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 8}
STARTS = [0, 7, 41]


def prompts() -> list[list[int]]:
    """Of 23 and 41 tokens, and the second once more."""
    draw = torch.Generator().manual_seed(9)
    first, second = (torch.randint(4, 500, (n,), generator=draw).tolist() for n in (23, 41))
    return [first, second, second]


@cache
def whole_model(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)


def chosen_by_routers(path: Path, ids: list[int]) -> dict[int, np.ndarray]:
    """Decoder layer -> sorted choices ``[T, k]`` of transformers' own routers; Llama 4's are its scores above 0."""
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
            assert (found[:, layer] == UNSEEN).all()


@pytest.mark.parametrize("name", MIXTURES)
def test_choices_are_those_of_the_routers(zoo: Callable[[str], Path], asked: Callable[..., Any], name: str) -> None:
    """In chunks, in mixed batches, over a warm cache, retracted, beside the recorder of moe_stats."""
    path = zoo(name)
    one = asked(path, chunked_prefill_size=9, enable_expert_distribution_metrics=True)
    retracted: set[int] = set()

    def victim(request: Request) -> bool:
        if request.key in retracted or request.output_len < 3:
            return False
        retracted.add(request.key)
        return True

    one.victim = victim
    plain = one(input_ids=prompts(), sampling_params=GREEDY)
    for record, prompt in zip(plain, prompts(), strict=True):
        assert "routed_experts" not in record["meta_info"], prompt
    for start in STARTS[:2]:
        records = one(
            input_ids=prompts(), sampling_params=GREEDY, return_routed_experts=True, routed_experts_start_len=start
        )
        for record, prompt in zip(records, prompts(), strict=True):
            check(path, record, prompt, start)
            assert record["meta_info"]["cached_tokens"] == min(start, len(prompt) - 1)
    assert len(retracted) == 9
    (keeper,) = [one for one in one.lane.model.expert_observers if isinstance(one, ChoiceKeeper)]
    assert not keeper.active, "choices of requests that have ended are kept"


def test_a_start_at_the_end_of_the_prompt_is_about_the_output_only(
    zoo: Callable[[str], Path], asked: Callable[..., Any]
) -> None:
    one = asked(zoo("mixtral"))
    prompt = prompts()[0]
    body = {"return_routed_experts": True, "routed_experts_start_len": len(prompt)}
    for _ in range(2):
        (record,) = one(input_ids=[prompt], sampling_params=GREEDY, **body)
        check(one.path, record, prompt, len(prompt))
    assert record["meta_info"]["cached_tokens"] == len(prompt) - 1
    (none,) = one(input_ids=[prompt], sampling_params={"max_new_tokens": 0}, return_routed_experts=True)
    check(one.path, none, prompt, 0)


def test_a_request_that_is_retracted_reuses_what_was_seen(
    zoo: Callable[[str], Path], asked: Callable[..., Any]
) -> None:
    one = asked(zoo("mixtral"), chunked_prefill_size=9)
    retracted: list[Request] = []

    def victim(request: Request) -> bool:
        if retracted or request.output_len < 4:
            return False
        retracted.append(request)
        return True

    one.victim = victim
    (record,) = one(input_ids=[prompts()[1]], sampling_params=GREEDY, return_routed_experts=True)
    check(one.path, record, prompts()[1], 0)
    assert retracted[0].needs.reuse_up_to == 41 + 3


def test_a_dense_model_and_choices_that_nobody_sees_are_refused() -> None:
    with pytest.raises(RequestError, match="needs a MoE model"):
        keeper_of(SimpleNamespace(name="tiny", expert_layers=None))  # type: ignore[arg-type]
    hidden = SimpleNamespace(name="tiny", expert_layers=ExpertLayers((), 2, 8, "padding would be counted."))
    with pytest.raises(RequestError, match=r"expert choices of tiny can't be seen. padding would be counted\."):
        keeper_of(hidden)  # type: ignore[arg-type]


class Row:
    def __init__(self, key: int, start: int, end: int) -> None:
        self.request = Request(key, str(key), "generation", GenerationParams(), list(range(99)), 99)
        self.start, self.end = start, end


def show(keeper: ChoiceKeeper, *rows: Row, layer: int = 1) -> None:
    """A pass in which position p of request q chooses expert 100 q + p."""
    keeper.begin_pass(rows)
    chosen = [[100 * row.request.key + p] for row in rows for p in range(row.start, row.end)]
    keeper.observe(layer, torch.tensor(chosen))
    keeper.end_pass()


def test_rows_of_others_are_not_kept_and_positions_that_come_again_change_nothing() -> None:
    keeper = ChoiceKeeper(ExpertLayers((1,), 2, 8))
    choices = keeper.keep(2, 3)
    show(keeper, Row(1, 0, 4), Row(2, 0, 5))
    assert choices.seen == 5
    show(keeper, Row(2, 2, 6), Row(3, 0, 2))
    assert choices.seen == 6
    assert choices.take(6)[:, 1, 0].tolist() == [203, 204, 205]
    assert (choices.take(6)[:, 0] == UNSEEN).all()


def test_a_pass_that_was_missed_leaves_a_gap_that_is_computed_again() -> None:
    keeper = ChoiceKeeper(ExpertLayers((1,), 2, 8))
    choices = keeper.keep(2, 0)
    show(keeper, Row(2, 0, 2))
    show(keeper, Row(2, 4, 5))
    assert choices.seen == 2
    assert choices.take(5)[:, 1, 0].tolist() == [200, 201, UNSEEN, UNSEEN, 204]


def test_a_pass_with_other_tokens_than_rows_is_refused() -> None:
    keeper = ChoiceKeeper(ExpertLayers((1,), 2, 8))
    keeper.keep(2, 0)
    keeper.begin_pass([Row(2, 0, 2)])
    keeper.observe(1, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="3 tokens were routed in a pass of 2"):
        keeper.end_pass()
