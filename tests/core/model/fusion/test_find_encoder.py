"""Fused encoder layers against transformers' own, on every architecture that might be taken for a BERT."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from trunkline.core.model import attention
from trunkline.core.model.architecture import adapt
from trunkline.core.model.attention import ForwardContext, packed_layout
from trunkline.core.model.fusion import encoder_layer as fused_encoder
from trunkline.core.model.fusion.encoder_layer import FusedEncoderForward, FusedEncoderLayer
from trunkline.core.model.fusion.find_decoder import FuseReport, fuse
from trunkline.kernels.backend import Backend, choose

LENGTHS = (5, 11, 1, 20)
SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "bert-tanh": ("BertModel", {"hidden_act": "gelu_new"}),
    "roberta": ("RobertaModel", {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaModel", {"pad_token_id": 1}),
    "camembert": ("CamembertModel", {"pad_token_id": 1}),
    "electra": ("ElectraModel", {"embedding_size": 48}),
    "electra-narrow": ("ElectraModel", {"embedding_size": 24}),
    "distilbert": ("DistilBertModel", {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80}),
    "bert-relu": ("BertModel", {"hidden_act": "relu"}),
    "roberta-prelayernorm": ("RobertaPreLayerNormModel", {"pad_token_id": 1}),
    "modernbert": (
        "ModernBertModel",
        {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
    ),
}
FUSED = ["bert", "bert-tanh", "roberta", "xlm-roberta", "camembert", "electra", "electra-narrow", "distilbert"]
KEPT = {"bert-relu": "another activation", "roberta-prelayernorm": "", "modernbert": "no layers to fuse found"}


def positions(spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """int64 ``[T]``: each row's positions, one row after another."""
    return torch.cat([torch.arange(start, end) for start, end in spans])


