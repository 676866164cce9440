"""Safetensors files are read; everything else is refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trunkline.core.errors import ModelError
from trunkline.core.model import weights


def write_index(folder: Path, weight_map: object) -> None:
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: stored[...].to() for name, stored in weights.stream(folder)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_single_file(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "adapter.safetensors")
    assert_equal(read(tmp_path), tensors)


def test_shards(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    assert_equal(read(tmp_path), {"a": torch.zeros(1), "b": torch.ones(1)})
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"incomplete.*model-2\.safetensors"):
        weights.files(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises(ModelError, match="plain file names"):
        weights.files(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / weights.INDEX).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match="not a safetensors index"):
        weights.files(tmp_path)


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="damaged"):
        list(weights.stream(tmp_path))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", r"pytorch_model\.bin, a pickle.*save_pretrained"),
        ("model.pt", r"model\.pt, a pickle"),
        ("x.gguf", r"x\.gguf\. Convert it once"),
        ("README.md", r"no \*\.safetensors"),
    ],
)
def test_other_formats(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=reason):
        weights.files(tmp_path)
