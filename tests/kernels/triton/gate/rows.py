"""What the gate takes and what it returns. Imports no triton: the parent process uses it, too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory (LDS on AMD) that one program may have. sm_86, 89 and 120 use the plans of sm_80, and have
99 KiB; it has 163."""

TENSOR_CORES = r"HGMMA|QGMMA|IGMMA|HMMA|QMMA|IMMA|UTC\w*MMA|MFMA"
"""Any tensor-core instruction: wgmma on sm_90 is HGMMA, mma.sync HMMA, tcgen05 on sm_100 UTCHMMA, AMD's MFMA."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the machine code of one kernel must have."""

    variants: int = 1  # how often the kernel is compiled in all calls of the launch together
    wide_loads: bool = True  # at least one load of 128 bits from global memory
    tensor_cores: str = ""  # a pattern of instructions of which there must be one, such as TENSOR_CORES or "HGMMA"
    registers: int = 512  # at most, per thread; NVIDIA has no more than 255, AMD 512


@dataclass(frozen=True, slots=True)
class Launch:
    """A call of a real launcher, with tensors on the CPU or the meta device.

    ``calls`` run one after another, for example with the shapes that occur while serving; together they must compile
    no more variants than expected. ``kernels``: by name, every kernel that they launch.
    """

    name: str
    calls: tuple[Callable[[], object], ...]
    kernels: Mapping[str, Expected]


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel of one launch. Of several variants, each figure is the worst one."""

    launch: str
    kernel: str
    target: str
    triton: str
    variants: int = 0
    warps: int = 0
    registers: int = 0  # per thread
    spills: int = 0  # instructions that access local memory, or on AMD spilled vector registers
    shared: int = 0  # bytes
    loads: int = 0  # instructions that load from global memory
    wide_loads: int = 0  # those of 128 bits
    tensor_cores: Mapping[str, int] = field(default_factory=dict)  # instruction -> count
    problems: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Row:
        return cls(**{**fields, "problems": tuple(fields["problems"])})


def problems(row: Row, expected: Expected) -> tuple[str, ...]:
    """How a row differs from what was expected; () when it is as it must be."""
    limit = SHARED_LIMIT[row.target]
    found = {
        f"{row.variants} variants instead of {expected.variants}": row.variants != expected.variants,
        f"{row.spills} spills": row.spills > 0,
        f"{row.registers} registers, more than {expected.registers}": row.registers > expected.registers,
        f"{row.shared} bytes of shared memory, more than {limit}": row.shared > limit,
        "no load of 128 bits": expected.wide_loads and not row.wide_loads,
        f"no instruction {expected.tensor_cores}": expected.tensor_cores
        and not any(re.fullmatch(expected.tensor_cores, name) for name in row.tensor_cores),
    }
    return tuple(text for text, wrong in found.items() if wrong)


def markdown(rows: Iterable[Row]) -> str:
    """The rows as a table."""
    head = ("launch", "kernel", "target", "triton", "variants", "warps", "registers", "spills", "shared KB")
    head += ("loads, of 128 bits", "tensor cores", "problems")
    lines = [head, ("---",) * len(head)]
    for row in rows:
        cores = ", ".join(f"{count} {name}" for name, count in sorted(row.tensor_cores.items())) or "-"
        numbers = (row.variants, row.warps, row.registers, row.spills, f"{row.shared / 1024:.1f}")
        cells = (row.launch, row.kernel, row.target, row.triton, *numbers, f"{row.loads}, {row.wide_loads}", cores)
        lines.append(tuple(map(str, (*cells, "; ".join(row.problems) or "-"))))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
