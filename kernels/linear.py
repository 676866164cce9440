"""Linear layers over weights that were packed once, at load."""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import nn

from . import gemm


class PackedLinear(nn.Module):
    """``x Wᵀ + b``, usable in place of ``nn.Linear``; keeps its own packed copy of the weight.

    On CPUs that lack bfloat16 products, weights go through :mod:`.gemm`: stored as bfloat16 when
    that loses nothing (whatever the model's dtype), computed in float32. Where the CPU has them
    and the model is bfloat16, oneDNN's own packed layout is used.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """``weight`` [N, K] and ``bias`` [N] on the CPU, float32 or bfloat16."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.onednn = weight.dtype == torch.bfloat16 and has_bfloat16()
        if self.onednn:
            # The layout for 16 rows is near the best for any number of rows; the one for 1 row isn't.
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        else:
            self.packed = gemm.pack(weight, storage_dtype(weight))
        self.set_bias(bias)

    def set_bias(self, bias: torch.Tensor | None) -> None:
        """Use another bias [N] (None: none)."""
        self.bias = None if bias is None else bias.detach()
        self.addend = torch.zeros(0)
        if not self.onednn:
            self.addend = torch.zeros(self.packed.shape[0] * gemm.PANEL)
            if bias is not None:
                self.addend[: self.out_features] = bias

    @property
    def plain(self) -> bool:
        """Is it float32 and one launch of our own kernel, nothing else?"""
        return self.dtype == torch.float32 and self.out_features % gemm.PANEL == 0

    def into(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """:meth:`forward` of a :attr:`plain` one, float32 ``[T, K]``, into ``out`` [T, N], which may be ``residual``.

        A bias isn't added where there is a residual.
        """
        gemm.product(x, self.packed, self.addend if residual is None else residual, out)
        return out

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., K] -> [..., N]; ``residual`` [..., N] of the same dtype is added, not changed."""
        flat = x.reshape(-1, self.in_features)
        added = None if residual is None else residual.reshape(-1, self.out_features)
        out = self._onednn(flat, added) if self.onednn else self._compiled(flat, added)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], self.out_features)

    def _onednn(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x.contiguous(), self.packed, self.bias, "none", [], ""
        )
        return out if residual is None else out.add_(residual)

    def _compiled(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        given = x.dtype
        width = self.addend.shape[0]
        addend = self.addend
        # Adding the residual costs nothing in the kernel, if no bias is added there.
        fused = residual is not None and self.bias is None and width == self.out_features
        if fused and residual is not None:
            addend = residual.float().contiguous()
        out = torch.empty(x.shape[0], width, dtype=torch.float32)
        gemm.product(x.float().contiguous(), self.packed, addend, out)
        if width != self.out_features:
            out = out[:, : self.out_features].contiguous()
        if residual is not None and not fused:
            out += residual
        return out if given == torch.float32 else out.to(given)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={self.packed.dtype}"


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """What :class:`PackedLinear` computes."""
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def storage_dtype(weight: torch.Tensor) -> torch.dtype:
    """bfloat16 if it holds every number of ``weight`` exactly, else float32."""
    if weight.dtype == torch.bfloat16:
        return torch.bfloat16
    for rows in torch.split(weight, max(1, (1 << 22) // weight.shape[1])):  # bounded scratch
        if not torch.equal(rows.to(torch.bfloat16).to(rows.dtype), rows):
            return torch.float32
    return torch.bfloat16


def has_bfloat16() -> bool:
    """Does this CPU multiply bfloat16, through oneDNN?"""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    # oneDNN says yes to any AVX-512 and then emulates, slower than float32
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
