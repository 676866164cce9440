"""``--quantization``: what is lost, what is saved, weight updates, and other devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.core import Engine
from trunkline.core.engine.control.pages import tensors_of
from trunkline.core.engine.lane import Lane
from trunkline.core.errors import ConfigError, ModelError
from trunkline.core.model.attention import packed_layout
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.transforms import quantization
from trunkline.core.testing import build_checkpoint
from trunkline.kernels.quantized.linear import QuantizedLinear
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.generation.offline import generate

# Relative errors of hidden rows after all layers of random weights, which are the worst case of int4.
ERROR = {"int8": 0.08, "int4": 0.35}
TEXTS = ["a cat on a mat", "stocks fell", "the weather is fine today, isn't it?"]


def start(folder: Path, **options: Any) -> Engine:
    return Engine(str(folder), dtype="float32", threads=1, **options)


def lane_of(engine: Engine) -> Lane:
    transport: Any = engine.client.transport
    lane: Lane = transport.loop.lanes[0]
    return lane


def rows(model: LoadedModel) -> torch.Tensor:
    return model.forward(torch.arange(5, 69), torch.arange(64), packed_layout([64]), None).clone()


def third_fails() -> Callable[..., QuantizedLinear]:
    """Makes layers; raises an error for the third."""
    made: list[QuantizedLinear] = []

    def make(*arguments: Any) -> QuantizedLinear:
        if len(made) == 2:
            raise MemoryError("no room")
        made.append(QuantizedLinear(*arguments))
        return made[-1]

    return make


def update(engine: Engine, folder: Path) -> bool:
    async def call() -> Any:
        return await engine.client.call("update_weights", model_path=str(folder))

    return bool(engine.run(call())["success"])


@pytest.mark.parametrize("name", list(ERROR))
@pytest.mark.parametrize("checkpoint", ["llama", "qwen3", "gemma2", "gpt2", "granite"])
def test_hidden_rows_are_near(zoo: Callable[[str], Path], checkpoint: str, name: str) -> None:
    with start(zoo(checkpoint)) as plain, start(zoo(checkpoint), quantization=name) as small:
        expected, found = rows(lane_of(plain).model), rows(lane_of(small).model)
        assert small.client.models[0].stored_as.endswith(f"matrices as {name}")
    error = float((found - expected).norm() / expected.norm())
    assert 1e-4 < error < ERROR[name]


@pytest.mark.parametrize("name", list(ERROR))
def test_rows_are_those_of_the_dequantised_weights(zoo: Callable[[str], Path], name: str) -> None:
    """But for the rows' own quantisation, which both modes have."""
    with start(zoo("llama")) as plain, start(zoo("llama"), quantization=name) as small:
        reference, model = lane_of(plain).model, lane_of(small).model
        for layer, other in zip(reference.backbone.layers, model.backbone.layers, strict=True):
            for part in ("qkv", "out", "gate_up", "down"):
                linear = getattr(layer, part)
                setattr(layer, part, type(linear)(getattr(other, part).weight(slice(0, linear.out_features))))
        reference.backbone.forward.replay, reference.backbone.forward.row_parallel = False, None  # of the old layers
        expected, found = rows(reference), rows(model)
    assert float((found - expected).norm() / expected.norm()) < ERROR["int8"]


@pytest.mark.parametrize("name", list(ERROR))
def test_the_plan_counts_what_is_stored(zoo: Callable[[str], Path], name: str) -> None:
    with start(zoo("llama"), quantization=name) as engine:
        lane = lane_of(engine)
        assert lane.candidate is not None
        backbone = lane.model.backbone
        parts = [*backbone.layers, backbone.embed_tokens, lane.model.whole.lm_head]
        storages = [tensor.untyped_storage() for tensor in tensors_of(parts)]
        real = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        plan = lane.candidate.plan
        assert plan.weight_bytes == pytest.approx(real, rel=0.1)
        assert plan.loading_bytes > plan.weight_bytes


def test_an_encoder(zoo: Callable[[str], Path]) -> None:
    with start(zoo("bert")) as plain, start(zoo("bert"), quantization="int8") as small:
        expected, found = encode(plain, TEXTS), encode(small, TEXTS)
    assert ((expected * found).sum(1) > 0.999).all()


@pytest.mark.parametrize("name", list(ERROR))
def test_updates_go_the_same_way(
    zoo: Callable[[str], Path], other: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails leaves the same bits; one that succeeds gives what a start with the new weights gives."""
    tensor = "model.layers.1.mlp.down_proj.weight"
    with start(other("llama"), quantization=name) as fresh, start(zoo("llama"), quantization=name) as engine:
        expected = rows(lane_of(fresh).model)
        before, kept = rows(lane_of(engine).model), lane_of(engine).model.tensor(tensor, 9)
        with monkeypatch.context() as patch:  # in the middle of packing
            patch.setattr(quantization, "QuantizedLinear", third_fails())
            assert not update(engine, other("llama"))
        again = lane_of(engine).model.tensor(tensor, 9)
        assert kept is not None
        assert again is not None
        assert torch.equal(again, kept)
        assert torch.equal(rows(lane_of(engine).model), before)
        assert update(engine, other("llama"))
        assert torch.equal(rows(lane_of(engine).model), expected)
        assert engine.client.models[0].stored_as.endswith(name)


def test_generated_text(zoo: Callable[[str], Path]) -> None:
    with start(zoo("llama"), quantization="int8") as engine:
        first, second = (generate(engine, [[5, 6, 7]], max_new_tokens=8, temperature=0) for _ in range(2))
    assert first[0]["output_ids"] == second[0]["output_ids"]


def test_what_is_refused(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization = 'fp8'"):
        start(zoo("llama"), quantization="fp8")
    odd = build_checkpoint("llama", tmp_path / "odd", hidden_size=72, intermediate_size=100, head_dim=18)
    with pytest.raises(ModelError, match=r"No weight of LlamaForCausalLM can be stored as int8"):
        start(odd, quantization="int8")
    with pytest.raises(ModelError, match=r"--quantization int8 is for CPUs; leave it out, or give --device cpu"):
        quantization.transform("int8").pack(["x"], torch.empty(32, 32, device="meta"))
