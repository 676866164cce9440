"""SIMD code as LLVM IR, for what LLVM's loop vectoriser can't do.

The vectoriser doesn't keep a two-dimensional block of accumulators in registers, doesn't transpose, and
doesn't vectorise ``exp``. A :class:`Vectors` emits such code inside a numba ``intrinsic``.

A *lane* is one element of a vector register.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

from .exponential import EXP2_COEFFICIENTS

LANES = 8  # float32 lanes of an AVX register; LLVM splits the vectors for CPUs with narrower registers
BYTES = 4 * LANES  # of a vector
INT = ir.IntType(64)
WIDE = ir.VectorType(ir.FloatType(), LANES)
BITS = ir.VectorType(ir.IntType(32), LANES)

ROUND = 12582912.0  # 1.5 * 2**23: adding it to a small float32 rounds that to an integer
_LEAST = -127.0  # the result of 2**-127 is zero

# Steps of the 8 x 8 transpose: the distance between the two rows of a pair, and the shuffles that make the
# pair's new rows. Only the last step moves numbers between the two 128-bit halves of a register.
_EXCHANGES = (
    (1, [0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15]),
    (2, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
    (4, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
)


def all_lanes(number: float) -> Any:
    """A constant vector with ``number`` in all lanes."""
    return WIDE([number] * LANES)


def _kinds(lanes: int) -> list[Any]:
    """The LLVM types float32, int32 and int16: as vectors, or scalars for one lane."""
    kinds = [ir.FloatType(), ir.IntType(32), ir.IntType(16)]
    return kinds if lanes == 1 else [ir.VectorType(kind, lanes) for kind in kinds]


def _same(kind: Any, number: int) -> Any:
    return kind([number] * kind.count) if isinstance(kind, ir.VectorType) else kind(number)


class Vectors:
    """Emits instructions at the position of an LLVM builder. Addresses are int64 values, in bytes."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def at(self, base: Any, step: Any, count: Any) -> Any:
        """The address ``base + step * count``; ``step`` and ``count`` are LLVM values or ints."""
        step, count = (INT(x) if isinstance(x, int) else x for x in (step, count))
        return self.builder.add(base, self.builder.mul(step, count))

    def pointer(self, where: Any, kind: Any) -> Any:
        return self.builder.inttoptr(where, kind.as_pointer())

    def load(self, where: Any, bf16: bool = False, lanes: int = LANES) -> Any:
        """Load float32 numbers, or bfloat16 ones as float32 if ``bf16``: a vector, or a scalar for one lane."""
        wide, bits, halves = _kinds(lanes)
        if not bf16:
            return self.builder.load(self.pointer(where, wide), align=4)
        number = self.builder.zext(self.builder.load(self.pointer(where, halves), align=2), bits)
        return self.builder.bitcast(self.builder.shl(number, _same(bits, 16)), wide)

    def load_int8(self, where: Any, lanes: int = LANES) -> Any:
        """Load int8 numbers as float32: a vector, or a scalar for one lane."""
        narrow = ir.IntType(8) if lanes == 1 else ir.VectorType(ir.IntType(8), lanes)
        wide, bits, _ = _kinds(lanes)
        number = self.builder.load(self.pointer(where, narrow), align=1)
        return self.builder.sitofp(self.builder.sext(number, bits), wide)

    def load_int(self, where: Any) -> Any:
        """Load one int64."""
        return self.builder.load(self.pointer(where, INT))

    def store(self, value: Any, where: Any, bf16: bool = False, lanes: int = LANES) -> None:
        """The counterpart of :meth:`load`; rounds to bfloat16 (to nearest, ties to even) if ``bf16``."""
        wide, bits, halves = _kinds(lanes)
        if not bf16:
            self.builder.store(value, self.pointer(where, wide), align=4)
            return
        builder, number = self.builder, self.builder.bitcast(value, bits)
        even = builder.and_(builder.lshr(number, _same(bits, 16)), _same(bits, 1))
        rounded = builder.lshr(builder.add(builder.add(number, _same(bits, 0x7FFF)), even), _same(bits, 16))
        builder.store(builder.trunc(rounded, halves), self.pointer(where, halves), align=2)

    def bits(self, value: Any) -> Any:
        """The bits of a float32 vector, as int32."""
        return self.builder.bitcast(value, BITS)

    def broadcast(self, number: Any, lanes: int = LANES) -> Any:
        """A vector with ``number`` in all lanes."""
        undefined = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
        single = self.builder.insert_element(undefined, number, ir.IntType(32)(0))
        return self.builder.shuffle_vector(single, undefined, ir.VectorType(ir.IntType(32), lanes)([0] * lanes))

    def load_broadcast(self, where: Any) -> Any:
        """Load one float32 into all lanes."""
        return self.broadcast(self.load(where, lanes=1))

    def call(self, name: str, *operands: Any) -> Any:
        """Call the LLVM intrinsic ``name`` with float32 vectors."""
        kind = ir.FunctionType(WIDE, [WIDE] * len(operands))
        function = get_or_insert_function(self.builder.module, kind, f"llvm.{name}.v{LANES}f32")
        return self.builder.call(function, operands)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """``x * y + z``, fused on CPUs with FMA."""
        return self.call("fmuladd", x, y, z)

    def maximum(self, x: Any, y: Any) -> Any:
        """``x > y ? x : y``, which is one instruction on x86; the result is ``y`` where either is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def exp2(self, x: Any) -> Any:
        """``2 ** x`` for ``x`` <= 1; below -127 exactly 0; NaN stays NaN."""
        builder = self.builder
        x = self.maximum(all_lanes(_LEAST), x)
        shifted = builder.fadd(x, all_lanes(ROUND + 127.0))  # low bits: the exponent, biased
        rest = builder.fsub(x, builder.fsub(shifted, all_lanes(ROUND + 127.0)))
        power = all_lanes(EXP2_COEFFICIENTS[-1])
        for factor in reversed(EXP2_COEFFICIENTS[:-1]):
            power = self.fma(power, rest, all_lanes(factor))
        exponent = builder.shl(self.bits(shifted), BITS([23] * LANES))
        return builder.fmul(power, builder.bitcast(exponent, WIDE))

    def tanh(self, x: Any) -> Any:
        """``tanh(x)`` with a relative error of 3e-7. Near zero, where ``1 - exp`` cancels, it is the Taylor series."""
        builder = self.builder
        size, square = self.call("fabs", x), builder.fmul(x, x)
        small = self.exp2(builder.fmul(size, all_lanes(-2.8853900817779268)))  # exp(-2 |x|)
        far = builder.fdiv(builder.fsub(all_lanes(1.0), small), builder.fadd(all_lanes(1.0), small))
        series = all_lanes(-17 / 315)
        for factor in (2 / 15, -1 / 3):
            series = self.fma(series, square, all_lanes(factor))
        near = self.fma(builder.fmul(series, square), x, x)
        return builder.select(builder.fcmp_ordered("<", size, all_lanes(0.25)), near, self.call("copysign", far, x))

    def prefetch(self, where: Any) -> None:
        """Prefetch the cache line at ``where`` into the L2 cache."""
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        self.builder.call(function, [self.pointer(where, ir.IntType(8)), i32(0), i32(2), i32(1)])

    def transposed(self, rows: Sequence[Any]) -> list[Any]:
        """The transpose of LANES vectors: row ``i`` of the result has lane ``i`` of each of ``rows``."""
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

    def sum_each(self, rows: Sequence[Any]) -> Any:
        """One vector, whose lane ``i`` is the sum over the lanes of vector ``i``; ``rows`` are LANES vectors."""
        shuffle, rows = self.builder.shuffle_vector, list(rows)
        for _, low, high in _EXCHANGES:
            rows = [
                self.builder.fadd(shuffle(x, y, BITS(low)), shuffle(x, y, BITS(high)))
                for x, y in zip(rows[::2], rows[1::2], strict=True)
            ]
        return rows[0]

    def max_across_lanes(self, x: Any) -> Any:
        """The largest lane of ``x``, in all lanes."""
        for apart in (4, 2, 1):
            x = self.maximum(x, self.builder.shuffle_vector(x, x, BITS([i ^ apart for i in range(LANES)])))
        return x

    def chosen(self, condition: Any, then: Callable[[], Sequence[Any]], otherwise: Sequence[Any]) -> list[Any]:
        """The values that ``then`` emits, which runs only if ``condition``, else the constants ``otherwise``."""
        builder = self.builder
        before = builder.block
        with builder.if_then(condition):
            values, inside = list(then()), builder.block
        result = []
        for value, other in zip(values, otherwise, strict=True):
            phi = builder.phi(value.type)
            phi.add_incoming(value, inside)
            phi.add_incoming(other, before)
            result.append(phi)
        return result

    def loop(self, count: Any, start: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]) -> list[Any]:
        """Emit a loop: ``state = body(i, state)`` for ``i`` in ``range(count)``, which must not be empty.

        Returns the last state. The loop-carried values stay in registers.
        """
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
    """The code generator of a numba ``intrinsic`` without a result; ``emit(vectors, *values)`` emits its body."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        emit(Vectors(builder), *values)
        return context.get_dummy_value()

    return generate
