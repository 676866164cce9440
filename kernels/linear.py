"""Linear layers. On a CPU their weights are packed once, at load time, into the layout that the GEMM kernel reads."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from trunkline.kernels.cpu import gemm
from trunkline.kernels.cpu.processor import has_bfloat16, has_bfloat16_pairs


class LinearLayer(nn.Module, ABC):
    """``x Wᵀ + b``, W [N, K] and b [N]: what replaces ``nn.Linear``, with the weight stored as the kernel reads it.

    Constructors take (weight [N, K], bias [N] or None, ``float32_out`` = False). With ``float32_out``, :meth:`forward`
    returns float32, with unrounded sums where the kernel can.
    """

    in_features: int
    out_features: int
    bias: torch.Tensor | None

    @abstractmethod
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., K] -> ``x Wᵀ + bias + residual`` [..., N], of ``x``'s dtype unless ``float32_out``.

        ``residual`` [..., N] has ``x``'s dtype and isn't changed.
        """

    @abstractmethod
    def set_bias(self, bias: torch.Tensor | None) -> None:
        """Replace the bias [N]; None for no bias."""

    @abstractmethod
    def weight(self, rows: slice) -> torch.Tensor:
        """Rows ``rows`` of the weight [N, K], with exactly the values that the constructor was given, unless the class
        says that it stores others."""

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., K] as [M, K]; ValueError if it has another width."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"rows must have {self.in_features} numbers, not {x.shape[-1]}")
        return x.reshape(-1, self.in_features)

    @property
    def recordable(self) -> bool:
        """Whether a forward pass only launches our own kernels, in the model's dtype, so that it can be recorded.

        The number of rows is then their argument ``rows``, their scratch memory is that of :mod:`.cpu.launches.memory`,
        and several threads may run them at once, each as a team of its own for other rows.
        """
        return False

    @property
    def launches(self) -> int:
        """How many launches :meth:`forward_into` has, each of which needs the one before.

        They share one piece of scratch memory of each kind. 0 if that isn't known: then it can't run together with
        others.
        """
        return 0

    def forward_into(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """:meth:`forward` of a :attr:`recordable` layer: ``x`` [T, K] -> ``out`` [T, N], which may be ``residual``.

        With a residual [T, N], the bias isn't added. All are contiguous and of the weight's dtype; ValueError
        otherwise.
        """
        raise NotImplementedError


class PlainLinear(LinearLayer):
    """torch's product, for every device and dtype. The weight isn't copied."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, float32_out: bool = False) -> None:
        """``weight`` [N, K] and ``bias`` [N] of one dtype, to which sums are rounded, with ``float32_out`` too."""
        super().__init__()
        self.float32_out = float32_out
        self.out_features, self.in_features = weight.shape
        self.matrix = weight.detach()
        self.set_bias(bias)

    def set_bias(self, bias: torch.Tensor | None) -> None:
        """Replace the bias [N]; None for no bias."""
        self.bias = None if bias is None else bias.detach()

    def weight(self, rows: slice) -> torch.Tensor:
        """Rows ``rows`` of the weight [N, K], not copied."""
        return self.matrix[rows]

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """:func:`linear_reference`, in float32 if ``float32_out``."""
        out = linear_reference(x, self.matrix, self.bias, residual)
        return out.float() if self.float32_out else out

    def extra_repr(self) -> str:
        """Sizes and the dtype of the weight, for ``print``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.matrix.dtype}"


class PackedLinear(LinearLayer):
    """A linear layer on a CPU, which holds its own packed copy of the weight.

    Which kernel multiplies, by the weight's dtype and the CPU:

    * bfloat16, with AVX512_BF16 but without AMX, K even: :mod:`.cpu.gemm` in bfloat16;
    * bfloat16, with another bfloat16 unit (AMX, or Arm's): oneDNN, with its own packed layout;
    * all else: :mod:`.cpu.gemm` in float32, over weights that are stored as bfloat16 if all of them are
      exactly representable there.
    """

    uses_onednn = True  # where it is faster; its results for a row may depend on the other rows

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, float32_out: bool = False) -> None:
        """Pack ``weight`` [N, K], with ``bias`` [N], both on the CPU, float32 or bfloat16.

        ``float32_out``: :meth:`forward` returns the float32 sums without rounding them to the weight's
        dtype. oneDNN's results stay in the weight's dtype.
        """
        super().__init__()
        self.float32_out = float32_out
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        pairs = weight.dtype == torch.bfloat16 and self.in_features % 2 == 0 and has_bfloat16_pairs()
        self.onednn = self.uses_onednn and weight.dtype == torch.bfloat16 and not pairs and has_bfloat16()
        if self.onednn:
            # 16 is the number of rows to optimise for: near the best for any number of rows. 1 isn't.
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        elif pairs:
            self.packed = gemm.pack_pairs(weight.contiguous())
        else:
            self.packed = gemm.pack(weight, storage_dtype(weight))
        self.set_bias(bias)

    def set_bias(self, bias: torch.Tensor | None) -> None:
        """Replace the bias [N]; None for no bias."""
        self.bias = None if bias is None else bias.detach()
        self.addend = torch.zeros(0)
        if not self.onednn:
            self.addend = torch.zeros(gemm.width_of(self.packed), dtype=gemm.rows_dtype(self.packed))
            if bias is not None:
                self.addend[: self.out_features] = bias

    def weight(self, rows: slice) -> torch.Tensor:
        """Rows ``rows`` of the weight [N, K], unpacked."""
        weight: torch.Tensor = self.packed.to_dense()[rows] if self.onednn else gemm.unpack(self.packed, rows)
        return weight.to(self.dtype)

    @property
    def recordable(self) -> bool:
        """Whether the product is one launch of our own kernel in the model's dtype, without padding."""
        if self.onednn or gemm.rows_dtype(self.packed) != self.dtype:
            return False
        return self.out_features == gemm.width_of(self.packed)

    @property
    def launches(self) -> int:
        """One."""
        return 1

    def forward_into(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """One launch; ValueError for tensors that aren't contiguous or don't fit."""
        gemm.product(x, self.packed, self.addend if residual is None else residual, out)
        return out

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., K] -> [..., N]; ValueError for another K. The kernel adds a residual if there is no bias."""
        flat = self.rows(x)
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
        given, result = (torch.float32, torch.float32) if self.float32_out else (x.dtype, kind)
        width = self.addend.shape[0]
        addend = self.addend
        # The kernel's epilogue adds one tensor at no cost: the residual, if there is no bias.
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
    """What a :class:`LinearLayer` computes: ``x`` [..., K], ``weight`` [N, K], ``bias`` [N] and ``residual`` [..., N].

    All of one float dtype, which is the result's.
    """
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def storage_dtype(weight: torch.Tensor) -> torch.dtype:
    """bfloat16 if every number of ``weight`` [N, K] is exactly representable in it, else float32."""
    if weight.dtype == torch.bfloat16:
        return torch.bfloat16
    # 4 Mi numbers at a time, to bound the temporary memory.
    for rows in torch.split(weight, max(1, (1 << 22) // weight.shape[1])):
        if not torch.equal(rows.to(torch.bfloat16).to(rows.dtype), rows):
            return torch.float32
    return torch.bfloat16
