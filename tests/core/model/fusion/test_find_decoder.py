"""Fused layers against transformers' own, on every architecture that might be taken for a Llama."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from trunkline.core.cache.pool import KVPool
from trunkline.core.model import attention, experts
from trunkline.core.model.attention import ForwardContext, packed_layout, paged_layout
from trunkline.core.model.fusion import decoder_layer as fused
from trunkline.core.model.fusion.decoder_layer import FusedLayer
from trunkline.core.model.fusion.decoder_modules import norm_of
from trunkline.core.model.fusion.find_decoder import FuseReport, fuse
from trunkline.kernels.backend import choose
from trunkline.kernels.cpu.processor import has_bfloat16_pairs
from trunkline.kernels.linear import PackedLinear

BACKEND = choose("cpu", "cpu")
FUSED = ["llama", "llama-tied", "qwen2", "qwen3", "mistral-sliding", "phi3", "gemma2", "gemma3"]
ATTENTION_ONLY = ["mixtral", "qwen2-moe", "qwen3-moe"]
KEPT = {
    "granite": "forward does more than its modules show",
    "cohere": "aren't RMS norms",
    "gpt-oss": "sinks",
    "deepseek-v3": "another width",
    "olmoe": "over all heads together",
}


def positions(spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """int64 ``[T]``: each row's positions, one row after another."""
    return torch.cat([torch.arange(start, end) for start, end in spans])


@pytest.fixture
def build(zoo: Callable[[str], Path]) -> Callable[..., Any]:
    """``build(name, dtype)``: a fresh model of the zoo with our attention, not yet fused."""
    attention.register()
    experts.register()

    def get(name: str, dtype: torch.dtype = torch.float32) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            zoo(name), dtype=dtype, attn_implementation=attention.NAME, experts_implementation=experts.NAME
        )
        return model.eval().requires_grad_(False)

    return get


def logits(model: Any, lengths: tuple[int, ...] = (5, 11, 20)) -> torch.Tensor:
    """Of whole sequences packed in one row, without a pool."""
    ids = (torch.arange(sum(lengths)) * 31 + 7) % model.config.vocab_size
    spans = [(0, length) for length in lengths]
    context = ForwardContext(packed_layout(lengths), None, BACKEND)
    return run(model, ids, positions(spans), context)


def run(model: Any, ids: torch.Tensor, places: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    with torch.inference_mode():
        output = model(input_ids=ids[None], position_ids=places[None], use_cache=False, trunk=context)
    result: torch.Tensor = output.logits[0].float()
    return result


@pytest.mark.parametrize("name", FUSED + ATTENTION_ONLY)
def test_fused_and_the_same(name: str, build: Callable[..., Any]) -> None:
    model = build(name)
    before = logits(model)
    report = fuse(model, BACKEND)
    assert report.fused == list(range(len(model.model.layers)))
    assert report.sentence == f"{len(report.fused)} of {len(report.fused)} layers fused"
    layers = list(model.model.layers)
    assert all(type(layer) is FusedLayer for layer in layers)
    assert all((layer.mlp is None) == (name in FUSED) for layer in layers)
    assert report.fused_forward == (name != "gemma3")  # two rotary embeddings: transformers hands out the right one
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KEPT)
def test_kept_and_untouched(name: str, build: Callable[..., Any]) -> None:
    model = build(name)
    before = logits(model)
    report = fuse(model, BACKEND)
    assert not report.fused
    assert not report.fused_forward
    assert KEPT[name] in report.sentence
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)  # only the head is packed


def test_other_kinds_of_model_are_left_alone(build: Callable[..., Any]) -> None:
    assert fuse(build("gpt2"), BACKEND).sentence == "no layers to fuse found"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral"])
def test_decodes_from_the_pool(name: str, build: Callable[..., Any]) -> None:
    """Chunked prefill, then one token at a time, equals the whole sequence at once."""
    model = build(name)
    whole = logits(model, (20,))
    fuse(model, BACKEND)
    shape = model.model.layers[0].call
    pool = KVPool([(shape.kv_heads, shape.width, shape.width)] * 2, 64, torch.float32, torch.device("cpu"))
    table = np.random.default_rng(0).permutation(64).astype(np.int32)[None, :20]
    ids = (torch.arange(20) * 31 + 7) % model.config.vocab_size
    pieces = []
    for span in [(0, 9), (9, 16), *((i, i + 1) for i in range(16, 20))]:
        context = ForwardContext(paged_layout(table, [span]), pool, BACKEND)
        pieces.append(run(model, ids[slice(*span)], positions([span]), context))
        if name == "mixtral":  # other models' passes are replayed
            assert context.calls == 2
            assert context.kv_shapes[1] == (shape.kv_heads, shape.width, shape.width)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_is_proven_in_float32(name: str, build: Callable[..., Any]) -> None:
    model = build(name, torch.bfloat16)
    exact = logits(copy.deepcopy(model).float())
    before = logits(model)
    assert len(fuse(model, BACKEND).fused) == 2
    after = logits(model)
    assert (after - exact).norm() <= 1.5 * (before - exact).norm()  # no less exact than transformers' own


