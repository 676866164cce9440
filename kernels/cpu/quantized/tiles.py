"""The microkernels of :mod:`.panels`: tiles of a few rows of one panel, with integer accumulators in registers.

A tile multiplies int8 numbers of its rows by the unsigned codes of one panel's columns. Within a group of inputs, sums
are exact integers; after each group they are multiplied by the group's scales and added to float32 sums, which lie on
the stack, so a row's result has the same bits in any batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, get_or_insert_function
from numba.extending import intrinsic

from trunkline.kernels.cpu.gemm_tiles import CACHE_LINE
from trunkline.kernels.cpu.vectors import INT, Vectors, generator
from trunkline.kernels.quantized.subgroups import SUBGROUP

from .codes import SHORT_STEPS, Form, Step


class Codes(NamedTuple):
    """What a kernel is compiled for.

    ``bits`` of a code: 4 or 8. ``shifted``: each group of inputs has a minimum of each column, beside its scale;
    without, rows bring what sums begin with. ``half_out``: results and addends are bfloat16. ``subgroups``: codes of 4
    bits stand for codes of 8 bits.
    """

    form: Form
    bits: int
    shifted: bool
    half_out: bool
    subgroups: bool = False

    @property
    def expanded(self) -> bool:
        """Whether codes are multiplied and shifted by their subgroup's integers before they are multiplied by rows."""
        return self.subgroups and not self.summed

    @property
    def summed(self) -> bool:
        """Whether a subgroup's int16 sum is multiplied, and its offset by the sum of the row's numbers."""
        return self.subgroups and self.form.instruction == "short"

    @property
    def step_bytes(self) -> int:
        """Bytes of a panel's codes for one step."""
        return self.form.columns * self.form.inputs * self.bits // 8

    @property
    def out_bytes(self) -> int:
        """Bytes of a result, and of an addend."""
        return 2 if self.half_out else 4


class Places(NamedTuple):
    """A tile's arguments: addresses, bytes from row to row, and counts, as LLVM values."""

    x: Any
    addend: Any
    out: Any
    weight: Any
    scales: Any  # float16 [groups, columns]
    minima: Any  # the same
    factors: Any  # float32 [columns]
    subgroups: Any  # uint8 [inputs / 32, 2, columns]: multipliers and offsets
    x_row: Any
    numbers: Any  # bytes of a row's numbers, which the scales and sums of its groups follow
    addend_row: Any
    out_row: Any
    groups: Any
    steps: Any  # of a group
    next_panel: Any  # bytes from a code to the same one of the next panel


def tile(rows: int, codes: Codes) -> Any:
    """``tile(places)``, a tuple with the fields of :class:`Places`: ``rows`` rows times one panel."""

    def emit(v: Vectors, values: Any) -> None:
        tile = _Tile(v, rows, codes, Places(*(v.builder.extract_value(values, i) for i in range(len(Places._fields)))))
        v.loop(tile.places.groups, [], tile.add_group)
        tile.finish()

    def typed(typing: Any, places: Any) -> Any:
        return types.void(types.UniTuple(types.int64, len(Places._fields))), generator(emit)

    return intrinsic(typed)


