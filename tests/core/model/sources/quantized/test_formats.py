"""What config.json says about quantisation, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from trunkline.core.errors import ModelError
from trunkline.core.model.sources.quantized.formats import KEY, find

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": GROUP},
}
BLOCK = GROUP | {"weights": {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]}}
HUGE = {"num_bits": 8, "block_structure": [1 << 70, 1]}


@pytest.mark.parametrize(
    ("described", "name"),
    [
        (GPTQ, "gptq"),
        (GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}, "gptq"),
        (GPTQ | {"format": "gptq_v2"}, "gptq"),
        (GPTQ | {"checkpoint_format": None, "is_marlin_format": None, "rotation": None}, "gptq"),
        (AWQ, "awq"),
        ({"quant_method": "awq", "bits": 4, "version": "GEMM"}, "awq"),
        (COMPRESSED, "compressed-tensors"),
        (COMPRESSED | {"format": "mixed-precision", "sparsity_config": {"format": "dense"}}, "compressed-tensors"),
        (COMPRESSED | {"config_groups": {"group_0": BLOCK, "group_1": BLOCK}}, "compressed-tensors"),
        (COMPRESSED | {"quantization_status": "frozen"}, "compressed-tensors"),
    ],
)
def test_known_formats(described: dict[str, Any], name: str) -> None:
    found = find({KEY: described})
    assert found is not None
    assert found.name == name


def test_plain_weights_have_no_format() -> None:
    assert find({}) is None
    assert find({KEY: None}) is None


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised as bitsandbytes, which can't be read; gptq, awq, compressed-"),
        ({"quant_method": ["gptq"]}, "can't be read"),
        ("gptq", "quantised as none"),
        (GPTQ | {"bits": 3}, "by gptq with bits 3; of bits, 4, 8 can be read"),
        (GPTQ | {"bits": "four"}, r"quantization_config in its config\.json can't be read: .*bits"),
        ({"quant_method": "gptq"}, "missing required field `bits`"),
        (GPTQ | {"checkpoint_format": "marlin"}, "format marlin; of format, gptq, gptq_v2 can be read"),
        (GPTQ | {"is_marlin_format": True}, "format marlin"),
        (GPTQ | {"rotation": "hadamard"}, "rotation hadamard"),
        (AWQ | {"rotation": "random"}, "rotation random"),
        ({"quant_method": "awq", "bits": 4, "format": "gemv"}, "format gemv"),
        (AWQ | {"bits": 8}, "by awq with bits 8"),
        (AWQ | {"version": "gemv"}, "format gemv; of format, gemm can be read"),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized; of format, dense, pack-"),
        (COMPRESSED | {"config_groups": {"group_0": GROUP | {"format": "mxfp4-pack-quantized"}}}, "mxfp4"),
        (COMPRESSED | {"config_groups": {"group_0": GROUP | {"weights": {"num_bits": 2}}}}, "num_bits 2"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity sparse-24-bitmask"),
        (COMPRESSED | {"transform_config": {"config_groups": {"u": {}}}}, "rotations, which can't be computed"),
        (COMPRESSED | {"config_groups": {"group_0": GROUP, "group_1": BLOCK}}, "with several sizes of blocks"),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 8, "block_structure": [1 << 70, 1]}}}},
            "can't be",
        ),
        (COMPRESSED | {"config_groups": []}, "can't be read: .*config_groups"),
    ],
)
def test_others_are_refused(described: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find({KEY: described})


@pytest.mark.parametrize(("version", "subtracted"), [("gptq", True), ("GPTQ_V2", False)])
@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_zeros_of_gptq(key: str, version: str, subtracted: bool) -> None:
    found = find({KEY: GPTQ | {key: version}})
    assert found is not None
    assert isinstance(found.read, partial)
    assert found.read.keywords == {"minus_one": subtracted}
