"""The gated activation of an MLP (SwiGLU, GEGLU): ``activation(gate) * up``."""

from __future__ import annotations

import torch

from trunkline.kernels.cpu import glu as compiled

from .activation import activate_cpu, activate_reference

COMPILED = ("silu", "gelu_tanh")  # those with a compiled loop: both are x * sigmoid(f(x)); "gelu" would need erf


def glu_reference(gate_up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """``activation(gate) * up`` of ``gate_up`` [T, 2 I] (gate in the first I columns) -> [T, I], any float dtype.

    ``activation``: one of :data:`.activation.ACTIVATIONS`. The result is written to ``out`` if given.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020, arXiv:2002.05202).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(activate_reference(gate, activation), up, out=out)


def glu_cpu(gate_up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`glu_reference` of ``gate_up`` [T, 2 I], float32 or bfloat16; one compiled loop for :data:`COMPILED`.

    ValueError for another dtype, and for these activations for tensors that aren't contiguous. The shape of ``out``
    isn't checked.
    """
    if activation not in COMPILED:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.mul(activate_cpu(gate.contiguous(), activation), up, out=out)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width) if out is None else out
    compiled.glu(gate_up, activation, out)
    return out
