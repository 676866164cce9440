"""Transforms of plugins, applied to models: what replaces a layer, what stays, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.core.discovery import Plugin, Provided
from trunkline.core.errors import ModelError, PluginError
from trunkline.core.model import loader
from trunkline.core.model.attention import packed_layout
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.sizes.plan import plan_model
from trunkline.core.model.sources.info import read_info
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelSource, Transform
from trunkline.kernels.backend import CPU, CPU_DETERMINISTIC
from trunkline.kernels.linear import LinearLayer, PackedLinear, PlainLinear

Pack = Callable[[Sequence[str], torch.Tensor], LinearLayer | None]
Apply = Callable[..., LoadedModel]

KINDS = ["llama", "bert", "gemma2", "qwen2-moe", "mixtral", "gpt-oss", "gpt2", "modernbert"]
NOT_DETERMINISTIC = ["llama4", "deepseek-v2", "deberta"]  # can't be served in that mode
NAME = "model.layers.1.self_attn.k_proj.weight"


def halved(_: Sequence[str], weight: torch.Tensor) -> LinearLayer:
    return PlainLinear(weight / 2)


def exact(_: Sequence[str], weight: torch.Tensor) -> LinearLayer:
    return PlainLinear(weight)


@pytest.fixture
def apply(zoo: Callable[[str], Path]) -> Apply:
    """``apply(*transforms)``: a Llama that is stored so."""

    def made(*transforms: Transform, name: str = "llama", deterministic: bool = False) -> LoadedModel:
        source = ModelSource(name, str(zoo(name)))
        settings = ModelSettings(model_path=source.path, dtype="float32")
        provided = [Provided(Plugin("p", "p:p", "dist", "1.0"), one) for one in transforms]
        kernels = CPU_DETERMINISTIC if deterministic else CPU
        return loader.load(source, read_info(source, settings), settings, [], kernels, transforms=provided)

    return made


def hidden(model: LoadedModel) -> torch.Tensor:
    ids = torch.arange(5, 45)
    return model.forward(ids, torch.arange(40), packed_layout([40]), None)


def test_the_layer_computes_what_is_served_and_the_weight_is_read_from_it(apply: Apply) -> None:
    plain, half = apply(), apply(Transform("half", halved, 0.6))
    assert half.stored_as.endswith("matrices as half")
    assert not torch.allclose(hidden(half), hidden(plain), atol=1e-2)
    mine, theirs = half.tensor(NAME, 3), plain.tensor(NAME, 3)
    assert mine is not None
    assert theirs is not None
    assert torch.equal(2 * mine, theirs)


@pytest.mark.parametrize(
    ("name", "deterministic"), [*product(KINDS, [False, True]), *product(NOT_DETERMINISTIC, [False])]
)
def test_an_exact_transform_changes_nothing(apply: Apply, name: str, deterministic: bool) -> None:
    plain = apply(name=name)
    same = Transform("same", lambda _, weight: PackedLinear(weight), 0.0)
    model = apply(same, name=name, deterministic=deterministic)
    matrices = re.fullmatch(r"(\d+) of (\d+) matrices as same", model.stored_as)
    assert matrices is not None
    assert matrices[1] == matrices[2]
    torch.testing.assert_close(hidden(model), hidden(plain), rtol=1e-4, atol=1e-4)
    for tensor, parameter in plain.whole.named_parameters():
        mine = model.tensor(tensor, 5)
        assert mine is not None
        assert torch.equal(mine, parameter[:5])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]),
        ("modernbert", ["attn.Wqkv.weight", "attn.Wo.weight", "mlp.Wi.weight", "mlp.Wo.weight"]),
        ("qwen2-moe", [
            "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
            "mlp.experts.3.gate_proj.weight", "mlp.experts.3.up_proj.weight", "mlp.experts.3.down_proj.weight",
            "mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight",
            "mlp.shared_expert.down_proj.weight",
        ]),
        ("mixtral", [
            "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
            "block_sparse_moe.experts.3.w1.weight", "block_sparse_moe.experts.3.w3.weight",
            "block_sparse_moe.experts.3.w2.weight",
        ]),
        ("gpt-oss", [
            "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
            "mlp.experts.gate_up_proj[3]", "mlp.experts.down_proj[3]",
        ]),
    ],
)  # fmt: skip
def test_all_matrices_of_a_layer_are_seen_but_those_of_routers(apply: Apply, name: str, expected: list[str]) -> None:
    seen: list[str] = []
    with pytest.raises(ModelError, match="No weight"):
        apply(Transform("none", lambda names, _: seen.extend(names), 0.0), name=name)
    layer = [one.partition(".1.")[2] for one in seen if re.search(r"(layers|h)\.1\.", one)]
    assert [one for one in layer if not re.search(r"experts\D*[0-24-9]\b", one)] == expected


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "modernbert", "qwen2-moe", "gpt-oss"])
def test_the_plan_knows_how_many_numbers_there_are(apply: Apply, zoo: Callable[[str], Path], name: str) -> None:
    numbers: list[int] = []
    with pytest.raises(ModelError, match="No weight"):
        apply(Transform("none", lambda _, weight: numbers.append(weight.numel()), 0.0), name=name)
    source = ModelSource(name, str(zoo(name)))
    settings = ModelSettings(model_path=source.path, dtype="float32")
    plan = plan_model(source, read_info(source, settings), settings, torch.device("cpu"))
    assert plan.matrix_numbers == pytest.approx(sum(numbers), rel=0.03)  # it counts routers, too


def test_experts_that_stay_multiply_beside_those_that_are_packed(apply: Apply) -> None:
    def pack(names: Sequence[str], weight: torch.Tensor) -> LinearLayer | None:
        return PackedLinear(weight) if "experts.2." in names[0] else None

    plain, some = apply(name="qwen3-moe"), apply(Transform("second", pack, 0.0), name="qwen3-moe")
    assert some.stored_as.startswith("4 of ")
    torch.testing.assert_close(hidden(some), hidden(plain), rtol=1e-4, atol=1e-4)
    name = "model.layers.1.mlp.experts.down_proj"
    mine, theirs = some.tensor(name, 8), plain.tensor(name, 8)
    assert mine is not None
    assert theirs is not None
    assert torch.equal(mine, theirs)
    assert name not in dict(some.whole.named_parameters())  # its memory is freed


def test_a_class_that_reads_weights_of_its_modules_keeps_them(
    apply: Apply, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    forward = GPT2MLP.forward
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, x: forward(self, x.to(self.c_fc.weight.dtype)))
    model = apply(Transform("same", exact, 0.0, optional=True), name="gpt2")
    assert model.stored_as == ""
    assert torch.equal(hidden(model), hidden(apply(name="gpt2")))
    assert re.search(r"aren't fused stay as they are, because a weight is read: .*no attribute 'dtype'", caplog.text)


def test_a_module_that_layers_share_is_stored_once(apply: Apply, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Model

    init = GPT2Model.__init__

    def shared(self: Any, config: Any) -> None:
        init(self, config)
        self.h[1].mlp = self.h[0].mlp
        self.h[1].attn.c_proj = self.h[0].attn.c_proj

    monkeypatch.setattr(GPT2Model, "__init__", shared)
    seen: list[str] = []

    def pack(names: Sequence[str], weight: torch.Tensor) -> LinearLayer:
        seen.extend(names)
        return PlainLinear(weight / 2)

    model = apply(Transform("half", pack, 0.6), name="gpt2")
    assert [one.removeprefix("transformer.h.") for one in seen] == [
        "0.attn.c_attn.weight", "0.attn.c_proj.weight", "0.mlp.c_fc.weight", "0.mlp.c_proj.weight",
        "1.attn.c_attn.weight",
    ]  # fmt: skip
    first, second = model.backbone.h
    assert first.attn.c_proj is second.attn.c_proj
    assert first.mlp is second.mlp


def test_merged_tensors_are_named_in_the_order_of_their_rows(apply: Apply) -> None:
    seen: dict[tuple[str, ...], torch.Tensor] = {}

    def pack(names: Sequence[str], weight: torch.Tensor) -> None:
        seen[tuple(names)] = weight.clone()

    with pytest.raises(ModelError, match=r"No weight of LlamaForCausalLM can be stored as none; leave that out\."):
        apply(Transform("none", pack, 0.0))
    plain = apply()
    for names, weight in seen.items():
        parts = [plain.tensor(name, weight.shape[0]) for name in names]
        assert torch.equal(torch.cat([part for part in parts if part is not None]), weight)
    assert {len(names) for names in seen} == {1, 2, 3}


def test_the_first_transform_that_packs_a_matrix_wins(apply: Apply) -> None:
    def queries(names: Sequence[str], weight: torch.Tensor) -> LinearLayer | None:
        return PackedLinear(weight) if "q_proj" in names[0] else None

    stored = apply(Transform("queries", queries, 0.0), Transform("rest", exact, 0.0)).stored_as
    layers, total = 2, 8
    assert stored == f"{layers} of {total} matrices as queries, {total - layers} of {total} matrices as rest"


def test_a_matrix_that_loses_too_much_stays_as_it_is(apply: Apply, caplog: pytest.LogCaptureFixture) -> None:
    def some(names: Sequence[str], weight: torch.Tensor) -> LinearLayer:
        return PlainLinear(weight / 2) if "down_proj" in names[0] else PlainLinear(weight)

    model = apply(Transform("some", some, 0.1))
    assert model.stored_as == "6 of 8 matrices as some"
    torch.testing.assert_close(hidden(model), hidden(apply()), rtol=1e-4, atol=1e-4)
    assert "model.layers.0.mlp.down_proj.weight stays as it is: as some its error would be 0.5000" in caplog.text


def wrong_type(_: Sequence[str], weight: torch.Tensor) -> Any:
    return torch.nn.Linear(weight.shape[1], weight.shape[0])


def wrong_shape(_: Sequence[str], weight: torch.Tensor) -> LinearLayer:
    return PlainLinear(weight[:-1])


def wrong_dtype(_: Sequence[str], weight: torch.Tensor) -> LinearLayer:
    return PlainLinear(weight.double())


def fails(_: Sequence[str], weight: torch.Tensor) -> LinearLayer:
    raise KeyError("oops")


@pytest.mark.parametrize(
    ("pack", "error", "message"),
    [
        (wrong_type, 0.1, "pack must return a LinearLayer or None, not a Linear"),
        (wrong_shape, 0.1, r"the layer gives torch\.float32 \(8, \d+\), not torch\.float32"),
        (wrong_dtype, 0.1, "the transform 'bad' failed for model.layers.0"),
        (fails, 0.1, "oops"),
        (halved, 0.0, "the weight that comes back from the layer isn't the one that it was given"),
    ],
)
def test_a_transform_that_fails_is_reported_with_its_plugin(
    apply: Apply, pack: Pack, error: float, message: str
) -> None:
    with pytest.raises(PluginError, match=rf"dist 1\.0.*{message}"):
        apply(Transform("bad", pack, error))


def test_recorded_passes_follow(apply: Apply) -> None:
    """A layer that can't be recorded ends the recording of passes; one that can keeps it."""
    model = apply(Transform("plain", exact, 0.0))
    assert not model.backbone.forward.replay
    assert model.backbone.forward.row_parallel is None
    for change in (
        Transform("packed", lambda _, weight: PackedLinear(weight), 0.0),
        Transform("nothing", lambda *_: None, 0.0, optional=True),
    ):
        forward = apply(change).backbone.forward
        assert forward.replay
        assert forward.row_parallel is not None
