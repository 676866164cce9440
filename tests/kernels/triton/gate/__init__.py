"""Compile gate: what real launchers launch is compiled for GPUs that aren't there, and the machine code is inspected.

A module that is given to :func:`compile_launches` defines ``launches(target: str) -> list[Launch]``. It runs in a
process of its own, without TRITON_INTERPRET, in which launches compile and run nothing.
"""

from __future__ import annotations

from .process import compile_launches
from .rows import TARGETS, Expected, Launch, Row, markdown

__all__ = ["TARGETS", "Expected", "Launch", "Row", "compile_launches", "markdown"]
