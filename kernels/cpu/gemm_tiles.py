"""The microkernels of :mod:`.gemm`: tiles of a few rows of one panel, with all accumulators in registers.

They are LLVM IR, because LLVM's vectoriser doesn't keep a two-dimensional block of accumulators in
registers. A tile computes ``out[r] = addend[r] + sum over k of x[r, k] * weight[k]`` for its rows r, all
columns of the panel and a range of k. It is an intrinsic over addresses and row lengths in bytes, see
``_tile``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import njit, types
from numba.extending import intrinsic

from .bfloat16_pairs import (
    PAIR_BYTES,
    PAIR_LANES,
    dot,
    load_broadcast_pair,
    load_pairs,
    load_sums,
    no_sums,
    store_pairs,
    store_rounded,
)
from .threads import OPTIONS
from .vectors import INT, LANES, Vectors, all_lanes, generator

CACHE_LINE = 64  # bytes
FLOAT_PANEL = 2 * LANES  # columns; 6 rows take 12 of AVX's 16 registers as accumulators
PAIR_PANEL = 2 * PAIR_LANES  # columns; 12 rows take 24 of AVX-512's 32 registers
CONTINUE, FINISH = 1, 2  # flags of a panel


class Numbers(NamedTuple):
    """How a tile loads, multiplies and stores the numbers of some dtypes. A panel is two vectors wide.

    One step of a tile multiplies one input of each row, or a pair of neighbouring inputs, by the weights of
    all columns. A tuple of functions, because :func:`.objects.fingerprint` must be able to identify it.
    """

    x: int  # bytes of one number of ``x`` and of ``addend``
    out: int  # bytes of one result
    step_bytes: int  # bytes of the weights that one step reads
    columns: int  # of a panel
    pairs: int  # 1 if a step takes two inputs, else 0
    zeros: Callable[[int], list[Any]]  # (number of vectors)
    weights: Callable[[Vectors, Any], Any]  # (vectors, address)
    factor: Callable[[Vectors, Any], Any]  # (vectors, address): one row's input or pair, in all lanes
    multiply: Callable[[Vectors, Any, Any, Any], Any]  # (vectors, sum, factor, weights)
    addend: Callable[[Vectors, Any], Any]  # (vectors, address)
    store: Callable[[Vectors, Any, Any], None]  # (vectors, results, address)
    load_sums: Callable[[Vectors, Any], Any]  # (vectors, address)
    store_sums: Callable[[Vectors, Any, Any], None]  # (vectors, sums, address)

    @property
    def weight_row(self) -> int:
        """Bytes of the weights of one input."""
        return self.step_bytes >> self.pairs


def float_panel(bf16: bool) -> Any:
    """Compiled ``panel(a, x, x_row, weight, inputs, first, last, column, sums, kind)``, in float32.

    It multiplies ``inputs`` inputs of the rows ``[first, last)`` by a part of one panel. ``a``:
    :class:`.gemm.Arguments`. ``x`` is the address of the first row's first input, ``x_row`` bytes from row to row,
    ``weight`` the address of that input's weights, ``column`` the panel's first output column.

    ``kind`` is a sum of flags. CONTINUE: the sums begin with those in ``sums`` [rows, columns of a panel] float32.
    FINISH: results are written to ``out``; otherwise the sums are written to ``sums``. Weights are stored as
    bfloat16 if ``bf16``.
    """
    numbers = Numbers(
        x=4,
        out=4,
        step_bytes=FLOAT_PANEL * (2 if bf16 else 4),
        columns=FLOAT_PANEL,
        pairs=0,
        zeros=lambda count: [all_lanes(0.0)] * count,
        weights=lambda v, where: v.load(where, bf16),
        factor=Vectors.load_broadcast,
        multiply=lambda v, total, factor, weights: v.fma(factor, weights, total),
        addend=Vectors.load,
        store=Vectors.store,
        load_sums=Vectors.load,
        store_sums=Vectors.store,
    )
    return _panel(numbers, 6, 4)


def pair_panel(float32_out: bool) -> Any:
    """As :func:`float_panel`, for bfloat16 rows and weights, with float32 accumulators (AVX512_BF16).

    Results are bfloat16, or float32 if ``float32_out``.
    """
    numbers = Numbers(
        x=2,
        out=4 if float32_out else 2,
        step_bytes=2 * PAIR_BYTES,
        columns=PAIR_PANEL,
        pairs=1,
        zeros=no_sums,
        weights=load_pairs,
        factor=load_broadcast_pair,
        multiply=dot,
        addend=lambda v, where: v.load(where, True, PAIR_LANES),
        store=store_pairs if float32_out else store_rounded,
        load_sums=load_sums,
        store_sums=store_pairs,
    )
    return _panel(numbers, 12, 8)


def _panel(numbers: Numbers, max_rows: int, fewer_rows: int) -> Any:
    """The compiled panel: rows are divided into tiles of ``max_rows``, ``fewer_rows``, 4, 2 and 1 rows.

    8 rows are 4 + 4, not 6 + 2: small tiles use the registers less well.
    """
    tile_max, tile_fewer, tile4, tile2, tile1 = (_tile(rows, numbers) for rows in (max_rows, fewer_rows, 4, 2, 1))
    x_size, out_size, sums_row, weight_row = numbers.x, numbers.out, 4 * numbers.columns, numbers.weight_row

    def panel(
        a: Any, x: int, x_row: int, weight: int, inputs: int, first: int, last: int, column: int, sums: int, kind: int
    ) -> None:
        next_panel, out_row, addend_row = a.inputs * weight_row, a.outputs * out_size, a.addend_row * x_size
        m = first
        while m < last:
            out = a.out + m * out_row + column * out_size
            addend, left = a.addend + m * addend_row + column * x_size, last - m
            if left >= max_rows and left != 8:
                tile_max(x, weight, addend, out, sums, inputs, next_panel, x_row, addend_row, out_row, kind)
                rows = max_rows
            elif left >= fewer_rows:
                tile_fewer(x, weight, addend, out, sums, inputs, next_panel, x_row, addend_row, out_row, kind)
                rows = fewer_rows
            elif left >= 4:
                tile4(x, weight, addend, out, sums, inputs, next_panel, x_row, addend_row, out_row, kind)
                rows = 4
            elif left >= 2:
                tile2(x, weight, addend, out, sums, inputs, next_panel, x_row, addend_row, out_row, kind)
                rows = 2
            else:
                tile1(x, weight, addend, out, sums, inputs, next_panel, x_row, addend_row, out_row, kind)
                rows = 1
            m, x, sums = m + rows, x + rows * x_row, sums + rows * sums_row

    return njit(**OPTIONS)(panel)


def _tile(rows: int, numbers: Numbers) -> Any:
    """``tile(x, weight, addend, out, sums, inputs, next_panel, x_row, addend_row, out_row, kind)``.

    Addresses, the number of inputs, bytes from a weight to the same one of the next panel, bytes from row to row,
    and the flags of :func:`float_panel`.
    """
    vector_bytes = numbers.step_bytes // 2  # of weights
    columns = numbers.columns // 2  # of one vector
    x_size, out_size, sums_size = columns * numbers.x, columns * numbers.out, columns * 4

    def emit(v: Vectors, *values: Any) -> None:
        x, weight, addend, out, kept, inputs, next_panel, xr, sr, outr, kind = values
        starts = [v.at(x, xr, r) for r in range(rows)]
        steps = v.builder.lshr(inputs, INT(numbers.pairs))
        places_of_sums = [v.at(kept, sums_size, i) for i in range(2 * rows)]

        def step(k: Any, sums: list[Any]) -> list[Any]:
            where, result = v.at(weight, numbers.step_bytes, k), []
            places = [v.at(where, vector_bytes, i) for i in range(2)]
            weights = [numbers.weights(v, place) for place in places]
            # The CPU's prefetcher doesn't know that the next panel follows; this brings it into the L2 cache.
            for place in places[: -(-numbers.step_bytes // CACHE_LINE)]:
                v.prefetch(v.builder.add(place, next_panel))
            for r, start in enumerate(starts):
                factor = numbers.factor(v, v.at(start, 4, k))
                result += [numbers.multiply(v, sums[2 * r + i], factor, one) for i, one in enumerate(weights)]
            return result

        first = v.chosen(
            has(v, kind, CONTINUE),
            lambda: [numbers.load_sums(v, where) for where in places_of_sums],
            numbers.zeros(2 * rows),
        )
        totals = v.loop(steps, first, step)
        with v.builder.if_else(has(v, kind, FINISH)) as (finish, keep):
            with finish:
                for n, total in enumerate(totals):
                    r, i = divmod(n, 2)
                    # Added last: adding small products to a large residual would lose their low bits.
                    added = numbers.addend(v, v.at(v.at(addend, sr, r), x_size, i))
                    numbers.store(v, v.builder.fadd(total, added), v.at(v.at(out, outr, r), out_size, i))
            with keep:
                for total, where in zip(totals, places_of_sums, strict=True):
                    numbers.store_sums(v, total, where)

    def typed(
        typing: Any, x: Any, w: Any, a: Any, o: Any, s: Any, n: Any, p: Any, xr: Any, ar: Any, outr: Any, kind: Any
    ) -> Any:
        return types.void(*[types.int64] * 11), generator(emit)

    return intrinsic(typed)


def has(v: Vectors, kind: Any, flag: int) -> Any:
    """Whether ``kind`` has the flag, as an LLVM value."""
    return v.builder.icmp_unsigned("!=", v.builder.and_(kind, INT(flag)), INT(0))
