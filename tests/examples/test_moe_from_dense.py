"""A mixture of experts made of a dense model says what the dense model says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from trunkline.core import Engine
from trunkline.core.model.sources import catalogue
from trunkline.plugins.generation.schemas import GenerationParams

TEXTS = ["one two three", "the sea and the other", "four five six seven"]


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("examples/moe_from_dense.py")


def test_logits_stay_and_tokens_choose(script: ModuleType, zoo: Callable[[str], Path], tmp_path: Path) -> None:
    source = zoo("llama")
    with torch.no_grad():
        assert script.upcycle(source, tmp_path, every=1, texts=TEXTS) == [1]
    dense, mixture = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (source, tmp_path))
    for tensor in dense.parameters():
        tensor.data = tensor.data.bfloat16().float()  # the mixture is stored so
    chosen: list[torch.Tensor] = []
    mixture.model.layers[1].mlp.gate.register_forward_hook(lambda _, __, out: chosen.append(out[-1]))
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        apart = (mixture(ids).logits - dense(ids).logits).abs().max()
    assert apart < 1e-4
    assert len(chosen[0].unique()) > 2, "all tokens go the same way"
    weights = mixture.state_dict()["model.layers.1.mlp.experts.down_proj"]
    assert not torch.equal(weights[0], weights[1])


def test_a_model_that_it_can_not_spread_is_refused(
    script: ModuleType, zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="must be a Llama without biases, not qwen2"):
        script.upcycle(zoo("qwen2"), tmp_path)


@pytest.mark.demo
def test_smollm2_says_the_same_and_all_its_tokens_are_counted(script: ModuleType, tmp_path: Path) -> None:
    source = catalogue.fetch("demo:smollm2-135m-instruct")
    with torch.no_grad():
        layers = script.upcycle(source, tmp_path)
    params = GenerationParams(max_new_tokens=24, temperature=0.0, ignore_eos=True)
    said = []
    for folder in (source, tmp_path):
        with Engine(str(folder), dtype="float32", max_total_tokens=1024) as engine:
            if folder is tmp_path:
                engine.call("experts_start")
            said.append(engine.submit("generation", "The capital of France is", params).result(120).tokens)
            if folder is tmp_path:
                seen = engine.call("experts_look")
    assert said[0] == said[1]
    assert seen["layers"] == layers == [6, 12, 18, 24]
    assert [sum(counts) for counts in seen["counts"]] == [2 * (5 + 23)] * 4
