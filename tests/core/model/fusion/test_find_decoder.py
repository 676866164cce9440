"""Fused layers against transformers' own, on every architecture that might be taken for a Llama."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from trunkline.core.cache.pool import KVPool
from trunkline.core.engine.control.pages import tensors_of
from trunkline.core.model import attention, experts
from trunkline.core.model.attention import ForwardContext, packed_layout, paged_layout
from trunkline.core.model.fusion.decoder_layer import FusedLayer
from trunkline.core.model.fusion.decoder_modules import norm_of
from trunkline.core.model.fusion.find_decoder import FuseReport, fuse
from trunkline.core.model.fusion.origins import read
from trunkline.kernels.backend import Backend, choose
from trunkline.kernels.cpu.processor import has_bfloat16_pairs

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


@pytest.fixture(params=["cpu", "torch_native"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return choose(request.param, "cpu")


@pytest.fixture
def build(zoo: Callable[[str], Path], backend: Backend) -> Callable[..., Any]:
    """``build(name, dtype)``: a fresh model of the zoo with our attention, not yet fused."""
    attention.register()
    experts.register()

    def get(name: str, dtype: torch.dtype = torch.float32) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            zoo(name), dtype=dtype, attn_implementation=attention.NAME, experts_implementation=experts.NAME
        )
        experts.bind_backend(model, backend)
        return model.eval().requires_grad_(False)

    return get


def logits(model: Any, backend: Backend, lengths: tuple[int, ...] = (5, 11, 20)) -> torch.Tensor:
    """Of whole sequences packed in one row, without a pool."""
    ids = (torch.arange(sum(lengths)) * 31 + 7) % model.config.vocab_size
    spans = [(0, length) for length in lengths]
    context = ForwardContext(packed_layout(lengths), None, backend)
    return run(model, ids, positions(spans), context)


def run(model: Any, ids: torch.Tensor, places: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    with torch.inference_mode():
        output = model(input_ids=ids[None], position_ids=places[None], use_cache=False, trunk=context)
    result: torch.Tensor = output.logits[0].float()
    return result


@pytest.mark.parametrize("name", FUSED + ATTENTION_ONLY)
def test_fused_and_the_same(name: str, build: Callable[..., Any], backend: Backend) -> None:
    model = build(name)
    before = logits(model, backend)
    report = fuse(model, backend)
    assert report.fused == list(range(len(model.model.layers)))
    assert report.sentence == f"{len(report.fused)} of {len(report.fused)} layers fused"
    layers = list(model.model.layers)
    assert all(type(layer) is FusedLayer for layer in layers)
    assert all((layer.mlp is None) == (name in FUSED) for layer in layers)
    assert report.fused_forward == (name != "gemma3")  # two rotary embeddings: transformers hands out the right one
    torch.testing.assert_close(logits(model, backend), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KEPT)
def test_kept_and_untouched(name: str, build: Callable[..., Any], backend: Backend) -> None:
    model = build(name)
    before = logits(model, backend)
    report = fuse(model, backend)
    assert not report.fused
    assert not report.fused_forward
    assert KEPT[name] in report.sentence
    torch.testing.assert_close(logits(model, backend), before, rtol=1e-5, atol=1e-5)  # only the head is packed


def test_other_kinds_of_model_are_left_alone(build: Callable[..., Any], backend: Backend) -> None:
    assert fuse(build("gpt2"), backend).sentence == "no layers to fuse found"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral"])
def test_decodes_from_the_pool(name: str, build: Callable[..., Any], backend: Backend) -> None:
    """Chunked prefill, then one token at a time, equals the whole sequence at once."""
    model = build(name)
    whole = logits(model, backend, (20,))
    fuse(model, backend)
    shape = model.model.layers[0].call
    pool = KVPool([(shape.kv_heads, shape.width, shape.width)] * 2, 64, torch.float32, torch.device("cpu"))
    table = np.random.default_rng(0).permutation(64).astype(np.int32)[None, :20]
    ids = (torch.arange(20) * 31 + 7) % model.config.vocab_size
    pieces = []
    for span in [(0, 9), (9, 16), *((i, i + 1) for i in range(16, 20))]:
        context = ForwardContext(paged_layout(table, [span]), pool, backend)
        pieces.append(run(model, ids[slice(*span)], positions([span]), context))
        if backend.name != "cpu":  # other passes are replayed
            assert context.calls == 2
            assert context.kv_shapes[1] == (shape.kv_heads, shape.width, shape.width)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_is_proven_in_float32(name: str, build: Callable[..., Any], backend: Backend) -> None:
    model = build(name, torch.bfloat16)
    exact = logits(copy.deepcopy(model).float(), backend)
    before = logits(model, backend)
    assert len(fuse(model, backend).fused) == 2
    after = logits(model, backend)
    assert (after - exact).norm() <= 1.5 * (before - exact).norm()  # no less exact than transformers' own


def test_own_forward_still_answers_what_the_walk_does_not(build: Callable[..., Any], backend: Backend) -> None:
    model = build("llama")
    assert fuse(model, backend).fused_forward
    context = ForwardContext(packed_layout([6]), None, backend)
    ids = torch.arange(6)[None]
    given: dict[str, Any] = {"position_ids": ids, "use_cache": False, "trunk": context}
    with torch.inference_mode():
        plain = model.model(input_ids=ids, **given)
        embeds = model.model(inputs_embeds=model.model.embed_tokens(ids), **given)
    torch.testing.assert_close(embeds.last_hidden_state, plain.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert type(embeds) is type(plain)


def test_originals_are_freed(build: Callable[..., Any], backend: Backend) -> None:
    model = build("llama")
    originals = [weakref.ref(layer) for layer in model.model.layers]
    matrices = [weakref.ref(layer.mlp.down_proj.weight) for layer in model.model.layers]
    fuse(model, backend)
    assert all(original() is None for original in (*originals, *matrices))


def stored_bytes(model: Any) -> int:
    """Of all tensors that are reachable from a model; those that share memory count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(model)}
    return sum(storages.values())


