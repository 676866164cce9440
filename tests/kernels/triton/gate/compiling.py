"""Compiles launches in this process and compares the code with what is expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import triton

from .code import Figures, figures
from .driver import Compiled, compiling_for
from .rows import Expected, Launch, Row, problems


def compile_here(launches: Iterable[Launch], target: str) -> list[Row]:
    """One row per kernel of each launch; one that does not compile has its error in ``problems``."""
    return [row for launch in launches for row in _rows(launch, target)]


def _rows(launch: Launch, target: str) -> list[Row]:
    error = ""
    with compiling_for(target) as recorded:
        for call in launch.calls:
            try:
                call()
            except Exception as exc:
                error = f"{type(exc).__name__}: {(str(exc).strip().splitlines() or [''])[-1][:200]}"
                break
    compiled = [each.kernel for each in recorded]
    names = dict.fromkeys(compiled if error else [*launch.kernels, *compiled])
    rows = [_row(launch, name, target, recorded) for name in names]
    if error:
        rows.append(Row(launch.name, "-", target, triton.__version__, problems=(error,)))
    return rows


def _row(launch: Launch, kernel: str, target: str, recorded: list[Compiled]) -> Row:
    place: dict[str, Any] = {"launch": launch.name, "kernel": kernel, "target": target, "triton": triton.__version__}
    variants = {each.code.hash: each.code for each in recorded if each.kernel == kernel}
    if not variants:
        return Row(**place, problems=("not launched",))
    found = [figures(code) for code in variants.values()]
    row = Row(**place, variants=len(variants), **worst(found))
    wanted = launch.kernels.get(kernel)
    wrong = problems(row, wanted) if wanted else ("a kernel that the launch doesn't name", *problems(row, Expected()))
    return Row(**{**row.as_json(), "problems": wrong})


def worst(found: list[Figures]) -> dict[str, Any]:
    """Of several variants: the most registers and spills, the fewest wide loads and tensor-core instructions."""
    highest = {name: max(getattr(each, name) for each in found) for name in ("warps", "shared", "registers", "spills")}
    lowest = {name: min(getattr(each, name) for each in found) for name in ("loads", "wide_loads")}
    cores = Counter(found[0].tensor_cores)
    for each in found[1:]:
        cores &= each.tensor_cores  # the smaller count of each instruction
    return {**highest, **lowest, "tensor_cores": dict(cores)}
