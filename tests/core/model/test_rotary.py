"""Hidden states of sequences on both sides of a length boundary, in one pass, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trunkline.core.model import loader
from trunkline.core.model.attention import packed_layout
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.padded import batches
from trunkline.core.model.sources.info import read_info
from trunkline.core.settings import ModelSettings
from trunkline.core.testing import build_checkpoint, randomize
from trunkline.core.testing.causal import DENSE
from trunkline.core.types import ModelSource
from trunkline.kernels.backend import choose

pytestmark = pytest.mark.field

TOLERANCE = 1e-4  # of hidden numbers, which are of the order of 3
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [1.5 + 0.5 * i for i in range(16)],
    "original_max_position_embeddings": 64,
}
MIXED = {
    "full_attention": LONG,
    "sliding_attention": LONG | {"original_max_position_embeddings": 32, "long_factor": [4.0] * 16},
}
LENGTHS = {"long": [20, 64, 65, 100], "mixed": [20, 33, 64, 65, 100], "dynamic": [40, 256]}


def build(name: str, folder: Path, **config: Any) -> Path:
    """A tiny checkpoint; ``phimoe``, which is in no collection of them, scales its embedding by length too."""
    if name != "phimoe":
        return build_checkpoint(name, folder, **config)
    experts = {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
    model = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**{**DENSE, **experts, **config})).float()
    randomize(model)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> LoadedModel:
    settings = ModelSettings(model_path=str(folder), dtype="float32", **options)
    source = ModelSource("model", str(folder))
    info = read_info(source, settings)
    return loader.load(source, info, settings, [], choose("torch_native", "cpu"))


def alone(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of one uncached forward pass of a model that was just loaded."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.inference_mode():
        return model(ids[None], use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("llama", "long", {"rope_parameters": LONG}),
        ("phimoe", "long", {"rope_parameters": LONG | {"short_mscale": 1.1, "long_mscale": 1.3}}),
        ("gemma3", "mixed", {"rope_parameters": MIXED}),
    ],
)
def test_every_sequence_has_the_frequencies_of_its_own_length(
    name: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = build(name, tmp_path / name, **options)
    lengths = LENGTHS[kind]
    model = load(folder)
    assert model.length_boundaries == ((32, 64) if kind == "mixed" else (64,))
    ids = torch.randint(4, 500, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    per_token = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths))
    places = torch.cat([torch.arange(length) for length in lengths])
    hidden = model.forward(ids, places, packed_layout(lengths), None, lengths=per_token)
    for mine, own in zip(torch.split(hidden, lengths), torch.split(ids, lengths), strict=True):
        assert (mine - alone(folder, own)).abs().max() < TOLERANCE


def test_dynamic_scaling_is_that_of_a_sequence_of_the_context_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = build_checkpoint("llama", tmp_path / "llama", rope_parameters=rope, max_position_embeddings=128)
    model = load(folder)
    lengths = LENGTHS["dynamic"]
    ids = torch.randint(4, 500, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    places = torch.cat([torch.arange(length) for length in lengths])
    short, whole = torch.split(model.forward(ids, places, packed_layout(lengths), None), lengths)
    assert (whole - alone(folder, ids[40:])).abs().max() < TOLERANCE
    assert (short - alone(folder, ids[:40])).abs().max() > 100 * TOLERANCE  # which has a base of its own
    bounded = load(folder, context_length=128)  # the length that the model was trained with
    hidden = bounded.forward(ids[:40], places[:40], packed_layout([40]), None)
    assert (hidden - alone(folder, ids[:40])).abs().max() < TOLERANCE


def test_boundaries_beyond_the_context_do_not_count(tmp_path: Path) -> None:
    folder = build_checkpoint("llama", tmp_path / "llama", rope_parameters=LONG)
    assert load(folder, context_length=64).length_boundaries == ()
    assert load(folder, context_length=65).length_boundaries == (64,)


def test_padded_batches_stay_on_one_side_of_a_boundary() -> None:
    assert list(batches([70, 66, 64, 60])) == [[0, 1, 2, 3]]
    assert list(batches([70, 66, 64, 60], boundaries=(65,))) == [[0, 1], [2, 3]]