@pytest.mark.parametrize("backend", ["torch_native"], indirect=True)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi3", "qwen2", "mixtral"])
def test_no_weight_is_stored_twice(name: str, build: Callable[..., Any], backend: Backend) -> None:
    model = build(name)
    before = stored_bytes(model)
    assert before >= sum(parameter.nbytes for parameter in model.parameters())
    assert fuse(model, backend).head
    assert stored_bytes(model) < 1.02 * before  # norms and biases are stored twice, see Origins


def test_tensors_are_read_by_their_names(build: Callable[..., Any], backend: Backend) -> None:
    for name in ("llama", "qwen2", "phi3", "gemma2", "mixtral"):
        model = build(name)
        expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        assert fuse(model, backend).fused == [0, 1]
        for key, tensor in expected.items():
            found = read(model, key, 10)
            assert found is not None, key
            assert torch.equal(found, tensor[:10]), key


def test_head_is_replaced(build: Callable[..., Any], backend: Backend) -> None:
    for name in ("llama", "llama-tied"):
        model = build(name)
        assert fuse(model, backend).head
        assert type(model.lm_head) is backend.linear
        assert model.get_input_embeddings().weight.shape[0] == model.lm_head.out_features


def with_methods(backend: Any, **methods: Callable[..., Any]) -> Backend:
    """The backend, with other methods of its linear layers."""
    return replace(backend, linear=type("Defective", (backend.linear,), methods))


def forget_biases(backend: Any) -> Backend:
    return with_methods(backend, set_bias=lambda self, _: backend.linear.set_bias(self, None))