class _Tile:
    """Emits the code of one tile. Row ``r`` and half ``i`` of the panel have the sum ``2 r + i``."""

    def __init__(self, v: Vectors, rows: int, codes: Codes, places: Places) -> None:
        self.v, self.rows, self.codes, self.places = v, rows, codes, places
        self.lanes = codes.form.lanes
        self.subgroup_steps = SUBGROUP // codes.form.inputs
        self.floats = ir.VectorType(ir.FloatType(), self.lanes)
        self.emit = Step(v, codes.form, codes.bits)
        self.starts = [v.at(places.x, places.x_row, r) for r in range(rows)]
        self.sums = [alloca_once(v.builder, self.floats) for _ in range(2 * rows)]
        for place in self.sums:
            v.builder.store(self.floats([0.0] * self.lanes), place)

    def add_group(self, g: Any, _: list[Any]) -> list[Any]:
        """Add the products of a group of inputs to the sums on the stack."""
        v, builder, places, codes = self.v, self.v.builder, self.places, self.codes
        # Their addresses; the sum of each group's numbers follows its scale.
        row_scales = [v.at(builder.add(start, places.numbers), 8, g) for start in self.starts]
        first_step = builder.mul(g, places.steps)
        if codes.shifted:
            totals = [self.emit.words([0] * self.lanes)] * (2 * self.rows)
        else:  # minus what the codes' zero adds
            starts = [self.emit.load_word(v.at(one, 1, 4)) for one in row_scales]
            totals = [one for one in starts for _ in range(2)]
        if codes.subgroups:
            count = builder.udiv(places.steps, INT(self.subgroup_steps))
            run = self._summed_subgroup if codes.summed else self._subgroup
            totals = v.loop(count, totals, partial(run, first_step))
        elif codes.form.instruction == "short":
            runs = builder.sdiv(places.steps, INT(SHORT_STEPS))
            totals = v.loop(runs, totals, partial(self._short_run, first_step))
        else:
            totals = v.loop(places.steps, totals, partial(self._step, first_step))
        for i in range(2):
            at = v.at(builder.mul(INT(2 * self.lanes), INT(i)), 4 * self.lanes, g)
            scale = self._halves(builder.add(places.scales, at))
            minimum = self._halves(builder.add(places.minima, at)) if codes.shifted else None
            for r in range(self.rows):
                factor = builder.fmul(self._number(row_scales[r]), scale)
                place, number = self.sums[2 * r + i], builder.sitofp(totals[2 * r + i], self.floats)
                total = self._fma(number, factor, builder.load(place))
                if minimum is not None:
                    total = self._fma(self._number(v.at(row_scales[r], 1, 4)), minimum, total)
                builder.store(total, place)
        return []

    def finish(self) -> None:
        """Store the sums times the columns' factors, plus the addend."""
        v, places, codes, lanes = self.v, self.places, self.codes, self.lanes
        for i in range(2):
            column = codes.out_bytes * lanes * i
            factor = v.load(v.at(places.factors, 4 * lanes, i), lanes=lanes)
            for r in range(self.rows):
                added = v.load(v.at(v.at(places.addend, places.addend_row, r), 1, column), codes.half_out, lanes)
                total = self._fma(v.builder.load(self.sums[2 * r + i]), factor, added)
                v.store(total, v.at(v.at(places.out, places.out_row, r), 1, column), codes.half_out, lanes)

    def _subgroup(self, first: Any, s: Any, totals: list[Any]) -> list[Any]:
        """The steps of subgroup ``s`` after the step ``first``, whose codes are expanded."""
        start, _, integers = self._integers(first, s)
        return self.v.loop(INT(self.subgroup_steps), totals, partial(self._step, start, subgroup=integers))

    def _summed_subgroup(self, first: Any, s: Any, totals: list[Any]) -> list[Any]:
        """The same with int16 sums, which are multiplied after the steps; rows have the sums of their numbers."""
        v, places = self.v, self.places
        start, number, integers = self._integers(first, s)
        none = self.emit.shorts([0] * self.emit.shorts.count)
        shorts = v.loop(INT(SHORT_STEPS), [none] * len(totals), partial(self._step, start))
        result = []
        for r, row in enumerate(self.starts):
            sums = v.at(v.builder.add(row, places.numbers), 8, places.groups)
            total = self.v.builder.bitcast(self.emit.load_word(v.at(sums, 4, number)), self.emit.shorts)
            for i, (multipliers, offsets) in enumerate(integers):
                widened = self.emit.widened(totals[2 * r + i], shorts[2 * r + i], multipliers)
                result.append(self.emit.widened(widened, total, offsets))
        return result

    def _integers(self, first: Any, s: Any) -> tuple[Any, Any, list[tuple[Any, Any]]]:
        """The first step, the number and the integers of subgroup ``s`` after the step ``first``."""
        builder = self.v.builder
        start = builder.add(first, builder.mul(s, INT(self.subgroup_steps)))
        number = builder.udiv(start, INT(self.subgroup_steps))
        return (
            start,
            number,
            self.emit.load_subgroup(self.v.at(self.places.subgroups, 2 * self.codes.form.columns, number)),
        )

    def _step(self, first: Any, k: Any, totals: list[Any], subgroup: Any = None) -> list[Any]:
        """Step ``k`` after the step ``first``; ``subgroup``: the integers that expand its codes."""
        v, step_bytes = self.v, self.codes.step_bytes
        k = v.builder.add(first, k)
        where = v.at(self.places.weight, step_bytes, k)
        halves = self.emit.load_codes(where)
        if subgroup is not None:
            halves = [self.emit.expand(half, *integers) for half, integers in zip(halves, subgroup, strict=True)]
        # The CPU's prefetcher doesn't know that the next panel follows; this brings it into the L2 cache.
        for line in range(0, step_bytes, CACHE_LINE):
            v.prefetch(v.builder.add(v.at(where, 1, line), self.places.next_panel))
        result = []
        for r, start in enumerate(self.starts):
            numbers = self.emit.load_numbers(v.at(start, 4, k))
            result += [self.emit.add(totals[2 * r + i], half, numbers) for i, half in enumerate(halves)]
        return result

    def _short_run(self, first: Any, run: Any, totals: list[Any]) -> list[Any]:
        """Some steps with int16 sums."""
        builder = self.v.builder
        start = builder.add(first, builder.mul(run, INT(SHORT_STEPS)))
        none = self.emit.shorts([0] * self.emit.shorts.count)
        shorts = self.v.loop(INT(SHORT_STEPS), [none] * len(totals), partial(self._step, start))
        return [self.emit.widened(total, one) for total, one in zip(totals, shorts, strict=True)]

    def _halves(self, where: Any) -> Any:
        """Load float16 numbers as float32."""
        builder, halves = self.v.builder, ir.VectorType(ir.HalfType(), self.lanes)
        return builder.fpext(builder.load(self.v.pointer(where, halves), align=2), self.floats)

    def _number(self, where: Any) -> Any:
        """Load one float32 number into all lanes."""
        return self.v.broadcast(self.v.load(where, lanes=1), self.lanes)

    def _fma(self, x: Any, y: Any, z: Any) -> Any:
        builder = self.v.builder
        kind = ir.FunctionType(self.floats, [self.floats] * 3)
        return builder.call(get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{self.lanes}f32"), [x, y, z])