def test_own_forward_still_answers_what_the_walk_does_not(build: Callable[..., Any]) -> None:
    model = build("llama")
    assert fuse(model, BACKEND).fused_forward
    context = ForwardContext(packed_layout([6]), None, BACKEND)
    ids = torch.arange(6)[None]
    given: dict[str, Any] = {"position_ids": ids, "use_cache": False, "trunk": context}
    with torch.inference_mode():
        plain = model.model(input_ids=ids, **given)
        embeds = model.model(inputs_embeds=model.model.embed_tokens(ids), **given)
    torch.testing.assert_close(embeds.last_hidden_state, plain.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert type(embeds) is type(plain)


def test_originals_are_freed(build: Callable[..., Any]) -> None:
    model = build("llama")
    originals = [weakref.ref(layer) for layer in model.model.layers]
    matrices = [weakref.ref(layer.mlp.down_proj.weight) for layer in model.model.layers]
    fuse(model, BACKEND)
    assert all(original() is None for original in (*originals, *matrices))


def test_head_is_packed(build: Callable[..., Any]) -> None:
    for name in ("llama", "llama-tied"):
        model = build(name)
        assert fuse(model, BACKEND).head
        assert type(model.lm_head) is PackedLinear
        assert model.get_input_embeddings().weight.shape[0] == model.lm_head.out_features


DEFECTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "queries not turned": lambda patch: patch.setattr(fused, "rope", lambda *_: None),
    "wrong eps": lambda patch: patch.setattr(
        fused, "rms_norm", lambda x, weight, eps, *out, norm=fused.rms_norm: norm(x, weight, eps + 0.1, *out)
    ),
    "gate and up exchanged": lambda patch: patch.setattr(
        fused, "glu", lambda x, activation, glu=fused.glu: glu(x.roll(x.shape[1] // 2, 1).contiguous(), activation)
    ),
    "no residual": lambda patch: patch.setattr(
        PackedLinear, "forward", lambda self, x, residual=None, plain=PackedLinear.forward: plain(self, x)
    ),
    "biases forgotten": lambda patch: patch.setattr(PackedLinear, "set_bias", forget_bias),
}


def forget_bias(layer: PackedLinear, bias: torch.Tensor | None, real: Any = PackedLinear.set_bias) -> None:
    real(layer, None)


@pytest.mark.parametrize("defect", DEFECTS)
def test_proof_catches(defect: str, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2")
    before = logits(model)
    with monkeypatch.context() as patch:
        DEFECTS[defect](patch)
        report = fuse(model, BACKEND)
    assert not report.fused
    assert "does more than its modules show" in report.sentence
    if defect != "biases forgotten":  # the head, packed under the same defect, has none
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_a_head_that_packs_wrongly_stays(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = logits(model)

    def shifted(layer: PackedLinear, x: torch.Tensor, *rest: Any, real: Any = PackedLinear.forward) -> torch.Tensor:
        out: torch.Tensor = real(layer, x, *rest)
        return out.roll(1, -1) if layer.out_features == model.config.vocab_size else out

    monkeypatch.setattr(PackedLinear, "forward", shifted)
    report = fuse(model, BACKEND)
    assert not report.head
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_noise_shows_what_a_careless_checkpoint_hides(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases of zero make a layer that forgets them look right; the proof doesn't trust them."""
    model = build("qwen2")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    monkeypatch.setattr(PackedLinear, "set_bias", forget_bias)
    assert not fuse(model, BACKEND).fused


def test_a_failing_warm_up_changes_nothing(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    layers = list(model.model.layers)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel")

    model.model.rotary_emb.forward = fail
    assert fuse(model, BACKEND) == FuseReport()
    assert all(mine is theirs for mine, theirs in zip(layers, model.model.layers, strict=True))


def test_norms_are_known_by_what_they_compute() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    plain, shifted = LlamaRMSNorm(16), Gemma3RMSNorm(16)
    for module in (plain, shifted):
        torch.nn.init.normal_(module.weight)
        module.requires_grad_(False)
    one, other = norm_of(plain), norm_of(shifted)
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one.weight, plain.weight)
    torch.testing.assert_close(other.weight, 1 + shifted.weight)
    assert norm_of(torch.nn.LayerNorm(16).requires_grad_(False)) is None


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2"])
def test_decoding_is_played_back(name: str, build: Callable[..., Any]) -> None:
    model = build(name)
    fuse(model, BACKEND)
    assert model.model.forward.replay


def test_a_playback_that_differs_is_not_used(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    with monkeypatch.context() as patch:
        patch.setattr(
            fused,
            "glu",
            lambda x, activation, out=None, glu=fused.glu: glu(x if out is None else x * 2, activation, out),
        )
        fuse(model, BACKEND)
    assert not model.model.forward.replay
    model = build("llama", torch.bfloat16)
    fuse(model, BACKEND)
    assert model.model.forward.replay is has_bfloat16_pairs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "granite"])
def test_only_wanted_rows_come_out(build: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    """The last layer's MLP may leave out the others; what comes out is the same."""
    model = build(name, dtype)
    fuse(model, BACKEND)
    ids, spans = torch.arange(12), [(0, 5), (0, 7)]
    whole = ForwardContext(packed_layout([5, 7]), None, BACKEND)
    expected = model.model(ids[None], position_ids=positions(spans)[None], use_cache=False, trunk=whole)
    for wanted in ([11, 4], [], [0, 1, 2]):
        context = ForwardContext(packed_layout([5, 7]), None, BACKEND, torch.tensor(wanted, dtype=torch.int64))
        output = model.model(ids[None], position_ids=positions(spans)[None], use_cache=False, trunk=context)
        hidden = output.last_hidden_state[0]
        picked = getattr(output, "picked", False)
        assert picked == (len(hidden) == len(wanted) < 12)
        some = hidden if picked else hidden[context.wanted]
        torch.testing.assert_close(some, expected.last_hidden_state[0, wanted], rtol=2e-2, atol=1e-5)
