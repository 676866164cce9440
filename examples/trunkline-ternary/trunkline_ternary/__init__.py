"""Stores matrices as -1, 0 and 1, with a scale for each output, as BitNet b1.58 does: ``--ternary mlp``."""

from typing import Annotated

from msgspec import Meta, Struct

from trunkline.core.hookspecs import hookimpl
from trunkline.core.types import SettingsGroup, Transform

GROUP = 32  # inputs; rows are quantised in groups of as many


class TernarySettings(Struct, frozen=True):
    ternary: Annotated[str, Meta(description="Store matrices as -1, 0 and 1 whose names contain this.")] = ""


@hookimpl
def trunkline_settings():
    return SettingsGroup("ternary", TernarySettings, per_model=True)


@hookimpl
def trunkline_transforms(model, settings):
    wanted = settings["ternary"].ternary
    return [Transform("ternary", lambda names, weight: pack(wanted, names, weight), error=0.7)] * bool(wanted)


def pack(wanted, names, weight):
    import torch

    from trunkline.kernels.quantized.linear import QuantizedLinear
    from trunkline.kernels.quantized.weight import QuantizedWeight

    if wanted not in names[0] or weight.shape[1] % GROUP:
        return None
    factors = weight.float().abs().mean(1)
    codes = (weight.float() / factors[:, None]).round().clamp(-1, 1) + 1
    scales = torch.ones(len(weight), weight.shape[1] // GROUP, dtype=torch.float16)
    return QuantizedLinear(QuantizedWeight(4, GROUP, codes.to(torch.uint8), factors, scales, zero=1), weight.dtype)
