"""Folders of compressed-tensors, written by that package, have the numbers that it reads back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

from trunkline.core import Engine
from trunkline.core.errors import ModelError
from trunkline.core.model.attention import packed_layout
from trunkline.core.model.sources.quantized.tensors import FolderTensor, format_of, stream
from trunkline.core.model.sources.tensor_file import StoredTensor

Tensors = dict[str, torch.Tensor]
INT4 = {"num_bits": 4, "type": "int"}
INT8 = {"num_bits": 8, "type": "int"}
FLOAT8 = {"num_bits": 8, "type": "float"}
ROWS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a16": ("pack-quantized", {"weights": INT4 | {"strategy": "group", "group_size": 32}}),
    "w4a16-asymmetric": (
        "pack-quantized",
        {"weights": INT4 | {"strategy": "group", "group_size": 64, "symmetric": False}},
    ),
    "w8a16": ("pack-quantized", {"weights": INT8 | {"strategy": "channel"}}),
    "w8a8": ("int-quantized", {"weights": INT8 | {"strategy": "channel"}, "input_activations": ROWS}),
    "w8a8-tensor": ("int-quantized", {"weights": INT8 | {"strategy": "tensor"}, "input_activations": ROWS}),
    "w8a8-asymmetric": (
        "int-quantized",
        {"weights": INT8 | {"strategy": "channel", "symmetric": False}, "input_activations": ROWS},
    ),
    "float8": ("float-quantized", {"weights": FLOAT8 | {"strategy": "channel"}}),
    "float8-block": ("float-quantized", {"weights": FLOAT8 | {"strategy": "block", "block_structure": [128, 128]}}),
}
KEPT = [name for name in SCHEMES if not name.startswith("float8")]


def scales_of(weight: torch.Tensor, scheme: QuantizationScheme) -> Tensors:
    """Scales and zeros of a weight, from its least and largest numbers."""
    given = scheme.weights
    outputs, inputs = weight.shape
    if given.strategy == "block":
        rows, columns = given.block_structure
        padded = torch.zeros(-(-outputs // rows) * rows, -(-inputs // columns) * columns)
        padded[:outputs, :inputs] = weight
        parts = padded.view(padded.shape[0] // rows, rows, -1, columns).transpose(1, 2).flatten(2)
    elif given.strategy == "tensor":
        parts = weight.reshape(1, -1)
    else:
        parts = weight.view(outputs, -1, given.group_size or inputs)
    scales, zeros = calculate_qparams(parts.amin(-1), parts.amax(-1), given)
    return {"weight_scale": scales.float(), "weight_zero_point": zeros}


def quantise(weight: torch.Tensor, kind: str, scheme: QuantizationScheme) -> tuple[Tensors, torch.Tensor]:
    """A layer's tensors, and the numbers that the package reads back from them."""
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress({"weight": weight} | scales_of(weight, scheme), scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


@pytest.fixture
def write(rewrite: Callable[..., Tensors], tmp_path: Path) -> Callable[..., Tensors]:
    """Writes a checkpoint, compressed, to ``tmp_path / "model"``; returns the numbers that it stands for."""

    def write(scheme: str, name: str = "llama", **config: Any) -> Tensors:
        kind, described = SCHEMES[scheme]
        group = QuantizationScheme(targets=["Linear"], **described)
        whole = {
            "quant_method": "compressed-tensors",
            "format": kind,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group.model_dump(mode="json")},
            "ignore": ["lm_head"],
        }
        return rewrite(tmp_path / "model", name, partial(quantise, kind=kind, scheme=group), whole | config)

    return write


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_have_the_numbers_that_the_package_reads(
    write: Callable[..., Tensors], tmp_path: Path, scheme: str
) -> None:
    expected = write(scheme)
    found = stored_tensors(tmp_path / "model")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        numbers = expected[name].float()
        torch.testing.assert_close(tensor.to(dtype=torch.float32), numbers, rtol=1e-6, atol=1e-9)
        if isinstance(tensor, FolderTensor) and scheme in KEPT:
            atol = 2e-3 * float(numbers.abs().max())  # scales of float32 are rounded to 11 bits, and so are minima
            torch.testing.assert_close(tensor.quantized().numbers(), numbers, rtol=0, atol=atol)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_dequantised_weights(
    write: Callable[..., Tensors], zoo: Callable[[str], Path], tmp_path: Path, scheme: str
) -> None:
    tensors = write(scheme)
    reference = transformers.AutoModelForCausalLM.from_pretrained(zoo("llama"), dtype=torch.float32)
    reference.load_state_dict(tensors, strict=False)
    ids = torch.arange(5, 69)
    with Engine(str(tmp_path / "model"), dtype="float32", threads=1) as engine, torch.inference_mode():
        transport: Any = engine.client.transport
        model = transport.loop.lanes[0].model
        hidden = model.forward(ids, torch.arange(64), packed_layout([64]), None)
        found, expected = model.heads["lm"](hidden), reference(ids[None]).logits[0]
        stored_as = engine.client.models[0].stored_as
    error = float((found - expected).norm() / expected.norm())
    if scheme in KEPT:
        assert error < 0.05  # rows are rounded to int8
        assert stored_as == "8 of 8 matrices as compressed-tensors"
    else:
        assert error < 1e-4
        assert stored_as == ""


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    form = format_of(str(folder))
    assert form is not None
    return dict(stream(str(folder), form))


