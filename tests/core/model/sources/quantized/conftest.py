"""Folders with quantised weights of small models, in the formats of GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of the outputs in a word, from the lowest bits


@dataclass(frozen=True)
class Kind:
    """A way to quantise. ``config``: more keys of its quantization_config."""

    method: str
    bits: int = 4
    group: int | None = 32  # None: all inputs
    symmetric: bool = False
    ordered: bool = False  # groups of inputs that aren't neighbours
    alike: bool = True  # the same groups in all layers with as many inputs
    config: tuple[tuple[str, Any], ...] = ()


KINDS = {
    "gptq": Kind("gptq", symmetric=True),
    "gptq-8": Kind("gptq", bits=8, group=None, symmetric=True),
    "gptq-asymmetric": Kind("gptq", group=64),
    "gptq-ordered": Kind("gptq", ordered=True, config=(("desc_act", True),)),
    "gptq-unlike": Kind("gptq", ordered=True, alike=False),
    "gptq-16": Kind("gptq", group=16),
    "gptq-v2": Kind("gptq", config=(("checkpoint_format", "gptq_v2"),)),
    "awq": Kind("awq", group=64, config=(("version", "gemm"),)),
}


def rounded(weight: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int32 [N, K], scales float16 [N, G], zeros int32 [N, G], the group of each input [K]."""
    outputs, inputs = weight.shape
    size, most = kind.group or inputs, (1 << kind.bits) - 1
    groups = torch.arange(inputs) // size
    if kind.ordered:
        seed = inputs if kind.alike else len(weight)
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))]
    scales, zeros = torch.empty(outputs, inputs // size), torch.empty(outputs, inputs // size)
    for group in range(inputs // size):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        if kind.symmetric:
            scales[:, group] = torch.maximum(-low, high) * 2 / most
            zeros[:, group] = (most + 1) // 2
        else:
            scales[:, group] = (high - low) / most
            zeros[:, group] = (-low / scales[:, group]).round()
            zeros[::5, group] = 0  # as where all numbers are positive
    scales = scales.half()
    codes = (weight / scales.float()[:, groups] + zeros[:, groups]).round().clamp(0, most)
    return codes.int(), scales, zeros.int(), groups.int()


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, C] -> int32 [R, C · bits / 32], the first of neighbouring columns in the lowest bits."""
    parts = codes.long().view(len(codes), -1, 32 // bits)
    summed = (parts << torch.arange(0, 32, bits)).sum(2)
    return torch.where(summed >= 1 << 31, summed - (1 << 32), summed).int()


def layer_tensors(weight: torch.Tensor, kind: Kind) -> tuple[Tensors, torch.Tensor]:
    """The tensors of a layer, and the numbers that they stand for."""
    codes, scales, zeros, groups = rounded(weight, kind)
    numbers = (codes - zeros[:, groups]).float() * scales.float()[:, groups]
    if kind.method == "awq":
        places = torch.arange(len(weight)).view(-1, 8)[:, AWQ_ORDER].flatten()
        stored = {"qweight": words(codes.t()[:, places], 4), "qzeros": words(zeros.t()[:, places], 4)}
    else:
        stored = {"qweight": words(codes, kind.bits).t(), "qzeros": words(zeros.t(), kind.bits), "g_idx": groups}
        if ("checkpoint_format", "gptq_v2") not in kind.config:
            stored["qzeros"] -= 0x11111111 if kind.bits == 4 else 0x01010101  # a zero of 0 borrows from the next
    return stored | {"scales": scales.t()}, numbers


Quantise = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


@pytest.fixture(scope="session")
def rewrite(zoo: Callable[[str], Path]) -> Callable[[Path, str, Quantise, dict[str, Any]], Tensors]:
    """``rewrite(folder, name, quantise, config)``: a checkpoint with other tensors for the matrices of its layers,
    but for very small ones.

    ``quantise`` returns a layer's tensors and the numbers that they stand for, which are the result, by name.
    """

    def write(folder: Path, name: str, quantise: Quantise, config: dict[str, Any]) -> Tensors:
        folder.mkdir()
        for file in zoo(name).iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
        expected, written = load_file(zoo(name) / "model.safetensors"), {}
        for full, tensor in list(expected.items()):
            if tensor.ndim != 2 or ".layers." not in full or tensor.shape[0] % 8 or tensor.shape[1] % 32:
                written[full] = tensor
                continue
            parts, expected[full] = quantise(tensor.float())
            written |= {f"{full.removesuffix('weight')}{part}": one.contiguous() for part, one in parts.items()}
        save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
        return expected

    return write


@pytest.fixture(scope="session")
def write_quantised(rewrite: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """``write_quantised(folder, name, kind)``: a checkpoint, quantised; returns the numbers that it stands for."""

    def write(folder: Path, name: str = "llama", kind: str = "gptq") -> Tensors:
        how = KINDS[kind]
        config = {"quant_method": how.method, "bits": how.bits, "group_size": how.group or -1, **dict(how.config)}
        return rewrite(folder, name, partial(layer_tensors, kind=how), config)

    return write
