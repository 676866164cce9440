"""Vector code written for LLVM by hand, for what its loop vectoriser can't do.

It keeps no two-dimensional block of sums in registers, transposes nothing and hesitates before
every ``exp``. A :class:`Vectors` writes such code inside a numba ``intrinsic``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

from .exponential import POWER_OF_TWO

LANES = 8  # float32 numbers in an AVX register; LLVM splits or joins them for other CPUs
BYTES = 4 * LANES
INT = ir.IntType(64)
WIDE = ir.VectorType(ir.FloatType(), LANES)
BITS = ir.VectorType(ir.IntType(32), LANES)

ROUND = 12582912.0  # 1.5 * 2**23: added to a small number, it leaves no bits behind the point
_LEAST = -127.0  # 2**-127 is written as zero

# Pairs of vectors (so far apart) exchange one, two, four numbers; only the last step crosses half a vector.
_EXCHANGES = (
    (1, [0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15]),
    (2, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
    (4, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
)


def all_lanes(number: float) -> Any:
    """A constant vector."""
    return WIDE([number] * LANES)


def _kinds(lanes: int) -> list[Any]:
    """Types of float32, of its bits and of bfloat16: vectors, or single numbers."""
    kinds = [ir.FloatType(), ir.IntType(32), ir.IntType(16)]
    return kinds if lanes == 1 else [ir.VectorType(kind, lanes) for kind in kinds]


def _same(kind: Any, number: int) -> Any:
    return kind([number] * kind.count) if isinstance(kind, ir.VectorType) else kind(number)


class Vectors:
    """Writes instructions at a builder's place. Addresses are int64 values, in bytes."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def at(self, base: Any, step: Any, count: Any) -> Any:
        """``base + step * count``, each a value or an int."""
        step, count = (INT(x) if isinstance(x, int) else x for x in (step, count))
        return self.builder.add(base, self.builder.mul(step, count))

    def pointer(self, where: Any, kind: Any) -> Any:
        return self.builder.inttoptr(where, kind.as_pointer())

    def load(self, where: Any, half: bool = False, lanes: int = LANES) -> Any:
        """A vector (one number if ``lanes`` is 1) of float32, widened from bfloat16 if ``half``."""
        wide, bits, halves = _kinds(lanes)
        if not half:
            return self.builder.load(self.pointer(where, wide), align=4)
        number = self.builder.zext(self.builder.load(self.pointer(where, halves), align=2), bits)
        return self.builder.bitcast(self.builder.shl(number, _same(bits, 16)), wide)

    def load_int(self, where: Any) -> Any:
        """One int64."""
        return self.builder.load(self.pointer(where, INT))

    def store(self, value: Any, where: Any, half: bool = False, lanes: int = LANES) -> None:
        """Counterpart of :meth:`load`; rounds to bfloat16 (to nearest, ties to even) if ``half``."""
        wide, bits, halves = _kinds(lanes)
        if not half:
            self.builder.store(value, self.pointer(where, wide), align=4)
            return
        builder, number = self.builder, self.builder.bitcast(value, bits)
        even = builder.and_(builder.lshr(number, _same(bits, 16)), _same(bits, 1))
        rounded = builder.lshr(builder.add(builder.add(number, _same(bits, 0x7FFF)), even), _same(bits, 16))
        builder.store(builder.trunc(rounded, halves), self.pointer(where, halves), align=2)

    def bits(self, value: Any) -> Any:
        """A vector of float32 seen as int32."""
        return self.builder.bitcast(value, BITS)

    def spread(self, number: Any, lanes: int = LANES) -> Any:
        """A number in all lanes."""
        undefined = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
        single = self.builder.insert_element(undefined, number, ir.IntType(32)(0))
        return self.builder.shuffle_vector(single, undefined, ir.VectorType(ir.IntType(32), lanes)([0] * lanes))

    def spread_from(self, where: Any) -> Any:
        return self.spread(self.load(where, lanes=1))

    def call(self, name: str, *operands: Any) -> Any:
        """LLVM's own function ``name`` of vectors."""
        kind = ir.FunctionType(WIDE, [WIDE] * len(operands))
        function = get_or_insert_function(self.builder.module, kind, f"llvm.{name}.v{LANES}f32")
        return self.builder.call(function, operands)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.call("fmuladd", x, y, z)

    def larger(self, x: Any, y: Any) -> Any:
        """``x > y ? x : y``: one instruction, and ``y`` where either is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def two_to_the(self, x: Any) -> Any:
        """``2 ** x`` for ``x`` <= 1; below -127 exactly 0; NaN stays NaN."""
        builder = self.builder
        x = self.larger(all_lanes(_LEAST), x)
        shifted = builder.fadd(x, all_lanes(ROUND + 127.0))  # low bits: the exponent, biased
        rest = builder.fsub(x, builder.fsub(shifted, all_lanes(ROUND + 127.0)))
        power = all_lanes(POWER_OF_TWO[-1])
        for factor in reversed(POWER_OF_TWO[:-1]):
            power = self.fma(power, rest, all_lanes(factor))
        exponent = builder.shl(self.bits(shifted), BITS([23] * LANES))
        return builder.fmul(power, builder.bitcast(exponent, WIDE))

    def tanh(self, x: Any) -> Any:
        """Right to 3e-7 of itself: near zero by its series, where ``1 - exp`` would lose digits."""
        builder = self.builder
        size, square = self.call("fabs", x), builder.fmul(x, x)
        small = self.two_to_the(builder.fmul(size, all_lanes(-2.8853900817779268)))  # exp(-2 |x|)
        far = builder.fdiv(builder.fsub(all_lanes(1.0), small), builder.fadd(all_lanes(1.0), small))
        series = all_lanes(-17 / 315)
        for factor in (2 / 15, -1 / 3):
            series = self.fma(series, square, all_lanes(factor))
        near = self.fma(builder.fmul(series, square), x, x)
        return builder.select(builder.fcmp_ordered("<", size, all_lanes(0.25)), near, self.call("copysign", far, x))

    def prefetch(self, where: Any) -> None:
        """Have the cache line at ``where`` in the L2 cache soon."""
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        self.builder.call(function, [self.pointer(where, ir.IntType(8)), i32(0), i32(2), i32(1)])

    def transposed(self, rows: Sequence[Any]) -> list[Any]:
        """LANES vectors as the columns of what they were the rows of."""
        shuffle = self.builder.shuffle_vector
        rows = list(rows)
        for apart, low, high in _EXCHANGES:
            following = list(rows)
            for i in range(LANES):
                if not i & apart:
                    x, y = rows[i], rows[i + apart]
                    following[i], following[i + apart] = shuffle(x, y, BITS(low)), shuffle(x, y, BITS(high))
            rows = following
        return rows

    def sums_of(self, rows: Sequence[Any]) -> Any:
        """One vector: lane ``i`` is the sum of all lanes of vector ``i`` of LANES."""
        shuffle, rows = self.builder.shuffle_vector, list(rows)
        for _, low, high in _EXCHANGES:
            rows = [
                self.builder.fadd(shuffle(x, y, BITS(low)), shuffle(x, y, BITS(high)))
                for x, y in zip(rows[::2], rows[1::2], strict=True)
            ]
        return rows[0]

    def largest_in_all(self, x: Any) -> Any:
        """The largest number of a vector, in all lanes."""
        for apart in (4, 2, 1):
            x = self.larger(x, self.builder.shuffle_vector(x, x, BITS([i ^ apart for i in range(LANES)])))
        return x

    def loop(self, count: Any, start: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]) -> list[Any]:
        """``state = body(i, state)`` for ``i`` below ``count`` (at least 1); returns the last state."""
        builder = self.builder
        before = builder.block
        inside, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(inside)
        builder.position_at_end(inside)
        i = builder.phi(INT)
        state = [builder.phi(x.type) for x in start]
        results = list(body(i, state))
        following, end = builder.add(i, INT(1)), builder.block
        for phi, first, result in zip([i, *state], [INT(0), *start], [following, *results], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(result, end)
        builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
        builder.position_at_end(after)
        return results


def generator(emit: Callable[..., None]) -> Any:
    """The code of a numba ``intrinsic`` without a result: ``emit(vectors, *values)`` writes it."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        emit(Vectors(builder), *values)
        return context.get_dummy_value()

    return generate
