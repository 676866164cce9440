"""Linear layers with quantised weights, on a CPU: rows are quantised to int8 when they are multiplied."""

from __future__ import annotations

import torch

from trunkline.kernels.cpu.quantized.codes import Form, best_form
from trunkline.kernels.cpu.quantized.gemm import PackedCodes, product
from trunkline.kernels.cpu.quantized.rows import quantize_rows_reference
from trunkline.kernels.linear import LinearLayer

from .subgroups import LARGEST_CODE, SUBGROUP, Subgroups, expand
from .weight import QuantizedWeight, dequantize

LARGEST_GROUP = 1 << 16  # inputs: as many products of 255 and 127 fit into an int32


class QuantizedLinear(LinearLayer):
    """A linear layer on a CPU that holds a packed copy of a :class:`.QuantizedWeight`.

    Each row is quantised to int8, with a scale for each of the weight's groups of inputs. Products are added as exact
    integers within a group, and in the order of the groups: the result for a row doesn't depend on the other rows.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        dtype: torch.dtype,
        bias: torch.Tensor | None = None,
        form: Form | None = None,
    ) -> None:
        """Pack ``weight`` [N, K] for rows and results of ``dtype``, float32 or bfloat16, and ``bias`` [N].

        ``form``: how codes are packed, by default the best for this CPU. ValueError for groups or codes that it can't
        hold, and for an order that isn't a permutation.
        """
        super().__init__()
        self.dtype = dtype
        self.out_features, self.in_features = weight.codes.shape
        form = form or best_form(weight.bits)
        if weight.group % form.least_group(weight.bits) or self.in_features % weight.group:
            raise ValueError(f"{self.in_features} inputs in groups of {weight.group} don't fit; take groups of 32")
        if weight.group > LARGEST_GROUP:
            raise ValueError(f"groups have up to {LARGEST_GROUP} inputs, not {weight.group}: sums are int32")
        if int(weight.codes.max()) >> weight.bits:
            raise ValueError(f"codes have up to {weight.bits} bits, not {int(weight.codes.max())}")
        if weight.subgroups is not None:
            _check_subgroups(weight, weight.subgroups)
        order = None if weight.order is None else weight.order.to(torch.int32).contiguous()
        if order is not None and not torch.equal(order.sort().values, torch.arange(self.in_features)):
            raise ValueError(f"the order must have each of the {self.in_features} inputs once")
        panels = -(-self.out_features // form.columns)

        def by_panel(values: torch.Tensor) -> torch.Tensor:
            padded = values.new_zeros(panels * form.columns, values.shape[1])
            padded[: len(values)] = values
            return padded.view(panels, form.columns, -1).transpose(1, 2).contiguous()

        none = torch.empty(0)
        subgroups = none if weight.subgroups is None else torch.stack([by_panel(each) for each in weight.subgroups], 2)
        factors = torch.zeros(panels * form.columns)
        factors[: self.out_features] = weight.factors
        self.packed = PackedCodes(
            form=form,
            bits=weight.bits,
            group=weight.group,
            inputs=self.in_features,
            zero=weight.zero,
            codes=form.pack(weight.codes, weight.bits),
            factors=factors,
            scales=by_panel(weight.scales),
            minima=none if weight.minima is None else by_panel(weight.minima),
            subgroups=subgroups,
            order=order,
        )
        self.set_bias(bias)

    def set_bias(self, bias: torch.Tensor | None) -> None:
        """Replace the bias [N]; None for no bias."""
        self.bias = None if bias is None else bias.detach()
        self.addend = torch.zeros(self.packed.width, dtype=self.dtype)
        if bias is not None:
            self.addend[: self.out_features] = bias

    def weight(self, rows: slice) -> torch.Tensor:
        """Rows ``rows`` of the quantised weight, as numbers of the layer's dtype."""
        packed, columns = self.packed, self.packed.form.columns
        codes = packed.form.unpack(packed.codes, packed.bits, rows)

        def of_rows(values: torch.Tensor) -> torch.Tensor:
            return values.transpose(1, 2).reshape(len(values) * columns, -1)[rows]

        minima = of_rows(packed.minima) if len(packed.minima) else None
        if len(packed.subgroups):
            codes = expand(codes, Subgroups(*(of_rows(each) for each in packed.subgroups.unbind(2))))
        numbers = dequantize(codes, packed.factors[rows], of_rows(packed.scales), minima, packed.zero, packed.order)
        return numbers.to(self.dtype)

    @property
    def recordable(self) -> bool:
        """Whether the width is a whole number of panels: then a forward pass is two launches of our kernels."""
        return self.out_features == self.packed.width

    @property
    def launches(self) -> int:
        """Two: rows are quantised first."""
        return 2

    def forward_into(self, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Two launches; ValueError for tensors that aren't contiguous or don't fit."""
        product(x, self.packed, self.addend if residual is None else residual, out)
        return out

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., K] -> [..., N]; ValueError for another K. The kernel adds a residual if there is no bias."""
        flat = self.rows(x).contiguous()
        added = None if residual is None else residual.reshape(-1, self.out_features)
        fused = added is not None and self.bias is None and self.recordable
        addend = added.to(self.dtype).contiguous() if fused and added is not None else self.addend
        out = torch.empty(flat.shape[0], self.packed.width, dtype=self.dtype)
        product(flat, self.packed, addend, out)
        if not self.recordable:
            out = out[:, : self.out_features].contiguous()
        if added is not None and not fused:
            out += added
        return out if x.ndim == 2 else out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and the number format of the weight, for ``print``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bits={self.packed.bits}, group={self.packed.group}"


def _check_subgroups(weight: QuantizedWeight, subgroups: Subgroups) -> None:
    """ValueError for subgroups that a layer can't hold."""
    outputs, inputs = weight.codes.shape
    if weight.bits != 4 or weight.minima is not None or weight.group % SUBGROUP:
        raise ValueError(
            f"subgroups have codes of 4 bits, no minima, and lie in groups of a multiple of {SUBGROUP} inputs"
        )
    for values in subgroups:
        if values.dtype != torch.uint8 or values.shape != (outputs, inputs // SUBGROUP):
            raise ValueError(f"multipliers and offsets are uint8 [{outputs}, {inputs // SUBGROUP}]")
    if int((LARGEST_CODE * subgroups.multipliers.int() + subgroups.offsets).max()) > 255:
        raise ValueError(f"multipliers and offsets make codes of more than 255 from {LARGEST_CODE}")


def quantized_linear_reference(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """What a :class:`QuantizedLinear` computes, in float64: ``x`` [M, K] -> [M, N], of ``x``'s dtype."""
    order = slice(None) if weight.order is None else weight.order
    numbers, scales = quantize_rows_reference(x[:, order], weight.group)
    rows = numbers * scales.double().repeat_interleave(weight.group, 1)
    out = rows @ weight.numbers()[:, order].double().t()
    for added in (bias, residual):
        if added is not None:
            out = out + added.double()
    return out.to(x.dtype)
