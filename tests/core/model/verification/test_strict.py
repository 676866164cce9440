"""What the proof at load finds although the warm-up sequences are short and the dtype is narrow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trunkline.core import Engine
from trunkline.core.errors import ModelError
from trunkline.core.model import architecture, loader, refusal
from trunkline.core.model.attention import ForwardContext, attend, packed_layout
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.sizes.plan import plan_model
from trunkline.core.model.sources.info import read_info
from trunkline.core.model.verification import strict
from trunkline.core.model.verification.attention import verify_attention
from trunkline.core.settings import ModelSettings
from trunkline.core.testing import build_checkpoint, randomize
from trunkline.core.testing.tiny import CONTEXT, LIMIT, tiny_config
from trunkline.core.types import Head, ModelSource
from trunkline.kernels.backend import choose

pytestmark = pytest.mark.field


def write(folder: Path, name: str, **config: Any) -> Path:
    """A tiny checkpoint of any class, with random weights."""
    cls: Any = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        model = cls(tiny_config(cls.config_class, **config)).float()
        randomize(model)
    model.config.architectures = [name]
    model.save_pretrained(folder)
    return folder


def start(folder: Path, *heads: Head, **settings: Any) -> LoadedModel:
    """Plan and load a folder as the engine does."""
    source = ModelSource(folder.name, str(folder))
    own = ModelSettings(model_path=str(folder), **{"dtype": "float32", **settings})
    info = read_info(source, own)
    plan_model(source, info, own, torch.device("cpu"))
    return loader.load(source, info, own, heads, choose("torch_native", "cpu"))


# -- longer than the warm-up -------------------------------------------------------------------


def test_a_window_that_only_the_mask_has_is_found_before_a_text_exceeds_it(tmp_path: Path) -> None:
    """PhiMoE passes no window to attention. A text of more than LIMIT tokens would get other logits."""
    folder = write(tmp_path / "phimoe", "PhimoeForCausalLM", sliding_window=LIMIT)
    with pytest.raises(ModelError, match="differs from transformers' own forward"):
        start(folder)
    assert start(folder, context_length=LIMIT).kv_shapes  # no text is longer than the window


@pytest.mark.parametrize("name", ["gemma2", "mistral-sliding", "gpt-oss", "llama4"])
def test_windows_that_reach_attention_are_served(name: str, tmp_path: Path) -> None:
    sizes = {"attention_chunk_size": LIMIT} if name == "llama4" else {"sliding_window": LIMIT}
    assert start(build_checkpoint(name, tmp_path / name, **sizes)).kv_shapes


def test_sparse_attention_that_is_dense_for_short_texts(tmp_path: Path) -> None:
    """MiniMax M3 looks at 16 blocks of 128 tokens, which is everything at first."""
    sizes = {"index_block_size": 16, "index_topk_blocks": 16}
    with pytest.raises(ModelError, match="its forward doesn't run on token ids and positions alone"):
        start(write(tmp_path / "minimax", "MiniMaxM3VLForCausalLM", **sizes))


def test_windows_are_only_narrow_while_the_proof_runs(tmp_path: Path) -> None:
    """What modules derive from the setting changes with it."""
    model = start(write(tmp_path / "modernbert", "ModernBertModel"))
    layers = [layer.attn for layer in model.whole.layers]
    widths = [layer.sliding_window for layer in layers]
    assert LIMIT // 2 + 1 in widths
    assert model.whole.config.local_attention == LIMIT
    with strict.short_windows(model):
        assert strict.SHORT_WINDOW // 2 + 1 in [layer.sliding_window for layer in layers]
        assert model.whole.config.sliding_window == strict.SHORT_WINDOW // 2
    assert [layer.sliding_window for layer in layers] == widths
    assert model.whole.config.local_attention == LIMIT


@pytest.mark.usefixtures("unfused")
def test_a_class_that_refuses_narrow_windows_is_compared_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = start(write(tmp_path / "mistral", "MistralForCausalLM"))
    monkeypatch.setattr(transformers.MistralForCausalLM, "_from_config", lambda *_, **__: 1 / 0)
    with strict.short_windows(model):
        assert model.whole.config.sliding_window == LIMIT
    assert verify_attention(model)[1] == model.kv_shapes


# -- state ------------------------------------------------------------------------------------


def test_a_model_that_a_pass_changes_is_refused(tmp_path: Path) -> None:
    """BigBird gives up sparse attention for good when it sees a short text: long ones would depend on it."""
    sparse = write(tmp_path / "sparse", "BigBirdModel")
    with pytest.raises(ModelError, match=r"a pass changes the model itself \(\.attention_type from block_sparse"):
        start(sparse)
    assert start(write(tmp_path / "full", "BigBirdModel", attention_type="original_full")).padded


# -- narrow dtypes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MobileBertModel", "ConvBertModel"])
def test_rounding_hides_no_difference(name: str, tmp_path: Path) -> None:
    """Both mix in the tokens beside a token, padding included; in bfloat16 few tokens are off by more than rounding."""
    folder = write(tmp_path / name, name)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ModelError, match="padded, its warm-up differs from transformers' own forward"):
            start(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_hides_no_soft_cap(dtype: str, tmp_path: Path) -> None:
    """A cap of 50 changes logits of about 3 by a thousandth."""
    bare = Head("bare", lambda whole: whole.lm_head, lambda whole, ids: whole(ids).logits[:, -1])
    model = start(build_checkpoint("gemma2", tmp_path / "gemma2", final_logit_softcapping=50.0), bare, dtype=dtype)
    assert "differs from Gemma2ForCausalLM's own forward" in model.refused["bare"]


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt-oss", "deepseek-v3", "gpt2"])
def test_the_proof_in_float32_leaves_every_bit_as_it_was(name: str, tmp_path: Path) -> None:
    model = start(build_checkpoint(name, tmp_path / name), dtype="bfloat16")
    before = {key: tensor.clone() for key, tensor in model.whole.state_dict().items()}
    verify_attention(model)
    after = model.whole.state_dict()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    assert model.dtype == torch.bfloat16


def test_a_class_that_needs_another_dtype_is_told_which(tmp_path: Path) -> None:
    folder = write(tmp_path / "deberta", "DebertaModel", relative_attention=True, pos_att_type=["c2p", "p2c"])
    with pytest.raises(ModelError, match="--dtype float32 may work"):
        start(folder, dtype="bfloat16")
    assert start(folder).padded


# -- messages instead of tracebacks ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BertLMHeadModel", "The head 'lm' differs from BertLMHeadModel's own forward"),
        ("GPTJForCausalLM", "doesn't route its attention through a registered function"),
        ("MptForCausalLM", "doesn't route its attention through a registered function"),
        (
            "DeepseekV32ForCausalLM",
            r"can't be served: its forward doesn't run on token ids and positions alone, without a mask or a cache "
            r"\(it raised TypeError: .*\)\.$",
        ),
        ("DogeForCausalLM", r"can't be served: the model hands a mask of its own to attention\.$"),
        ("NemotronForCausalLM", "can't be served: the model's layers don't pass keyword arguments on to attention"),
        (
            "LayoutLMv3ForSequenceClassification",
            r"can't be served: its forward doesn't run on padded batches of token ids \(it raised \w+: .*\)\.$",
        ),
        (
            "BltForCausalLM",
            "BltForCausalLM can't be served: neither its config.json nor transformers' BltConfig has hidden_size",
        ),
        (
            "CanineModel",
            "CanineModel can't be served: neither its config.json nor transformers' CanineConfig has vocab_size",
        ),
        ("PerceiverForSequenceClassification", "PerceiverConfig has no num_hidden_layers; models without it aren't"),
    ],
)
def test_start_up_says_what_cannot_be_served(name: str, reason: str, tmp_path: Path) -> None:
    folder = write(tmp_path / name, name, **({"is_decoder": True} if name.startswith("Bert") else {}))
    with pytest.raises(ModelError, match=reason) as caught:
        Engine(str(folder), dtype="float32", threads=1)
    assert "\n" not in str(caught.value)


def test_the_head_of_a_bert_decoder_is_packed_in_its_place(tmp_path: Path) -> None:
    """Its class can't be told to take another output layer."""
    from trunkline.kernels.linear import PackedLinear

    folder = write(tmp_path / "bert", "BertLMHeadModel", is_decoder=True)
    source, own = ModelSource("bert", str(folder)), ModelSettings(model_path=str(folder), dtype="float32")
    model = loader.load(source, read_info(source, own), own, (), choose("cpu", "cpu"))
    assert isinstance(model.whole.cls.predictions.decoder, PackedLinear)


