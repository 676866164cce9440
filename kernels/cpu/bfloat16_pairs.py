"""SIMD code for CPUs with dot products of bfloat16 pairs (AVX512_BF16), as LLVM IR.

The instruction VDPBF16PS takes two vectors of PAIR_LANES pairs. To each of PAIR_LANES float32
accumulators it adds both products of two pairs. Products are exact, and sums are rounded to nearest;
denormal inputs and results count as zero. Source: Intel's "Intrinsics Guide", _mm512_dpbf16_ps.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

from .vectors import Vectors

PAIR_LANES = 16
PAIR_BYTES = 4 * PAIR_LANES  # of a vector of pairs, or of accumulators


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]  # llvmlite has no bfloat16 type
    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
_SUMS = ir.VectorType(ir.FloatType(), PAIR_LANES)
_PAIRS = ir.VectorType(ir.IntType(32), PAIR_LANES)
_HALVES = ir.VectorType(_BFloat(), 2 * PAIR_LANES)
# 2 ** f for 0 <= f <= 1, exact at both ends, lowest power first.
_EXP2_COEFFICIENTS = (1.0, 0.69556728, 0.22575819, 0.07867453)


def no_sums(count: int) -> list[Any]:
    """``count`` vectors of float32 accumulators, all zero."""
    return [_SUMS([0.0] * PAIR_LANES)] * count


def load_pairs(v: Vectors, where: Any) -> Any:
    """Load a vector of pairs."""
    return v.builder.load(v.pointer(where, _PAIRS), align=4)


def load_sums(v: Vectors, where: Any) -> Any:
    """Load a vector of float32 numbers."""
    return v.builder.load(v.pointer(where, _SUMS), align=4)


def store_pairs(v: Vectors, pairs: Any, where: Any) -> None:
    """Store a vector of pairs, or of float32 numbers."""
    pairs = v.builder.bitcast(pairs, _PAIRS)
    v.builder.store(pairs, v.pointer(where, _PAIRS), align=4)


def load_broadcast_pair(v: Vectors, where: Any) -> Any:
    """Load one pair into all lanes."""
    return v.broadcast(v.builder.load(v.pointer(where, _PAIRS.element), align=2), PAIR_LANES)


def dot(v: Vectors, total: Any, x: Any, y: Any) -> Any:
    """``total + x[0] * y[0] + x[1] * y[1]`` in each lane, for pairs ``x`` and ``y``."""
    kind = ir.FunctionType(_SUMS, [_SUMS, _HALVES, _HALVES])
    function = get_or_insert_function(v.builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return v.builder.call(function, [total, v.builder.bitcast(x, _HALVES), v.builder.bitcast(y, _HALVES)])


def fma(v: Vectors, x: Any, y: Any, z: Any) -> Any:
    """``x * y + z`` of float32 vectors."""
    kind = ir.FunctionType(_SUMS, [_SUMS] * 3)
    function = get_or_insert_function(v.builder.module, kind, f"llvm.fmuladd.v{PAIR_LANES}f32")
    return v.builder.call(function, [x, y, z])


def join_pairs(v: Vectors, first: Any, second: Any) -> Any:
    """Pairs made of two bfloat16 vectors, each given in the low halves of int32 lanes."""
    return v.builder.or_(first, v.builder.shl(second, _PAIRS([16] * PAIR_LANES)))


def pairs_of(v: Vectors, first: Any, second: Any) -> Any:
    """Pairs made of two float32 vectors, rounded to bfloat16 (to nearest, ties to even)."""
    kind = ir.FunctionType(_HALVES, [_SUMS] * 2)
    function = get_or_insert_function(v.builder.module, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
    halves = v.builder.bitcast(v.builder.call(function, [second, first]), ir.VectorType(ir.IntType(16), _HALVES.count))
    order = [lane + half * PAIR_LANES for lane in range(PAIR_LANES) for half in range(2)]
    joined = v.builder.shuffle_vector(halves, halves, ir.VectorType(ir.IntType(32), _HALVES.count)(order))
    return v.builder.bitcast(joined, _PAIRS)


def load_halves(v: Vectors, where: Any) -> Any:
    """Load PAIR_LANES bfloat16 numbers into the low halves of int32 lanes."""
    halves = ir.VectorType(ir.IntType(16), PAIR_LANES)
    return v.builder.zext(v.builder.load(v.pointer(where, halves), align=2), _PAIRS)


def store_rounded(v: Vectors, numbers: Any, where: Any) -> None:
    """Store float32 numbers, rounded to bfloat16 (to nearest, ties to even)."""
    halves = ir.VectorType(_HALVES.element, PAIR_LANES)
    function = get_or_insert_function(
        v.builder.module, ir.FunctionType(halves, [_SUMS]), "llvm.x86.avx512bf16.cvtneps2bf16.512"
    )
    v.builder.store(v.builder.call(function, [numbers]), v.pointer(where, halves), align=2)


def all_sums(number: float) -> Any:
    """A constant float32 vector with ``number`` in all lanes."""
    return _SUMS([number] * PAIR_LANES)


def exp2(v: Vectors, x: Any) -> Any:
    """``2 ** x`` for ``x`` <= 1, with a relative error of 1.2e-4, enough for bfloat16. 0 for -inf, NaN for NaN."""

    def call(name: str, first: Any, second: Any) -> Any:
        """An AVX-512 instruction over all lanes, with the rounding mode of the MXCSR register."""
        operands = [first, second, all_sums(0.0), ir.IntType(16)(-1), ir.IntType(32)(4)]
        kind = ir.FunctionType(_SUMS, [one.type for one in operands])
        function = get_or_insert_function(v.builder.module, kind, f"llvm.x86.avx512.mask.{name}.ps.512")
        return v.builder.call(function, operands)

    rest = call("reduce", x, ir.IntType(32)(1))  # x - floor(x); 0 for -inf
    power = all_sums(_EXP2_COEFFICIENTS[-1])
    for factor in reversed(_EXP2_COEFFICIENTS[:-1]):
        power = fma(v, power, rest, all_sums(factor))
    return call("scalef", power, x)  # power * 2 ** floor(x)