DEFECTS: dict[str, Callable[[Any], Backend]] = {
    "queries not turned": lambda one: replace(one, rope=lambda *_: None),
    "wrong eps": lambda one: replace(one, rms_norm=lambda x, w, eps, *rest: one.rms_norm(x, w, eps + 0.1, *rest)),
    "gate and up exchanged": lambda one: replace(
        one, glu=lambda x, activation: one.glu(x.roll(x.shape[1] // 2, 1).contiguous(), activation)
    ),
    "another activation": lambda one: replace(one, glu=lambda x, _: one.glu(x, "gelu")),
    "no residual": lambda one: with_methods(one, forward=lambda self, x, residual=None: one.linear.forward(self, x)),
    "biases forgotten": forget_biases,
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_proof_catches(defect: str, build: Callable[..., Any], backend: Backend) -> None:
    model = build("qwen2")
    before = logits(model, backend)
    report = fuse(model, DEFECTS[defect](backend))
    assert not report.fused
    reason = "aren't RMS norms" if defect == "wrong eps" else "does more than its modules show"
    assert reason in report.sentence
    if defect != "biases forgotten":  # the head, packed under the same defect, has none
        torch.testing.assert_close(logits(model, backend), before, rtol=1e-4, atol=1e-4)


def test_a_head_that_differs_stays(build: Callable[..., Any], backend: Any) -> None:
    model = build("llama")
    before = logits(model, backend)

    def shifted(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = backend.linear.forward(layer, x, residual)
        return out.roll(1, -1) if layer.out_features == model.config.vocab_size else out

    report = fuse(model, with_methods(backend, forward=shifted))
    assert not report.head
    torch.testing.assert_close(logits(model, backend), before, rtol=1e-4, atol=1e-4)


def test_noise_shows_what_a_careless_checkpoint_hides(build: Callable[..., Any], backend: Backend) -> None:
    """Biases of zero make a layer that forgets them look right; the proof doesn't trust them."""
    model = build("qwen2")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    assert not fuse(model, forget_biases(backend)).fused


def test_a_failing_warm_up_changes_nothing(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    model = build("llama")
    layers = list(model.model.layers)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel")

    model.model.rotary_emb.forward = fail
    assert fuse(model, backend) == FuseReport()
    assert all(mine is theirs for mine, theirs in zip(layers, model.model.layers, strict=True))


def test_norms_are_known_by_what_they_compute(backend: Backend) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    plain, shifted = LlamaRMSNorm(16), Gemma3RMSNorm(16)
    for module in (plain, shifted):
        torch.nn.init.normal_(module.weight)
        module.requires_grad_(False)
    one, other = norm_of(plain, backend), norm_of(shifted, backend)
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one.weight, plain.weight)
    torch.testing.assert_close(other.weight, 1 + shifted.weight)
    assert norm_of(torch.nn.LayerNorm(16).requires_grad_(False), backend) is None


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2"])
def test_decoding_is_played_back(name: str, build: Callable[..., Any], backend: Backend) -> None:
    model = build(name)
    fuse(model, backend)
    assert model.model.forward.replay is (backend.name == "cpu")


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_playback_that_differs_is_not_used(build: Callable[..., Any], backend: Backend) -> None:
    model = build("llama")

    def doubled_when_recorded(x: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
        return backend.glu(x if out is None else x * 2, activation, out)

    fuse(model, replace(backend, glu=doubled_when_recorded))
    assert not model.model.forward.replay
    model = build("llama", torch.bfloat16)
    fuse(model, backend)
    assert model.model.forward.replay is has_bfloat16_pairs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "granite"])
def test_only_wanted_rows_come_out(build: Callable[..., Any], name: str, dtype: torch.dtype, backend: Backend) -> None:
    """The last layer's MLP may leave out the others; what comes out is the same."""
    model = build(name, dtype)
    fuse(model, backend)
    ids, spans = torch.arange(12), [(0, 5), (0, 7)]
    whole = ForwardContext(packed_layout([5, 7]), None, backend)
    expected = model.model(ids[None], position_ids=positions(spans)[None], use_cache=False, trunk=whole)
    for wanted in ([11, 4], [], [0, 1, 2]):
        context = ForwardContext(packed_layout([5, 7]), None, backend, torch.tensor(wanted, dtype=torch.int64))
        output = model.model(ids[None], position_ids=positions(spans)[None], use_cache=False, trunk=context)
        hidden = output.last_hidden_state[0]
        picked = getattr(output, "picked", False)
        assert picked == (len(hidden) == len(wanted) < 12)
        some = hidden if picked else hidden[context.wanted]
        torch.testing.assert_close(some, expected.last_hidden_state[0, wanted], rtol=2e-2, atol=1e-5)