@pytest.mark.parametrize("step", ["read_info", "plan", "load"])
def test_whatever_a_class_raises_names_the_model(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_checkpoint("llama", tmp_path / "llama")

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("what\nis this" + "?" * 1000)

    if step == "read_info":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide", "vocab_size": "large"}))
    else:
        target = (architecture, "experts") if step == "plan" else (loader, "_check_positions")
        monkeypatch.setattr(target[0], target[1], fail if step == "load" else type("broken", (), {"register": fail}))
    with pytest.raises(ModelError, match=r"llama can't be served: its files or its class aren't") as caught:
        start(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < refusal.MAX_MESSAGE + 200


def test_the_context_of_a_model_without_a_limit_is_the_users(tmp_path: Path) -> None:
    folder = write(tmp_path / "xlnet", "XLNetModel")
    with pytest.raises(ModelError, match="XLNetModel has no greatest number of positions; give --context-length"):
        start(folder)
    assert start(folder, context_length=CONTEXT).info.context_length == CONTEXT


# -- memory -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unfused")
def test_keys_of_other_tokens_never_reach_a_kernel(zoo: Callable[[str], Path]) -> None:
    """Kernels read as many keys as the layout says: fewer would be read from whatever lies behind them."""
    model = start(zoo("llama"))
    layer = model.whole.model.layers[0].self_attn
    context = ForwardContext(packed_layout([8]), None, model.backend)
    q, kv = torch.zeros(1, 4, 8, 32), torch.zeros(1, 2, 8, 32)
    assert attend(layer, q, kv, kv, trunk=context)[0].shape == (1, 8, 4, 32)
    for query, keys in ((q[:, :, :1], kv), (q, kv[:, :, :7]), (q.expand(2, -1, -1, -1), kv)):
        with pytest.raises(ValueError, match=r"queries and \d keys of 8 tokens"):
            attend(layer, query, keys, keys, trunk=context)


@pytest.mark.parametrize("name", ["Gemma3nForCausalLM", "Gemma4ForCausalLM"])
def test_layers_that_share_keys(name: str, tmp_path: Path) -> None:
    """Their class computes the last layers of one token only when it is asked for the last logits only."""
    config = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    config |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    if name.startswith("Gemma3n"):
        config["activation_sparsity_pattern"] = [0.0] * 4
    with Engine(str(write(tmp_path / name, name, **config)), dtype="float32", threads=1) as engine:
        assert list(engine.models[0].tasks) == ["generation"]


@pytest.mark.parametrize("name", ["JetMoeForCausalLM", "LongcatFlashForCausalLM", "LlamaForCausalLM"])
def test_no_layer_keeps_more_than_was_planned(name: str, tmp_path: Path) -> None:
    """The first two can't run without values, so that their sizes are guessed."""
    folder = write(tmp_path / name, name)
    source, own = ModelSource(name, str(folder)), ModelSettings(model_path=str(folder), dtype="float32")
    planned = plan_model(source, read_info(source, own), own, torch.device("cpu")).kv_shapes
    kept = start(folder).kv_shapes
    assert len(planned) == len(kept)
    assert all(
        heads * (key + value) >= own_heads * (own_key + own_value)
        for (heads, key, value), (own_heads, own_key, own_value) in zip(planned, kept, strict=True)
    )
