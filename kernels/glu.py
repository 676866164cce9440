"""Gated activation: the middle of a gated MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trunkline.kernels.cpu import glu as compiled

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
COMPILED = ("silu", "gelu_tanh")  # those with a loop: both are x * sigmoid(something), while gelu needs erf


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """One of :data:`ACTIVATIONS`, elementwise."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def glu_reference(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up``; ``gate_up`` [T, 2 * I], gate first -> [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, activation) * up


def glu(gate_up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`glu_reference` of float32 or bfloat16, into ``out`` [T, I] if given; :data:`COMPILED` ones by a loop."""
    if activation not in COMPILED:
        return glu_reference(gate_up, activation)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width) if out is None else out
    compiled.glu(gate_up, activation, out)
    return out
