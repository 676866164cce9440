"""Linear layers over weights that were packed once, at load."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trunkline.kernels.cpu import gemm
from trunkline.kernels.cpu.processor import has_bfloat16, has_bfloat16_pairs


class PackedLinear(nn.Module):
    """``x Wᵀ + b``, usable in place of ``nn.Linear``; keeps its own packed copy of the weight.

    Bfloat16 models use oneDNN's packed layout on CPUs with tiles of bfloat16 products (AMX, Arm's)
    and :mod:`.gemm` in bfloat16 on those with vectors of them (AVX512_BF16). All else goes through
    :mod:`.gemm` in float32, weights stored as bfloat16 when that loses nothing.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, wide: bool = False) -> None:
        """``weight`` [N, K] and ``bias`` [N] on the CPU, float32 or bfloat16.

        ``wide``: results of :meth:`forward` are the float32 sums where our own kernel makes them,
        else of the weight's dtype.
        """
        super().__init__()
        self.wide = wide
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        pairs = weight.dtype == torch.bfloat16 and self.in_features % 2 == 0 and has_bfloat16_pairs()
        self.onednn = weight.dtype == torch.bfloat16 and not pairs and has_bfloat16()
        if self.onednn:
            # The layout for 16 rows is near the best for any number of rows; the one for 1 row isn't.
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        elif pairs:
            self.packed = gemm.pack_pairs(weight.contiguous())
        else:
            self.packed = gemm.pack(weight, storage_dtype(weight))
        self.set_bias(bias)

    def set_bias(self, bias: torch.Tensor | None) -> None:
        """Use another bias [N] (None: none)."""
        self.bias = None if bias is None else bias.detach()
        self.addend = torch.zeros(0)
        if not self.onednn:
            self.addend = torch.zeros(gemm.width_of(self.packed), dtype=gemm.rows_dtype(self.packed))
            if bias is not None:
                self.addend[: self.out_features] = bias

    def weight(self, rows: slice) -> torch.Tensor:
        """These rows of the weight [N, K] that was packed, exactly."""
        weight: torch.Tensor = self.packed.to_dense()[rows] if self.onednn else gemm.unpack(self.packed, rows)
        return weight.to(self.dtype)

    @property
    def plain(self) -> bool:
        """Is it one launch of our own kernel in the model's dtype, nothing else?"""
        if self.onednn or gemm.rows_dtype(self.packed) != self.dtype:
            return False
        return self.out_features == gemm.width_of(self.packed)

    def into(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """:meth:`forward` of a :attr:`plain` one, ``[T, K]`` into ``out`` [T, N], which may be ``residual``.

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
        kind = gemm.rows_dtype(self.packed)
        given, result = (torch.float32, torch.float32) if self.wide else (x.dtype, kind)
        width = self.addend.shape[0]
        addend = self.addend
        # Adding the residual costs nothing in the kernel, if no bias is added there.
        fused = residual is not None and self.bias is None and width == self.out_features
        if fused and residual is not None:
            addend = residual.to(kind).contiguous()
        out = torch.empty(x.shape[0], width, dtype=result)
        gemm.product(x.to(kind).contiguous(), self.packed, addend, out)
        if width != self.out_features:
            out = out[:, : self.out_features].contiguous()
        if residual is not None and not fused:
            out += residual
        return out.to(given)

    def extra_repr(self) -> str:
        """Sizes and the dtype of the packed weight, for ``print``."""
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
