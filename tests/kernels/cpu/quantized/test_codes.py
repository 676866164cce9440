"""Instructions that this CPU may lack: the compiled code of whole kernels has them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import sys
from trunkline.kernels.cpu.quantized import gemm
from trunkline.kernels.cpu.quantized.codes import Form
from trunkline.kernels.cpu.quantized.tiles import Codes
lanes, bits, shifted, expanded = map(int, sys.argv[1:])
kernel = gemm._kernel(Codes(Form(lanes, 4, "dot"), bits, bool(shifted), lanes == 16, bool(expanded)))
print(kernel._owner._library.get_asm_str())
"""
COMMON = "+sse4.2,+avx,+avx2,+fma,+f16c"
CPUS = {
    16: ("icelake-server", f"{COMMON},+avx512f,+avx512bw,+avx512vl,+avx512vnni"),
    8: ("alderlake", f"{COMMON},+avxvnni"),
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
@pytest.mark.parametrize(("bits", "shifted", "expanded"), [(4, 1, 0), (4, 0, 1), (8, 0, 0)])
@pytest.mark.parametrize(("lanes", "register"), [(16, "zmm"), (8, "ymm")])
def test_products_of_four_inputs(lanes: int, register: str, bits: int, shifted: int, expanded: int) -> None:
    """Compiled for a CPU that has them, and not run."""
    cpu, features = CPUS[lanes]
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, "-c", CODE, *map(str, (lanes, bits, shifted, expanded))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    products = [line for line in done.stdout.splitlines() if "vpdpbusd" in line]
    assert len(products) > 20
    assert all(register in line for line in products)
