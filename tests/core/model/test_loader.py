"""Loading: sizes planned before, shortcuts proven, and a sentence for whatever can't be served."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from trunkline.core.errors import ModelError
from trunkline.core.model import loader, scores
from trunkline.core.model.architecture import choose_dtype
from trunkline.core.model.attention import packed_layout
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.sizes.plan import plan_model
from trunkline.core.model.sources.info import read_info
from trunkline.core.model.verification.attention import verify_attention
from trunkline.core.settings import ModelSettings
from trunkline.core.testing import ZOO, build_checkpoint
from trunkline.core.types import Head, ModelInfo, ModelSource
from trunkline.kernels.backend import Backend, choose

CPU = torch.device("cpu")


def start(
    folder: Path, *, heads: tuple[Head, ...] = (), backend: Backend | None = None, **settings: Any
) -> LoadedModel:
    """Plan and load a folder as the engine does."""
    source = ModelSource(folder.name, str(folder))
    own = ModelSettings(model_path=str(folder), **{"dtype": "float32", **settings})
    info = read_info(source, own)
    plan_model(source, info, own, CPU)
    return loader.load(source, info, own, heads, backend or choose("torch_native", "cpu"))


def write_config(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return build_checkpoint("llama", tmp_path / "llama")


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_plan_is_what_loading_takes(name: str, zoo: Callable[[str], Path]) -> None:
    model = start(zoo(name))
    source = ModelSource(name, str(zoo(name)))
    settings = ModelSettings(model_path=source.path, dtype="float32")
    plan = plan_model(source, read_info(source, settings), settings, CPU)
    assert plan.kv_shapes == model.kv_shapes
    assert plan.kv_bytes_per_token == sum(4 * heads * (key + value) for heads, key, value in model.kv_shapes)
    loaded = sum(tensor.nbytes for tensor in (*model.whole.parameters(), *model.whole.buffers()))
    assert plan.weight_bytes == loaded
    assert 0 < plan.active_parameters * 4 <= loaded


def test_key_and_value_widths_may_differ(load: Callable[..., LoadedModel]) -> None:
    assert load("deepseek-v3").kv_shapes == [(4, 48, 32)] * 2


def test_experts_count_for_the_share_that_a_token_visits(zoo: Callable[[str], Path]) -> None:
    source = ModelSource("mixtral", str(zoo("mixtral")))
    settings = ModelSettings(model_path=source.path, dtype="float32")
    plan = plan_model(source, read_info(source, settings), settings, CPU)
    experts = 2 * 8 * 3 * 128 * 16  # layers, experts, matrices, sizes
    embeddings = 512 * 128
    assert plan.active_parameters == plan.weight_bytes // 4 - embeddings - experts * 6 // 8 - _buffers(zoo("mixtral"))


def _buffers(folder: Path) -> int:
    import transformers

    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return sum(buffer.numel() for buffer in whole.buffers())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_head_must_be_what_the_class_computes(name: str, load: Callable[..., LoadedModel]) -> None:
    model = load(name)
    assert "scores" in model.heads
    multiplied = name in {"gemma2", "granite", "cohere"}  # soft cap, divisor, factor: all outside the matrix
    assert ("bare" in model.refused) is multiplied
    assert ("bare" in model.heads) is not multiplied


def test_a_head_of_another_architecture_is_refused_not_fatal(llama: Path) -> None:
    model = start(llama, heads=(Head("score", lambda whole: whole.score),))
    assert "score" not in model.heads
    assert model.refused["score"].startswith("The head 'score' doesn't fit LlamaForCausalLM")


def test_weights_do_not_lie_in_the_file(llama: Path) -> None:
    model = start(llama)
    ids = torch.arange(9)
    before = model.forward(ids, ids, packed_layout([9]), None).clone()
    with (llama / "model.safetensors").open("r+b") as file:
        file.seek(-200_000, 2)
        file.write(bytes(200_000))
    assert torch.equal(model.forward(ids, ids, packed_layout([9]), None), before)


def test_tensors_may_come_from_elsewhere(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    source, settings = ModelSource("x", str(llama)), ModelSettings(model_path=str(llama), dtype="float32")
    info = read_info(source, settings)
    model = loader.load(source, info, settings, (), choose("torch_native", "cpu"), weights=iter(tensors.items()))
    found = model.tensor("lm_head.weight", len(tensors["lm_head.weight"]))
    assert found is not None
    assert torch.equal(found, tensors["lm_head.weight"])


def test_bfloat16(llama: Path) -> None:
    model = start(llama, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.whole.parameters()} == {torch.bfloat16}
    assert model.kv_shapes == [(2, 32, 32)] * 2


def test_the_smallest_context(llama: Path) -> None:
    assert start(llama, context_length=1).kv_shapes == [(2, 32, 32)] * 2


def test_dtype_names() -> None:
    assert choose_dtype("float", CPU) == choose_dtype("float32", CPU) == torch.float32
    assert choose_dtype("half", torch.device("cuda")) == torch.float16
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(ModelError, match=r"float16.*use bfloat16 or float32"):
        choose_dtype("half", CPU)


def test_a_missing_tensor(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        start(llama)


def without(folder: Path, *words: str) -> Path:
    """Take the tensors away whose names hold one of the words."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not any(word in name for word in words)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_without_its_head_a_model_serves_what_needs_none(llama: Path, zoo: Callable[[str], Path]) -> None:
    head = Head("lm", lambda whole: whole.lm_head)
    model = start(without(llama, "lm_head"), heads=(head,))
    assert type(model.whole).__name__ == "LlamaModel"
    assert (
        "llama lacks 1 of the tensors that LlamaForCausalLM needs, the first is lm_head.weight" in model.refused["lm"]
    )
    ids = torch.arange(3, 12)
    complete = start(zoo("llama"))
    rows = [each.forward(ids, torch.arange(9), packed_layout([9]), None) for each in (model, complete)]
    assert torch.equal(*rows)


