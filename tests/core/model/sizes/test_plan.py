from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.core.model.attention import packed_layout
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.sizes import dry_run
from trunkline.core.model.sizes.dry_run import peak_bytes
from trunkline.core.model.sizes.plan import ModelPlan, plan_model
from trunkline.core.model.sources.info import read_info
from trunkline.core.settings import ModelSettings
from trunkline.core.testing import build_checkpoint
from trunkline.core.types import ModelSource

CPU = torch.device("cpu")


def planned(folder: Path, device: torch.device = CPU, dtype: str = "float32") -> ModelPlan:
    source = ModelSource(folder.name, str(folder))
    settings = ModelSettings(model_path=str(folder), dtype=dtype)
    return plan_model(source, read_info(source, settings), settings, device)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_activations_are_about_what_a_real_pass_takes(
    name: str, load: Callable[..., LoadedModel], zoo: Callable[[str], Path]
) -> None:
    model, tokens = load(name), 64
    ids = torch.arange(tokens)
    with peak_bytes() as measured:
        model.forward(ids, ids, packed_layout([tokens]), None)
    estimate = planned(zoo(name)).bytes_per_token * tokens
    assert 0.5 * measured.peak < estimate < 2 * measured.peak


def test_a_row_of_logits_takes_the_size_of_the_vocabulary(zoo: Callable[[str], Path]) -> None:
    assert planned(zoo("llama")).bytes_per_logits_row == 3 * 4 * 512
    assert planned(zoo("bert")).bytes_per_logits_row == 0


def test_activations_depend_on_the_dtype(zoo: Callable[[str], Path]) -> None:
    narrow = planned(zoo("llama"), dtype="bfloat16").bytes_per_token
    assert narrow < planned(zoo("llama")).bytes_per_token <= 2 * narrow


def test_config_json_is_enough(tmp_path: Path) -> None:
    folder = build_checkpoint("llama", tmp_path / "llama")
    before = planned(folder)
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert planned(folder) == before


def test_the_default_dtype_on_a_gpu_is_bfloat16(zoo: Callable[[str], Path]) -> None:
    plan = planned(zoo("llama"), torch.device("cuda"), "auto")
    assert plan.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_without_a_dry_run_the_config_gives_the_sizes(
    name: str, zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("it reads values")

    exact = planned(zoo(name))
    monkeypatch.setattr(dry_run, "run", fail)
    estimated = planned(zoo(name))
    assert estimated.kv_bytes_per_token >= exact.kv_bytes_per_token
    assert 0.2 * exact.bytes_per_token < estimated.bytes_per_token < 5 * exact.bytes_per_token
