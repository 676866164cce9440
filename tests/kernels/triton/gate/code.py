"""What is in a compiled kernel: registers, spills, shared memory, and the instructions that matter."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from .rows import TENSOR_CORES

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_CORES = re.compile(rf"\b({TENSOR_CORES})\b")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one compiled variant; the fields are those of rows.Row."""

    warps: int
    shared: int
    registers: int
    spills: int
    loads: int
    wide_loads: int
    tensor_cores: Counter[str]


def figures(code: Any) -> Figures:
    """The figures of triton's CompiledKernel ``code``, for NVIDIA or AMD."""
    return _amd(code) if "amdgcn" in code.asm else _nvidia(code)


def _nvidia(code: Any) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    registers = re.findall(r"REG:(\d+)", usage)
    if not registers or "EXIT" not in listing:
        raise RuntimeError(f"the tools of triton {triton.__version__} don't read this kernel: {usage[-500:]}")
    return Figures(
        warps=code.metadata.num_warps,
        shared=code.metadata.shared,
        registers=int(registers[-1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        loads=len(re.findall(r"\b(?:LDG|LDGSTS|UTMALDG)\b", listing)),
        # TMA moves whole tiles.
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\S*\.128|\bUTMALDG\b", listing)),
        tensor_cores=Counter(_CORES.findall(listing)),
    )


def _amd(code: Any) -> Figures:
    text = code.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.findall(rf"\.{name}:\s+(\d+)", text)
        if not found:
            raise RuntimeError(f"the assembly has no .{name}")
        return int(found[-1])

    cores = len(re.findall(r"\bv_mfma_", text))
    return Figures(
        warps=code.metadata.num_warps,
        shared=code.metadata.shared,
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count"),  # scalar registers spill to lanes of vector registers, not to memory
        loads=len(re.findall(r"\b(?:global|buffer)_load_", text)),
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4", text)),
        tensor_cores=Counter({"MFMA": cores} if cores else {}),
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
