"""Safetensors files are read; everything else is refused with a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, LlamaConfig

from trunkline.core.errors import ModelError
from trunkline.core.model.sources import weights


def write_index(folder: Path, weight_map: object) -> None:
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: stored[...].to() for name, stored in weights.stream(folder)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_shards(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    assert_equal(read(tmp_path), {"a": torch.zeros(1), "b": torch.ones(1)})
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"incomplete.*model-2\.safetensors"):
        weights.files(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/x.safetensors", "a/../../b.safetensors"])
def test_weights_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises(ModelError, match="leads out of the folder"):
        weights.files(tmp_path)
    for named in (name, f"{name}.index.json"):
        (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": named}), encoding="utf-8")
        with pytest.raises(ModelError, match="leads out of the folder"):
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


# -- which files are the checkpoint's: what transformers itself loads --------------------------

NORM = "norm.weight"  # holds a number by which a file's tensors are recognised
TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The tensors of a tiny Llama without head."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=8, architectures=["LlamaModel"], **sizes)
    return {name: tensor.clone() for name, tensor in AutoModel.from_config(config).state_dict().items()}


class Folder:
    """A checkpoint's folder, to which sets of files with different numbers are added."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.path, self.tensors = path, tensors
        self.config = {"model_type": "llama", "architectures": ["LlamaModel"], "hidden_size": 8, "vocab_size": 8}
        self.config |= {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        self.configure()

    def configure(self, **more: str) -> None:
        (self.path / "config.json").write_text(json.dumps(self.config | more), encoding="utf-8")

    def single(self, number: float, name: str = weights.SINGLE) -> None:
        (self.path / name).parent.mkdir(exist_ok=True)
        save_file({**self.tensors, NORM: torch.full((8,), number)}, self.path / name, {"format": "pt"})

    def shards(self, number: float, names: tuple[str, ...] = TWO, index: str = weights.INDEX) -> None:
        content = {**self.tensors, NORM: torch.full((8,), number)}
        parts = [dict(list(content.items())[at :: len(names)]) for at in range(len(names))]
        for name, part in zip(names, parts, strict=True):
            (self.path / name).parent.mkdir(exist_ok=True)
            save_file(part, self.path / name, {"format": "pt"})
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (self.path / index).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")

    def remove(self, *names: str) -> None:
        for name in names:
            (self.path / name).unlink()


def _named(folder: Folder, value: str) -> None:
    folder.configure(transformers_weights=value)


COMBINATIONS: dict[str, list[Callable[[Folder], None]]] = {
    "single": [lambda f: f.single(1)],
    "shards": [lambda f: f.shards(1)],
    "single over an index without shards": [lambda f: f.shards(1), lambda f: f.remove(*TWO), lambda f: f.single(2)],
    "single over an index that lacks one": [lambda f: f.shards(1), lambda f: f.remove(TWO[1]), lambda f: f.single(2)],
    "single beside a complete index": [lambda f: f.shards(1), lambda f: f.single(2)],
    "single beside a damaged index": [lambda f: f.single(1), lambda f: f.path.joinpath(weights.INDEX).write_text("{")],
    "index that lacks a shard": [lambda f: f.shards(1), lambda f: f.remove(TWO[1])],
    "index without shards": [lambda f: f.shards(1), lambda f: f.remove(*TWO)],
    "index of the single file": [lambda f: f.shards(1, (weights.SINGLE,))],
    "shards in a folder below": [lambda f: f.shards(1, ("below/a.safetensors", "below/b.safetensors"))],
    "stray files beside single": [
        lambda f: f.single(1),
        lambda f: f.single(2, "adapter_model.safetensors"),
        lambda f: f.single(3, "consolidated.safetensors"),
        lambda f: f.single(4, "model.fp16.safetensors"),
        lambda f: f.single(5, "onnx/model.safetensors"),
    ],
    "stray files beside shards": [
        lambda f: f.shards(1),
        lambda f: f.single(2, "consolidated.safetensors"),
        lambda f: f.shards(3, ("model-00001-of-00003.safetensors",), "other.safetensors.index.json"),
    ],
    "adapter only": [lambda f: f.single(1, "adapter_model.safetensors")],
    "consolidated only": [lambda f: f.single(1, "consolidated.safetensors")],
    "variant only": [lambda f: f.single(1, "model.fp16.safetensors")],
    "variant shards only": [lambda f: f.shards(1, index="model.safetensors.index.fp16.json"), lambda f: f.remove(*TWO)],
    "below only": [lambda f: f.single(1, "below/model.safetensors")],
    "nothing": [],
    "named in the config": [
        lambda f: f.single(1),
        lambda f: f.single(2, "other.safetensors"),
        lambda f: _named(f, "other.safetensors"),
    ],
    "index named in the config": [
        lambda f: f.single(1),
        lambda f: f.shards(2, index="other.safetensors.index.json"),
        lambda f: _named(f, "other.safetensors.index.json"),
    ],
    "named and missing": [lambda f: f.single(1), lambda f: _named(f, "other.safetensors")],
    "named index missing": [lambda f: f.single(1), lambda f: _named(f, "other.safetensors.index.json")],
    "named and no safetensors": [lambda f: f.single(1), lambda f: _named(f, "model.gguf")],
}


@pytest.mark.field
@pytest.mark.parametrize("case", COMBINATIONS)
def test_the_files_are_those_that_transformers_loads(
    case: str, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    folder = Folder(tmp_path, tensors)
    for step in COMBINATIONS[case]:
        step(folder)
    try:
        theirs = AutoModel.from_pretrained(tmp_path, local_files_only=True).norm.weight[0].item()
    except (OSError, ValueError):
        theirs = None
    try:
        found = read(tmp_path)
        assert found.keys() == tensors.keys()
        ours = found[NORM][0].item()
    except ModelError:
        ours = None
    assert ours == theirs


def test_a_complete_set_of_shards_needs_no_index(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """transformers refuses it; other servers, and scripts that save shards, don't write an index."""
    folder = Folder(tmp_path, tensors)
    folder.shards(1)
    folder.remove(weights.INDEX)
    folder.single(2, "consolidated.safetensors")
    assert weights.files(tmp_path) == [tmp_path / name for name in TWO]
    for stray in ("model-00001-of-00003.safetensors", "model-00003-of-00002.safetensors"):
        folder.single(3, stray)
        with pytest.raises(ModelError, match="nothing says that"):
            weights.files(tmp_path)
        folder.remove(stray)
    folder.remove(TWO[0])
    with pytest.raises(ModelError, match="nothing says that"):
        weights.files(tmp_path)
