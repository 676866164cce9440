"""What a checkpoint is, from its JSON files alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trunkline.core.errors import ModelError
from trunkline.core.model.sources.info import read_info
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelInfo, ModelSource

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "max_position_embeddings": 256,
}


def read(folder: Path, config: dict[str, Any], **settings: Any) -> ModelInfo:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_info(ModelSource("my/model", str(folder)), ModelSettings(model_path="my/model", **settings))


def test_plain(tmp_path: Path) -> None:
    info = read(tmp_path, {**LLAMA, "eos_token_id": 7})
    assert info.architecture == "LlamaForCausalLM"
    assert (info.context_length, info.vocab_size, info.hidden_size) == (256, 100, 64)
    assert info.causal
    assert info.num_experts == 0
    assert info.eos_token_ids == (7,)
    assert info.config["model_type"] == "llama"


def test_older_names(tmp_path: Path) -> None:
    info = read(
        tmp_path,
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": 9, "n_embd": 8, "vocab_size": 5},
    )
    assert (info.context_length, info.hidden_size) == (9, 8)


def test_what_the_file_leaves_out_comes_from_the_class(tmp_path: Path) -> None:
    info = read(tmp_path, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100})
    assert (info.context_length, info.vocab_size, info.hidden_size) == (2048, 100, 4096)


@pytest.mark.parametrize("key", ["num_local_experts", "n_routed_experts", "num_experts"])
def test_experts(tmp_path: Path, key: str) -> None:
    assert read(tmp_path, {**LLAMA, key: 8}).num_experts == 8


def test_nested_text_config(tmp_path: Path) -> None:
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    inner = {key: LLAMA[key] for key in ("vocab_size", "hidden_size", "max_position_embeddings")}
    assert read(tmp_path, {**outer, "text_config": inner}).context_length == 256


@pytest.mark.parametrize(
    ("change", "causal"),
    [
        ({}, True),
        ({"is_causal": False}, False),
        ({"use_bidirectional_attention": True}, False),
        ({"model_type": "bert"}, False),
        ({"model_type": "bert", "is_decoder": True}, True),
    ],
)
def test_causal(tmp_path: Path, change: dict[str, Any], causal: bool) -> None:
    assert read(tmp_path, {**LLAMA, **change}).causal is causal


@pytest.mark.parametrize(
    ("change", "context"),
    [
        ({"model_type": "roberta", "pad_token_id": 1}, 254),
        ({"model_type": "xlm-roberta"}, 254),
        ({"model_type": "mpnet", "pad_token_id": 1}, 254),
        ({"model_type": "camembert", "pad_token_id": 5}, 250),
        ({"model_type": "esm", "pad_token_id": 1, "position_embedding_type": "rotary"}, 256),
        ({"model_type": "bert", "pad_token_id": 0}, 256),
    ],
)
def test_positions_that_begin_after_the_paddings_leave_less_context(
    tmp_path: Path, change: dict[str, Any], context: int
) -> None:
    assert read(tmp_path, {**LLAMA, **change}).context_length == context
    with pytest.raises(ModelError, match=rf"more than the {context} tokens"):
        read(tmp_path, {**LLAMA, **change}, context_length=context + 1)


@pytest.mark.field
@pytest.mark.parametrize(
    ("change", "context"),
    [
        # max_position_embeddings is 256
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 1024),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 512),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 1024),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 1024),
        *(
            ({"rope_scaling": {"type": kind, "factor": factor, "original_max_position_embeddings": original}}, context)
            for kind in ("linear", "dynamic", "yarn")
            # more than max_position_embeddings, equal to it (DeepSeek's form), and less
            for factor, original, context in ((4.0, 128, 512), (8, 32, 256), (4, 32, 128), (1.0, 64, 64), (1.5, 33, 49))
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 100}, 400),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 100}, 200),
        ({"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 32}}, 256),
        *(
            ({"rope_scaling": {"type": kind, "factor": factor, "original_max_position_embeddings": 128}}, 256)
            for kind in ("default", "llama3", "longrope", "proportional")
            for factor in (1.0, 8.0)
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, 256),  # Gemma 3
        ({"rope_scaling": None}, 256),
    ],
)
def test_the_context_length_follows_the_rotary_scaling(tmp_path: Path, change: dict[str, Any], context: int) -> None:
    assert read(tmp_path, {**LLAMA, **change}).context_length == context
    assert read(tmp_path, {**LLAMA, **change}, context_length=context).context_length == context
    with pytest.raises(ModelError, match=rf"more than the {context} tokens"):
        read(tmp_path, {**LLAMA, **change}, context_length=context + 1)


@pytest.mark.parametrize("factor", [0, -2.0, 0.001, math.inf, math.nan])
def test_a_factor_that_leaves_no_context_is_refused(tmp_path: Path, factor: float) -> None:
    with pytest.raises(ModelError, match=r"256 positions × the rotary factor .* is no context length"):
        read(tmp_path, {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": factor}})


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({}, ""),
        ({"architectures": ["LlamaForSequenceClassification"]}, "last"),
        ({"architectures": ["LlamaForSequenceClassification"], "is_causal": False}, "last"),
        ({"architectures": ["BertForSequenceClassification"], "model_type": "bert"}, "first"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, ""),
        ({"architectures": ["ModernBertForSequenceClassification"], "model_type": "modernbert"}, "first"),
        (
            {
                "architectures": ["ModernBertForSequenceClassification"],
                "model_type": "modernbert",
                "classifier_pooling": "mean",
            },
            "mean",
        ),
    ],
)
def test_which_row_is_scored(tmp_path: Path, change: dict[str, Any], rows: str) -> None:
    assert read(tmp_path, {**LLAMA, **change}).score_rows == rows


def test_ends_of_sequence_are_those_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 3]}', encoding="utf-8")
    assert read(tmp_path, {**LLAMA, "eos_token_id": 7}).eos_token_ids == (3, 7, 9)
    assert read(tmp_path, {**LLAMA, "eos_token_id": None}).eos_token_ids == (3, 9)
    (tmp_path / "generation_config.json").write_text("not JSON", encoding="utf-8")
    assert read(tmp_path, {**LLAMA, "eos_token_id": 7}).eos_token_ids == (7,)


def test_context_length(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA, context_length=100).context_length == 100
    with pytest.raises(ModelError, match=r"--context-length 257 is more than the 256 tokens that my/model"):
        read(tmp_path, LLAMA, context_length=257)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "has no config.json"),
        ("{", "can't be read"),
        ("[]", "must hold a JSON object"),
        ("{}", "names no architecture"),
        ('{"architectures": ["X"], "model_type": "no-such-type"}', "is incomplete"),
    ],
)
def test_errors(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=reason):
        read_info(ModelSource("x", str(tmp_path)), ModelSettings(model_path="x"))


def test_torch_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    script = (
        "import sys\n"
        "import trunkline.core.model\n"
        "from trunkline.core.config import ModelSettings\n"
        "from trunkline.core.model.sources.info import read_info\n"
        "from trunkline.core.types import ModelSource\n"
        "read_info(ModelSource('x', sys.argv[1]), ModelSettings(model_path='x'))\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub')))\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 0
