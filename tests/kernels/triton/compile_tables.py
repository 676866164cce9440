"""The committed tables of compiled kernels: one per module of launches, for every target and version of triton.

``python -m tests.kernels.triton.compile_tables`` writes them anew; the suite ``compile`` recomputes as much as fits.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.environments import Environment, python_of

from .gate import TARGETS, compile_launches, markdown
from .gate.process import Outcome

HERE = Path(__file__).parent
MODULES = tuple(HERE / f"{name}_launches.py" for name in ("sample", "kernel", "attention"))
OLDEST = "3.6.0"  # of triton, for which kernels must compile: a GPU image with torch 2.11 has it
VERSIONS = (OLDEST, "3.9.0")


def python_with(triton: str) -> Path | None:
    """The interpreter that has this version of triton, None for this process's own. Raises Unavailable."""
    if triton != OLDEST:
        return None
    return python_of(Environment(f"triton-{triton}", requirements=(), bare=(f"triton=={triton}",)))


def table_of(module: Path) -> Path:
    return module.with_suffix(".md")


def compiled(module: Path, triton: str, seed: int | None = None, seconds: float = float("inf")) -> Outcome:
    """What ``module`` launches, for all targets, with this version of triton. Raises Unavailable."""
    return compile_launches(module, TARGETS, python=python_with(triton), seed=seed, seconds=seconds)


def main() -> None:
    """Write the tables of the modules that the command line names, by default of all."""
    for module in MODULES:
        if sys.argv[1:] and module.stem not in sys.argv[1:]:
            continue
        rows = [row for triton in VERSIONS for row in compiled(module, triton).rows]
        table_of(module).write_text(f"# Kernels of {module.name} as compiled\n\n{markdown(rows)}")
        print(f"{table_of(module)}: {sum(bool(row.problems) for row in rows)} of {len(rows)} rows with problems")


if __name__ == "__main__":
    main()