def test_an_order_of_inputs(write: Callable[..., Tensors], tmp_path: Path) -> None:
    """Older releases of the package wrote the group of each input, or -1 where it wasn't used."""
    expected = write("w4a16")
    file, layer = tmp_path / "model" / "model.safetensors", "model.layers.0.self_attn.o_proj"
    tensors, neighbours = load_file(file), torch.arange(128) // 32
    scales = tensors[f"{layer}.weight_scale"].float()
    codes = expected[f"{layer}.weight"] / scales[:, neighbours]
    for named, groups in (
        (torch.full((128,), -1), neighbours),
        (neighbours, neighbours),
        (torch.arange(128) % 4, torch.arange(128) % 4),
    ):
        save_file({**tensors, f"{layer}.weight_g_idx": named.int()}, file)
        found = stored_tensors(tmp_path / "model")[f"{layer}.weight"]
        assert isinstance(found, FolderTensor)
        for numbers in (found.to(), found.quantized().numbers()):
            torch.testing.assert_close(numbers, codes * scales[:, groups], rtol=1e-3, atol=1e-5)


def test_zeros_of_older_releases(write: Callable[..., Tensors], tmp_path: Path) -> None:
    """They wrote those of symmetric codes, too, and not packed."""
    expected = write("w4a16")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.self_attn.o_proj"
    tensors = load_file(file)
    shape = tensors[f"{name}.weight_shape"].int()
    zeros = torch.zeros(128, 4, dtype=torch.int8)
    save_file({**tensors, f"{name}.weight_zero_point": zeros, f"{name}.weight_shape": shape}, file)
    found = stored_tensors(tmp_path / "model")[f"{name}.weight"].to()
    torch.testing.assert_close(found, expected[f"{name}.weight"].float())


def test_float8_with_zeros(write: Callable[..., Tensors], tmp_path: Path) -> None:
    expected = write("float8")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.self_attn.o_proj"
    tensors = load_file(file)
    for zero in (0.0, 1.0):
        zeros = torch.full((128, 1), zero).to(torch.float8_e4m3fn)
        save_file({**tensors, f"{name}.weight_zero_point": zeros}, file)
        found = stored_tensors(tmp_path / "model")[f"{name}.weight"]
        if zero:
            with pytest.raises(ModelError, match="must be 0 for float8 weights"):
                found.to()
        else:
            torch.testing.assert_close(found.to(), expected[f"{name}.weight"].float())


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_scale", None, "lacks .*weight_scale"),
        ("weight_scale", torch.ones(128, 3), "has 128 inputs, which 3 groups don't divide"),
        ("weight_scale", torch.ones(5, 4), r"weight_scale is \[5, 4\]"),
        ("weight_shape", torch.tensor([128, 96]), r"is \[128, 16\] for a weight \[128, 96\]; integers of 4 and 8"),
        ("weight_shape", torch.tensor([128, -128]), "for a weight"),
        ("weight_shape", torch.ones(2), "weight_shape is stored as float32"),
        ("weight_packed", torch.zeros(128, 16, dtype=torch.int64), "weight_packed is stored as int64"),
        ("weight_zero_point", torch.zeros(3, 4, dtype=torch.int32), r"weight_zero_point is \[3, 4\]"),
        ("weight_g_idx", torch.full((128,), 9, dtype=torch.int32), "o_proj have groups from 9 to 9, not of 4"),
        ("weight_g_idx", torch.arange(128).int() % 5 - 1, "groups from -1 to 3, not of 4"),
    ],
)
def test_damaged_layers_are_refused(
    write: Callable[..., Tensors], tmp_path: Path, part: str, value: torch.Tensor | None, message: str
) -> None:
    write("w4a16")
    file, name = tmp_path / "model" / "model.safetensors", f"model.layers.0.self_attn.o_proj.{part}"
    tensors = load_file(file)
    tensors.pop(name, None)
    save_file(tensors if value is None else {**tensors, name: value}, file)
    with pytest.raises(ModelError, match=message):
        Engine(str(tmp_path / "model"), dtype="float32", threads=1)