def test_a_base_models_tensors_need_no_prefix(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(bare, llama / "model.safetensors", {"format": "pt"})
    assert type(start(llama).whole).__name__ == "LlamaModel"


def test_a_scorer_without_its_head(tmp_path: Path) -> None:
    folder = without(build_checkpoint("bert-labels", tmp_path / "bert"), "classifier")
    model = start(folder, heads=(scores.head(start_info(folder)),))
    assert type(model.whole).__name__ == "BertModel"
    assert "the first is classifier.bias" in model.refused["score"]


def start_info(folder: Path) -> ModelInfo:
    return read_info(ModelSource("x", str(folder)), ModelSettings(model_path=str(folder)))


@pytest.mark.parametrize("name", ["bert", "bert-masked", "mpnet"])
def test_a_pooler_that_nobody_calls_is_neither_needed_nor_loaded(name: str, tmp_path: Path) -> None:
    folder = build_checkpoint(name, tmp_path / name)
    if name != "bert-masked":  # that class is saved without
        without(folder, "pooler")
    model = start(folder)
    assert model.backbone is model.whole
    assert model.whole.pooler is None
    assert not [parameter for parameter, _ in model.whole.named_parameters() if "cls" in parameter]


def test_a_pooler_below_a_head_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks 2 of the tensors.*bert\.pooler\.dense\.bias"):
        start(without(build_checkpoint("bert-score", tmp_path / "bert"), "pooler"))


def test_a_context_beyond_the_table_of_positions(tmp_path: Path) -> None:
    folder = build_checkpoint("bert", tmp_path / "bert", max_position_embeddings=64)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    source, settings = ModelSource("x", str(folder)), ModelSettings(model_path=str(folder), dtype="float32")
    info = msgspec.structs.replace(start_info(folder), context_length=65)
    assert config["max_position_embeddings"] == 64
    with pytest.raises(ModelError, match="embeddings of 64 positions only; give --context-length 64"):
        loader.load(source, info, settings, (), choose("torch_native", "cpu"), weights=iter(tensors.items()))


def test_a_tensor_of_another_shape(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(64)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="llama can't be loaded"):
        start(llama)


REFUSED = {
    "not in transformers": ({"architectures": ["NoSuchForCausalLM"], "model_type": "llama"}, "has no class"),
    "not a model class": ({"architectures": ["AutoTokenizer"], "model_type": "llama"}, "has no class"),
    "recurrent": ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "recurrent state"),
    "convolutions between attention": (
        {
            "architectures": ["Lfm2ForCausalLM"],
            "model_type": "lfm2",
            "layer_types": ["conv", "full_attention"],
            "num_hidden_layers": 2,
        },
        "recurrent state",
    ),
    "encoder-decoder": ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "encoder-decoder"),
    "positions by batch": (
        {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "num_hidden_layers": 2},
        "attention temperature",
    ),
    "quantised": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": {"quant_method": "x"}},
        "quantised",
    ),
    "no attention backend": (
        {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_layer": 2, "hidden_size": 64, "n_head": 4},
        "registered function",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refused_before_weights_are_read(case: str, tmp_path: Path) -> None:
    config, reason = REFUSED[case]
    sizes = {"vocab_size": 512, "max_position_embeddings": 64, "hidden_size": 64}
    folder = write_config(tmp_path / "model", **{**sizes, **config})
    source, settings = ModelSource("x", str(folder)), ModelSettings(model_path="x")
    with pytest.raises(ModelError, match=reason) as caught:
        plan_model(source, read_info(source, settings), settings, CPU)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def damaged(**defect: Callable[..., Any]) -> Backend:
    return dataclasses.replace(choose("torch_native", "cpu"), **defect)


def test_the_proof_catches_a_lost_argument(zoo: Callable[[str], Path]) -> None:
    """Seeded bugs: a window, a soft cap or sinks that never reach the kernel; a slot that is wrong."""
    good = choose("torch_native", "cpu")
    for name, lost in (
        ("mistral-sliding", {"window": 0}),
        ("gemma2", {"softcap": 0.0}),
        ("gpt-oss", {"sinks": None}),
        ("qwen2", {"causal": False}),
        ("llama", {"scale": 1.0}),
    ):
        bad = damaged(
            extend=lambda *args, lost=lost, **given: good.extend(*args, **{**given, **lost}),
        )
        with pytest.raises(ModelError, match="differs from transformers' own forward"):
            start(zoo(name), backend=bad)


def test_the_proof_catches_wrong_slots(zoo: Callable[[str], Path]) -> None:
    good = choose("torch_native", "cpu")
    bad = damaged(write=lambda k, v, keys, values, slots: good.write(k, v, keys, values, slots.flip(0)))
    with pytest.raises(ModelError, match="differs from transformers' own forward"):
        start(zoo("llama"), backend=bad)


@pytest.mark.usefixtures("unfused")
def test_the_proof_catches_layers_that_skip_attention(zoo: Callable[[str], Path]) -> None:
    model = start(zoo("llama"))
    layer = model.whole.model.layers[1]
    layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ModelError, match="calls attention 1 times in a pass through 2 layers"):
        verify_attention(model)
