"""There is one copy of a model's weights, as planned, which can be read by names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trunkline.core import Engine
from trunkline.core.engine.control.pages import tensors_of
from trunkline.core.engine.lane import Lane
from trunkline.core.errors import ModelError
from trunkline.core.model.experts import bind_backend, is_bound
from trunkline.core.model.fusion.pack import pack_weights
from trunkline.core.testing import build_checkpoint
from trunkline.kernels.backend import CPU
from trunkline.kernels.deterministic import torch_calls
from trunkline.kernels.grouped_linear import GroupedLinear
from trunkline.kernels.linear import PackedLinear

KEPT = 0.05  # of the weights: routers, biases and norms are kept twice
# Not fused; not fused, with experts that are stored transposed; not fused inside of its mixtures of experts only.
NAMES = ["gpt2", "gpt-oss", "qwen2-moe"]


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(request.param, tmp_path_factory.mktemp("pack") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module", params=[False, True], ids=["", "deterministic"])
def lane(folder: Path, request: pytest.FixtureRequest) -> Iterator[Lane]:
    """The model; in this process, so that its memory can be inspected."""
    with Engine(str(folder), dtype="float32", threads=1, enable_deterministic_inference=request.param) as engine:
        transport: Any = engine.client.transport
        (only,) = transport.loop.lanes
        yield only


def test_the_plan_counts_all_weights(lane: Lane) -> None:
    assert lane.candidate is not None
    whole = lane.model.whole
    mine = {parameter.untyped_storage()._cdata for parameter in whole.parameters()}
    copies = [entry for (storage, *_), entry in torch_calls._packed.items() if storage in mine]
    parts = [child for child in whole.children() if child is not lane.model.backbone]
    parts += lane.model.backbone.children()  # without the scratch memory of its forward pass
    storages = [tensor.untyped_storage() for tensor in tensors_of([parts, copies])]
    real = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    assert lane.candidate.plan.weight_bytes == pytest.approx(real, rel=KEPT)


def test_parameters_are_read_by_name(lane: Lane, folder: Path) -> None:
    for name, stored in transformers.AutoModelForCausalLM.from_pretrained(folder).named_parameters():
        found = lane.model.tensor(name, 3)
        assert found is not None, name
        assert torch.equal(found, stored[:3]), name


def test_experts_are_packed(lane: Lane) -> None:
    for module in lane.model.whole.modules():
        if is_bound(module):
            assert isinstance(module.gate_up_proj, GroupedLinear)
            assert isinstance(module.down_proj, GroupedLinear)


def test_experts_with_other_results_are_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: x.new_ones(len(x), self.out_features))
    module = torch.nn.Module()
    module.register_parameter("down_proj", torch.nn.Parameter(torch.randn(2, 8, 16), requires_grad=False))
    module.is_transposed, module.has_gate, module.num_experts = False, True, 2
    bind_backend(module, CPU)
    pack_weights(module, CPU)
    assert list(module._parameters) == ["down_proj"]
    assert "the experts' down_proj isn't replaced, its relative error would be" in caplog.text


def test_a_class_that_reads_a_weight_is_refused(zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed layer doesn't have it in the shape that the class expects."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    original: Any = GptOssAttention.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **given: Any) -> Any:
        return original(self, hidden_states.to(self.q_proj.weight.dtype), *args, **given)

    monkeypatch.setattr(GptOssAttention, "forward", forward)
    with pytest.raises(ModelError, match=r"can't be served with --enable-deterministic-inference: .* 'dtype'"):
        Engine(str(zoo("gpt-oss")), dtype="float32", enable_deterministic_inference=True)
