"""What is read from folders: old and new files, defaults, and refusals that say why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from trunkline.core.errors import ModelError
from trunkline.core.model.sources.info import read_info
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelInfo, ModelSource
from trunkline.plugins.embedding import heads
from trunkline.plugins.embedding.length_limits import check_dimensions
from trunkline.plugins.embedding.recipe import LEGACY_MODES, Module, read_recipe, serves
from trunkline.plugins.embedding.settings import EmbeddingSettings

DEFAULTS = EmbeddingSettings()
CHAIN = ("Transformer", "Pooling", "Dense", "Normalize")


def info_of(folder: Path, **settings: Any) -> ModelInfo:
    return read_info(ModelSource(str(folder), str(folder)), ModelSettings(model_path=str(folder), **settings))


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def folder(zoo: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a folder with Transformer, Pooling (mean), Dense (64, Tanh)."""
    shutil.copytree(zoo("distilbert"), tmp_path / "model")
    return tmp_path / "model"


def test_every_old_key_of_pooling_is_its_mode(folder: Path) -> None:
    for key, mode in LEGACY_MODES.items():
        write(folder / "1_Pooling/config.json", {"word_embedding_dimension": 128, key: True})
        assert read_recipe(info_of(folder), DEFAULTS).modes == (mode,)
    write(folder / "1_Pooling/config.json", {"word_embedding_dimension": 128})
    assert read_recipe(info_of(folder), DEFAULTS).modes == ("mean",)


def test_limits_come_from_the_module_then_from_the_tokenizer(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"model_max_length": 100})
    assert read_recipe(info_of(folder), DEFAULTS).max_length == 100
    write(folder / "sentence_roberta_config.json", {"max_seq_length": 75})
    assert read_recipe(info_of(folder), DEFAULTS).max_length == 75
    write(folder / "sentence_bert_config.json", {"max_seq_length": 50})
    assert read_recipe(info_of(folder), DEFAULTS).max_length == 50
    write(folder / "tokenizer_config.json", {"model_max_length": int(1e30)})
    write(folder / "sentence_bert_config.json", {"max_seq_length": None, "do_lower_case": True})
    recipe = read_recipe(info_of(folder), DEFAULTS)
    assert recipe.max_length is None
    assert recipe.lower_case


def test_facts_for_model_info(folder: Path) -> None:
    about = {"prompts": {"q": "find: "}, "default_prompt_name": "q", "similarity_fn_name": "dot"}
    write(folder / "config_sentence_transformers.json", about)
    assert read_recipe(info_of(folder), DEFAULTS).facts() == {
        "embedding_dimension": 64,
        "pooling": ["mean"],
        "normalized": False,
        "max_seq_length": 512,
        "prompts": {"q": "find: "},
        "default_prompt_name": "q",
        "similarity_fn_name": "dot",
        "is_matryoshka": False,
        "matryoshka_dimensions": [],
    }


@pytest.mark.parametrize(
    ("where", "given", "allowed", "refused"),
    [
        ("config_sentence_transformers.json", {"matryoshka_dimensions": [32, 16]}, [16, 32, 64], [8, 65]),
        ("config_sentence_transformers.json", {"truncate_dim": 16}, [1, 63], [65]),
        ("config.json", {"is_matryoshka": True}, [1, 64], [65]),
        ("config.json", {"matryoshka_dimensions": [8]}, [8, 64], [9]),
        ("config.json", {"is_matryoshka": False}, [], [8]),
    ],
)
def test_matryoshka(folder: Path, where: str, given: dict[str, Any], allowed: list[int], refused: list[int]) -> None:
    path = folder / where
    write(path, json.loads(path.read_text()) | given)
    recipe = read_recipe(info_of(folder), DEFAULTS)
    for length in allowed:
        check_dimensions(length, recipe)
    for length in refused:
        with pytest.raises(Exception, match="dimensions must"):
            check_dimensions(length, recipe)


def broken(folder: Path, path: str, value: Any) -> str:
    write(folder / path, value)
    with pytest.raises(ModelError) as caught:
        read_recipe(info_of(folder), DEFAULTS)
    answer = serves(info_of(folder), EmbeddingSettings())
    assert (answer.when, answer.reason) == ("no", str(caught.value))
    return str(caught.value)


