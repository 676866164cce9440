"""How quantised weights are packed for the instructions of a CPU, and the LLVM IR of one step of a product."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

from trunkline.kernels.cpu.vectors import Vectors

SHORT_STEPS = 8  # of 4 inputs that int16 sums hold: 8 times two products of 15 and 127 are less than 2**15
WIDE_LANES = 16  # of AVX-512
_BYTE, _SHORT, _WORD = ir.IntType(8), ir.IntType(16), ir.IntType(32)


class Form(NamedTuple):
    """How codes are packed, and what multiplies them.

    A step multiplies ``inputs`` neighbouring inputs of a row, which fill 32 bits, by the codes of two vectors of
    ``lanes`` columns: 2 inputs as int16, or 4 as int8.

    ``instruction`` multiplies and adds: "madd" (VPMADDWD, for 2 inputs), "dot" (VPDPBUSD, for 4 inputs), "short"
    (VPMADDUBSW, for 4 inputs and codes of 4 bits: sums are int16, and added to int32 sums after :data:`SHORT_STEPS`
    steps); "" is plain LLVM IR, for any CPU.
    """

    lanes: int
    inputs: int
    instruction: str = ""

    @property
    def columns(self) -> int:
        """Columns of a panel."""
        return 2 * self.lanes

    @property
    def number_bytes(self) -> int:
        """Bytes of one number of a row."""
        return 4 // self.inputs

    def least_group(self, bits: int) -> int:
        """The size of which groups of inputs are multiples, for codes of ``bits`` bits. ValueError if it can't be."""
        if self.instruction == "short" and bits != 4:
            raise ValueError("int16 sums hold codes of 4 bits only")
        return self.inputs * (SHORT_STEPS if self.instruction == "short" else 1)

    def pack(self, codes: torch.Tensor, bits: int) -> torch.Tensor:
        """Pack ``codes`` uint8 [N, K], K a multiple of ``inputs``: [ceil(N / P), K / S, P · S · bits / 8].

        P columns of a panel, S inputs of a step. The last panel is filled up with zeros.
        """
        outputs, inputs = codes.shape
        panels = -(-outputs // self.columns)
        padded = codes.new_zeros(panels * self.columns, inputs)
        padded[:outputs] = codes
        steps = padded.view(panels, self.columns, -1, self.inputs).transpose(1, 2)
        steps = steps.reshape(panels, inputs // self.inputs, -1)
        if bits == 8:
            return steps.contiguous()
        low, high = steps.tensor_split(2, dim=2)
        return (low | high << 4).contiguous()

    def unpack(self, packed: torch.Tensor, bits: int, rows: slice) -> torch.Tensor:
        """Rows ``rows`` of the codes, uint8 [rows, K]."""
        first = rows.start // self.columns
        steps = packed[first : -(-rows.stop // self.columns)]
        if bits == 4:
            steps = torch.cat([steps & 15, steps >> 4], dim=2)
        panels = steps.view(len(steps), -1, self.columns, self.inputs).transpose(1, 2)
        codes = panels.reshape(len(steps) * self.columns, -1)
        return codes[rows.start - first * self.columns : rows.stop - first * self.columns]


@cache
def best_form(bits: int) -> Form:
    """The form for codes of 4 or 8 bits on this CPU."""
    has = llvm.get_host_cpu_features()
    if has.get("avx512vnni") and has.get("avx512vl"):
        return Form(WIDE_LANES, 4, "dot")
    if has.get("avxvnni"):
        return Form(8, 4, "dot")
    if has.get("avx2"):
        return Form(8, 4, "short") if bits == 4 else Form(8, 2, "madd")
    return Form(8, 2)


class Step:
    """Emits the products of one step, for codes of ``bits`` bits. Sums are one vector for each row and half a panel."""

    def __init__(self, v: Vectors, form: Form, bits: int) -> None:
        self.v, self.form, self.bits = v, form, bits
        self.words = ir.VectorType(_WORD, form.lanes)
        numbers = form.lanes * form.inputs
        self.flat = ir.VectorType(_SHORT if form.inputs == 2 else _BYTE, numbers)
        self.shorts = ir.VectorType(_SHORT, 2 * form.lanes)

    def load_codes(self, where: Any) -> list[Any]:
        """A step's codes as two vectors. Codes of 4 bits share bytes: the second vector has the high ones."""
        builder, count = self.v.builder, self.form.lanes * self.form.inputs
        kind = ir.VectorType(_BYTE, count)
        if self.bits == 8:
            both = [builder.load(self.v.pointer(self.v.at(where, count, i), kind), align=1) for i in range(2)]
        else:
            one = builder.load(self.v.pointer(where, kind), align=1)
            both = [builder.and_(one, kind([15] * count)), builder.lshr(one, kind([4] * count))]
        return [builder.zext(codes, self.flat) for codes in both] if self.form.inputs == 2 else both

    def load_subgroup(self, where: Any) -> list[tuple[Any, Any]]:
        """The multipliers and the offsets of the codes in both vectors, see :meth:`expand` and :meth:`widened`."""
        # A multiplier fills 16 bits, which hold one or two codes; an offset as many as a code. Where int16 sums are
        # multiplied, an offset fills 32 bits: it is multiplied once for all of them.
        summed = self.form.instruction == "short"
        sizes, kinds = (2, 4 if summed else self.form.number_bytes), (self.shorts, self.shorts if summed else self.flat)
        return [
            (self._spread(where, i, sizes[0], kinds[0]), self._spread(where, 2 + i, sizes[1], kinds[1]))
            for i in range(2)
        ]

    def _spread(self, where: Any, index: int, size: int, kind: Any) -> Any:
        """Load one byte for each column, and repeat it in the column's 32 bits, in numbers of ``size`` bytes."""
        builder, lanes = self.v.builder, self.form.lanes
        columns = ir.VectorType(_BYTE, lanes)
        loaded = builder.load(self.v.pointer(self.v.at(where, lanes, index), columns), align=1)
        order = [lane if byte % size == 0 else lanes for lane in range(lanes) for byte in range(4)]  # lanes: a zero
        repeated = builder.shuffle_vector(loaded, columns([0] * lanes), ir.VectorType(_WORD, 4 * lanes)(order))
        return builder.bitcast(repeated, kind)

    def expand(self, codes: Any, multipliers: Any, offsets: Any) -> Any:
        """The codes of 8 bits that codes of 4 bits stand for. Products don't carry into a neighbour: they are bytes."""
        builder = self.v.builder
        product = builder.mul(builder.bitcast(codes, self.shorts), multipliers)
        return builder.add(builder.bitcast(product, self.flat), offsets)

    def store_expanded(self, where: Any, subgroup: list[tuple[Any, Any]], target: Any) -> None:
        """Write the codes of 8 bits for which a step's codes at ``where`` stand."""
        size = self.form.lanes * self.form.inputs
        kind = ir.VectorType(_BYTE, size)
        for i, (half, integers) in enumerate(zip(self.load_codes(where), subgroup, strict=True)):
            expanded = self.expand(half, *integers)
            codes = self.v.builder.trunc(expanded, kind) if self.form.inputs == 2 else expanded
            self.v.builder.store(codes, self.v.pointer(self.v.at(target, size, i), kind), align=1)

    def load_numbers(self, where: Any) -> Any:
        """One row's inputs of a step, in every lane."""
        number = self.v.builder.load(self.v.pointer(where, _WORD), align=2)
        return self.v.builder.bitcast(self.v.broadcast(number, self.form.lanes), self.flat)

    def load_word(self, where: Any) -> Any:
        """One int32, in every lane."""
        return self.v.broadcast(self.v.builder.load(self.v.pointer(where, _WORD), align=4), self.form.lanes)

    def add(self, total: Any, codes: Any, numbers: Any) -> Any:
        """``total`` plus, in each column, the products of the step's inputs."""
        builder, size = self.v.builder, 32 * self.form.lanes
        if self.form.instruction == "madd":
            return builder.add(total, self._call(_MADD[size], self.words, codes, numbers))
        if self.form.instruction == "dot":
            # Before version 22, LLVM declares bytes as words; since then it takes both.
            words = [builder.bitcast(one, self.words) for one in (codes, numbers)]
            return self._call(f"llvm.x86.avx512.vpdpbusd.{size}", self.words, total, *words)
        if self.form.instruction == "short":
            return builder.add(total, self._call("llvm.x86.avx2.pmadd.ub.sw", self.shorts, codes, numbers))
        for j in range(self.form.inputs):
            order = self.words([self.form.inputs * lane + j for lane in range(self.form.lanes)])
            code, number = (builder.shuffle_vector(one, one, order) for one in (codes, numbers))
            product = builder.mul(builder.zext(code, self.words), builder.sext(number, self.words))
            total = builder.add(total, product)
        return total

    def widened(self, total: Any, shorts: Any, factors: Any = None) -> Any:
        """``total`` plus the two int16 sums of each column, times int16 ``factors``."""
        factors = self.shorts([1] * self.shorts.count) if factors is None else factors
        return self.v.builder.add(total, self._call(_MADD[32 * self.form.lanes], self.words, shorts, factors))

    def _call(self, name: str, result: Any, *operands: Any) -> Any:
        kind = ir.FunctionType(result, [one.type for one in operands])
        return self.v.builder.call(get_or_insert_function(self.v.builder.module, kind, name), operands)


_MADD = {256: "llvm.x86.avx2.pmadd.wd", 512: "llvm.x86.avx512.pmaddw.d.512"}  # by the bits of a vector
