"""The gated activation of an MLP (SwiGLU, GEGLU): ``activation(gate) * up``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trunkline.kernels.cpu import glu as compiled

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
COMPILED = ("silu", "gelu_tanh")  # those with a compiled loop: both are x * sigmoid(f(x)); "gelu" would need erf


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """One of :data:`ACTIVATIONS`, elementwise; any float dtype and shape.

    "gelu_tanh" is GELU's tanh approximation. Any name but "silu" and "gelu_tanh" means "gelu".
    """
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def glu_reference(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up`` of ``gate_up`` [T, 2 I] (gate in the first I columns) -> [T, I], any float dtype.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020, arXiv:2002.05202).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, activation) * up


def glu(gate_up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`glu_reference` of ``gate_up`` [T, 2 I], float32 or bfloat16; compiled for :data:`COMPILED` activations.

    Those write to ``out`` [T, I], of ``gate_up``'s dtype, if it is given; others ignore it. ValueError
    for another dtype, or for tensors that aren't contiguous. The shape of ``out`` isn't checked.
    """
    if activation not in COMPILED:
        return glu_reference(gate_up, activation)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width) if out is None else out
    compiled.glu(gate_up, activation, out)
    return out