def chain(*kinds: str, prefix: str = "sentence_transformers.models.", **paths: str) -> list[dict[str, Any]]:
    return [
        {"idx": index, "path": paths.get(kind, "" if index == 0 else f"{index}_{kind}"), "type": prefix + kind}
        for index, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("modules.json", chain(*CHAIN, prefix="custom_st."), "code of its own, which is never run"),
        ("modules.json", chain("Transformer", "SpladePooling"), "a chain of Transformer, SpladePooling"),
        ("modules.json", chain(), "a chain of nothing"),
        ("modules.json", chain(*CHAIN, Transformer="0_Transformer"), "in the folder itself"),
        ("modules.json", chain(*CHAIN, Dense="../../2_Dense"), "leads out of the folder"),
        ("modules.json", chain("Transformer", "Pooling", "LSTM"), "is a LSTM module"),
        ("modules.json", [5], "must list objects"),
        ("modules.json", {}, "must hold a JSON array"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "attention"]}, "asks for pooling 'attention'"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 64}, "pools rows of 64 numbers, the model gives 128"),
        ("2_Dense/config.json", {"in_features": 64, "out_features": 8}, "in_features must be 128"),
        ("2_Dense/config.json", {"in_features": 128}, "out_features a number above 0"),
        (
            "2_Dense/config.json",
            {"in_features": 128, "out_features": 64, "activation_function": "os.system"},
            "activation 'os.system' isn't one of",
        ),
        (
            "2_Dense/config.json",
            {"in_features": 128, "out_features": 64, "module_input_name": "token_embeddings"},
            "only the embedding is",
        ),
        ("sentence_bert_config.json", {"transformer_task": "text-generation"}, "something else than texts' last"),
        ("sentence_bert_config.json", {"modality_config": {"image": {}}}, "something else than texts' last"),
        ("sentence_bert_config.json", {"modality_config": {"text": {}, "message": {}}}, "through the chat template"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "'q' is none of its prompts (none)"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(folder: Path, path: str, value: Any, words: str) -> None:
    assert words in broken(folder, path, value)


def test_damaged_json_and_pickled_or_missing_weights(folder: Path) -> None:
    (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle, which is never opened\. .* save it again"):
        read_recipe(info_of(folder), DEFAULTS)
    (folder / "2_Dense/pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        read_recipe(info_of(folder), DEFAULTS)
    (folder / "modules.json").write_text("[")
    with pytest.raises(ModelError, match="can't be read"):
        read_recipe(info_of(folder), DEFAULTS)


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    fits = read_recipe(info_of(folder), DEFAULTS).modules[0]
    assert heads.build([fits], 128, torch.device("cpu"))(torch.zeros(2, 128)).shape == (2, 64)
    for module, width in ((replace(fits, width=32), 128), (Module("LayerNorm", fits.folder, 64), 64)):
        with pytest.raises(ModelError, match=r"(linear\.weight must be \[32, 128\]|norm\.weight .* it is missing)"):
            heads.build([module], width, torch.device("cpu"))
    (folder / "2_Dense/model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="can't be read"):
        heads.build([fits], 128, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "flags", "when"),
    [
        ("bert", {}, "default"),
        ("bert-masked", {}, "default"),
        ("qwen3-base", {}, "default"),
        ("llama", {}, "on_request"),
        ("gpt2", {}, "on_request"),
        ("llama", {"is_embedding": True}, "alone"),
        ("bert-score", {}, "no"),
        ("bert-score", {"is_embedding": True}, "no"),
        ("llama-score", {}, "no"),
    ],
)
def test_which_checkpoints_embed_by_default(
    zoo: Callable[[str], Path], name: str, flags: dict[str, Any], when: str
) -> None:
    answer = serves(info_of(zoo(name)), EmbeddingSettings(**flags))
    assert (answer.task, answer.when) == ("embedding", when)
    assert bool(answer.reason) == (when not in ("default", "alone"))


def test_without_modules_the_setting_chooses_the_pooling(zoo: Callable[[str], Path]) -> None:
    bert, llama = info_of(zoo("bert-masked")), info_of(zoo("llama"))
    assert read_recipe(bert, DEFAULTS).modes == ("cls",)
    assert read_recipe(llama, DEFAULTS).modes == ("lasttoken",)
    assert read_recipe(replace(llama, causal=False, config={"is_causal": False}), DEFAULTS).modes == ("lasttoken",)
    assert read_recipe(bert, EmbeddingSettings(pooling="mean")).modes == ("mean",)
    assert read_recipe(info_of(zoo("bert")), EmbeddingSettings(pooling="max")).modes == ("mean",)