@pytest.fixture(params=["cpu", "torch_native"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return choose(request.param, "cpu")


@pytest.fixture
def build() -> Callable[..., Any]:
    """``build(name, dtype)``: a model of random weights with our attention, not yet fused."""
    attention.register()

    def get(name: str, dtype: torch.dtype = torch.float32) -> Any:
        architecture, changes = CLASSES[name]
        cls = getattr(transformers, architecture)
        known = {key: value for key, value in SIZES.items() if name != "distilbert" or key not in _OTHER_NAMES}
        config = cls.config_class(**{**known, **changes})
        torch.manual_seed(3)
        model = cls._from_config(config, attn_implementation=attention.NAME)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
        adapt(model)
        return model.to(dtype).eval().requires_grad_(False)

    return get


_OTHER_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def hidden(model: Any, backend: Backend, lengths: Sequence[int] = LENGTHS, **others: Any) -> torch.Tensor:
    """Of whole sequences packed in one row."""
    context = ForwardContext(packed_layout(lengths), None, backend)
    ids = (torch.arange(sum(lengths)) * 31 + 7) % model.config.vocab_size
    given = {"input_ids": ids[None], "trunk": context, **others}
    given["position_ids"] = positions([(0, length) for length in lengths])[None]
    with torch.inference_mode():
        result: torch.Tensor = model(**given).last_hidden_state[0].float()
    return result


def layers_of(model: Any) -> Any:
    stack: nn.ModuleList = model.transformer.layer if hasattr(model, "transformer") else model.encoder.layer
    return stack


@pytest.mark.parametrize("name", FUSED)
def test_fused_and_the_same(name: str, build: Callable[..., Any], backend: Backend) -> None:
    model = build(name)
    before = hidden(model, backend)
    report = fuse(model, backend)
    assert report.sentence == "2 of 2 layers fused"
    assert all(type(layer) is FusedEncoderLayer for layer in layers_of(model))
    assert report.fused_forward == (name != "electra-narrow")  # something stands between its embeddings and its layers
    assert isinstance(model.forward, FusedEncoderForward) == report.fused_forward
    torch.testing.assert_close(hidden(model, backend), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KEPT)
def test_kept_and_untouched(name: str, build: Callable[..., Any], backend: Backend) -> None:
    model = build(name)
    before = hidden(model, backend)
    report = fuse(model, backend)
    assert not report.fused
    assert not report.fused_forward
    assert KEPT[name] in report.sentence
    assert torch.equal(hidden(model, backend), before)


def test_token_types_and_the_pooler_come_out_as_before(build: Callable[..., Any], backend: Backend) -> None:
    model = build("bert")
    types = torch.arange(sum(LENGTHS))[None] % 2
    before, plain = hidden(model, backend, token_type_ids=types), hidden(model, backend)
    assert not torch.allclose(before, plain, atol=1e-2)
    with torch.inference_mode():
        context = ForwardContext(packed_layout([6]), None, backend)
        ids = torch.arange(6)[None]
        expected = model(input_ids=ids, position_ids=ids, trunk=context)
        assert fuse(model, backend).fused_forward
        torch.testing.assert_close(hidden(model, backend, token_type_ids=types), before, rtol=1e-4, atol=1e-4)
        result = model(input_ids=ids, position_ids=ids, trunk=context)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-4)


def test_more_tokens_than_are_done_at_once(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    monkeypatch.setattr(fused_encoder, "BLOCK_TOKENS", 8)
    model = build("bert")
    before = hidden(model, backend)
    assert fuse(model, backend).fused_forward
    torch.testing.assert_close(hidden(model, backend), before, rtol=1e-4, atol=1e-4)


def test_only_rows_that_are_wanted_leave_the_last_layer(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    model, wanted = build("bert"), torch.tensor([0, LENGTHS[0], LENGTHS[0] + 2])
    assert fuse(model, backend).fused_forward
    every = hidden(model, backend)
    normed: list[int] = []
    last = layers_of(model)[-1]
    norm = last.mlp_norm
    monkeypatch.setattr(last, "mlp_norm", lambda x, *others: normed.append(len(x)) or norm(x, *others))
    context = ForwardContext(packed_layout(LENGTHS), None, backend, wanted)
    torch.testing.assert_close(hidden(model, backend, trunk=context), every[wanted], rtol=1e-5, atol=1e-5)
    assert normed == [3]


def test_sequences_do_not_see_each_other(build: Callable[..., Any], backend: Backend) -> None:
    model = build("roberta")
    fuse(model, backend)
    both = hidden(model, backend, (9, 7))
    torch.testing.assert_close(both[:9], hidden(model, backend, (9,)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_bfloat16_is_proven_in_float32(name: str, build: Callable[..., Any], backend: Backend) -> None:
    model = build(name, torch.bfloat16)
    exact = hidden(copy.deepcopy(model).float(), backend)
    before = hidden(model, backend)
    assert len(fuse(model, backend).fused) == 2
    assert (hidden(model, backend) - exact).norm() <= 1.5 * (
        before - exact
    ).norm()  # no less exact than transformers' own


def test_padded_batches_are_refused(build: Callable[..., Any], backend: Backend) -> None:
    """Fused layers would take another row of a batch, or its mask, for nothing."""
    model = build("bert")
    fuse(model, backend)
    ids = torch.arange(12).view(2, 6)
    with pytest.raises(ValueError, match="packed sequences"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    context = ForwardContext(packed_layout([6]), None, backend)
    with pytest.raises(ValueError, match="packed sequences"):
        model(input_ids=ids, position_ids=ids % 6, trunk=context)


def test_own_forward_still_answers_what_the_walk_does_not(build: Callable[..., Any], backend: Backend) -> None:
    model = build("bert")
    assert fuse(model, backend).fused_forward
    plain = hidden(model, backend, (6,))
    with torch.inference_mode():
        embeds = model.embeddings.word_embeddings((torch.arange(6) * 31 + 7)[None] % 120)
        context = ForwardContext(packed_layout([6]), None, backend)
        other = model(inputs_embeds=embeds, position_ids=torch.arange(6)[None], trunk=context)
    torch.testing.assert_close(other.last_hidden_state[0], plain, rtol=1e-5, atol=1e-5)


def test_originals_are_freed(build: Callable[..., Any], backend: Backend) -> None:
    model = build("bert")
    originals = [weakref.ref(layer) for layer in layers_of(model)]
    matrices = [weakref.ref(layer.output.dense.weight) for layer in layers_of(model)]
    fuse(model, backend)
    assert all(original() is None for original in (*originals, *matrices))


def _norm_without(backend: Backend, index: int) -> Backend:
    """A backend whose layer norm forgets one of its arguments (x, weight, bias, eps, residual, out)."""

    def norm(*given: Any) -> torch.Tensor:
        x, weight, bias, eps, _, out = given
        neutral = (x, torch.ones_like(weight), torch.zeros_like(bias), eps + 0.1, None, out)
        return backend.layer_norm(*given[:index], neutral[index], *given[index + 1 :])

    return replace(backend, layer_norm=norm)


def _forget_biases(backend: Any) -> Backend:
    methods = {"set_bias": lambda self, _: backend.linear.set_bias(self, None)}
    return replace(backend, linear=type("Defective", (backend.linear,), methods))


DEFECTS: dict[str, Callable[[Backend], Backend]] = {
    "another activation": lambda one: replace(
        one, activate=lambda x, name: torch.tanh(x) if len(x) > 1 else one.activate(x, name)
    ),
    "no weight in norms": lambda one: _norm_without(one, 1),
    "no bias in norms": lambda one: _norm_without(one, 2),
    "wrong eps": lambda one: _norm_without(one, 3),
    "no residual": lambda one: _norm_without(one, 4),
    "biases forgotten": _forget_biases,
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_proof_catches(defect: str, build: Callable[..., Any], backend: Backend) -> None:
    """Even in a fresh checkpoint, whose norms and biases are 1 and 0."""
    model = build("bert")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith("LayerNorm.weight")))
    before = hidden(model, backend)
    report = fuse(model, DEFECTS[defect](backend))
    assert not report.fused
    assert "does more than its modules show" in report.sentence
    torch.testing.assert_close(hidden(model, backend), before, rtol=1e-5, atol=1e-5)


def test_a_layer_that_scales_keeps_its_forward(build: Callable[..., Any], backend: Backend) -> None:
    """The same parts, another forward: only the one layer stays, and transformers' loop with it."""
    model = build("bert")
    second = layers_of(model)[1]
    plain = second.forward
    second.forward = lambda *given, **others: plain(*given, **others) * 1.01
    before = hidden(model, backend)
    report = fuse(model, backend)
    assert report.fused == [0]
    assert list(report.kept) == [1]
    assert not report.fused_forward
    torch.testing.assert_close(hidden(model, backend), before, rtol=1e-4, atol=1e-4)


def test_a_walk_that_differs_is_not_taken(build: Callable[..., Any], backend: Backend) -> None:
    """A class that does something to the embeddings before its layers get them."""
    model = build("bert")
    model.encoder.register_forward_pre_hook(lambda _, given: (given[0] * 1.1, *given[1:]))
    before = hidden(model, backend)
    report = fuse(model, backend)
    assert len(report.fused) == 2
    assert not report.fused_forward
    torch.testing.assert_close(hidden(model, backend), before, rtol=1e-4, atol=1e-4)


def test_a_failing_warm_up_changes_nothing(build: Callable[..., Any], backend: Backend) -> None:
    model = build("bert")
    layers = list(layers_of(model))

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel")

    model.embeddings.forward = fail
    assert fuse(model, backend) == FuseReport()
    assert all(mine is theirs for mine, theirs in zip(layers, layers_of(model), strict=True))
