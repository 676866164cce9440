"""Attention of rows with one query has the bits that the same query has in a longer row, whatever is beside it."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from trunkline.core.model.attention import paged_layout
from trunkline.kernels import attention_decode
from trunkline.kernels.backend import CPU, CPU_DETERMINISTIC, choose
from trunkline.kernels.cpu.processor import has_bfloat16_pairs

# H, KV, D, Dv; bfloat16 numbers are multiplied in pairs, on CPUs that can, where Dv is a multiple of 16.
WIDTHS = [(6, 2, 64, 64), (5, 1, 20, 12), (7, 1, 20, 144), (8, 2, 128, 16)]
RULES: list[dict[str, Any]] = [
    {},
    {"window": 7},
    {"window": 129, "sinks": True},
    {"softcap": 5.0},
    {"chunk": 100, "softcap": 3.0, "sinks": True},
]
LENGTHS = (2, 300, 65, 129)  # tokens of the rows


class Sequences:
    """Rows of LENGTHS tokens, whose keys and values are scattered over a pool."""

    def __init__(self, widths: tuple[int, int, int, int], dtype: torch.dtype, rules: dict[str, Any]) -> None:
        self.heads, kv_heads, key_dim, self.value_dim = widths
        noise = torch.Generator().manual_seed(1)
        slots = len(LENGTHS) * max(LENGTHS)
        self.table = np.random.default_rng(1).permutation(slots).astype(np.int32).reshape(len(LENGTHS), -1)
        self.keys = torch.randn(slots, kv_heads, key_dim, generator=noise).to(dtype)
        self.values = torch.randn(slots, kv_heads, self.value_dim, generator=noise).to(dtype)
        self.queries = [torch.randn(n, self.heads, key_dim, generator=noise).to(dtype) for n in LENGTHS]
        sinks = torch.randn(self.heads, generator=noise) if rules.get("sinks") else None
        self.options = {"scale": key_dim**-0.5, **rules, "sinks": sinks}

    def whole(self) -> list[torch.Tensor]:
        """Each row's results, all queries at once, with a cached prefix of one token."""
        layout = paged_layout(self.table, [(1, n) for n in LENGTHS])
        q = torch.cat([query[1:] for query in self.queries])
        k, v = self.keys[layout.out_slots], self.values[layout.out_slots]
        out = self._out(len(q))
        rows = np.arange(len(LENGTHS), dtype=np.int32)
        CPU.extend(q, k, v, self.keys, self.values, layout, rows, out, **self.options)
        return list(torch.split(out, [n - 1 for n in LENGTHS]))

    def single(self, rows: list[int], positions: list[int], decode: Any) -> torch.Tensor:
        """The results of one query of each of the rows."""
        layout = paged_layout(self.table[rows], [(at, at + 1) for at in positions])
        q = torch.stack([self.queries[row][at] for row, at in zip(rows, positions, strict=True)])
        out = self._out(len(rows))
        decode(q, self.keys, self.values, layout, np.arange(len(rows), dtype=np.int32), out, **self.options)
        return out

    def _out(self, tokens: int) -> torch.Tensor:
        return torch.empty(tokens, self.heads, self.value_dim, dtype=self.keys.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_bits_of_longer_rows(widths: tuple[int, int, int, int], rules: dict[str, Any], dtype: torch.dtype) -> None:
    made = Sequences(widths, dtype, rules)
    whole, dice = made.whole(), random.Random(0)
    for count in (1, 2, 4, 4, 4):
        rows = dice.sample(range(len(LENGTHS)), count)
        positions = [dice.randrange(1, LENGTHS[row]) for row in rows]
        expected = torch.stack([whole[row][at - 1] for row, at in zip(rows, positions, strict=True)])
        assert torch.equal(made.single(rows, positions, CPU_DETERMINISTIC.decode), expected)


def test_the_default_kernel_has_other_bits() -> None:
    """Else these tests would show nothing."""
    made = Sequences(WIDTHS[0], torch.float32, {})
    whole = made.whole()
    assert not torch.equal(made.single([1], [299], attention_decode.decode_cpu)[0], whole[1][298])


COMPILE = """
from trunkline.kernels.cpu.attention import ordered_pairs
print(ordered_pairs.kernel(64, 64)._owner._library.get_asm_str())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
def test_pairs_of_bfloat16_numbers_are_multiplied() -> None:
    """Compiled for a CPU that can, and not run: this one may lack the instruction."""
    features = "+sse4.2,+avx,+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512bf16"
    environment = {**os.environ, "NUMBA_CPU_NAME": "cooperlake", "NUMBA_CPU_FEATURES": features}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("vdpbf16ps") > 20


@pytest.mark.skipif(not has_bfloat16_pairs(), reason="needs AVX512_BF16")
def test_pairs_have_a_kernel_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Sequences(WIDTHS[0], torch.bfloat16, {})
    monkeypatch.setattr(attention_decode.ordered, "kernel", None)
    made.single([1], [299], CPU_DETERMINISTIC.decode)


def test_choice() -> None:
    assert choose("cpu", "cpu", deterministic=True) is CPU_DETERMINISTIC
    assert choose(None, "cpu", deterministic=True) is CPU_DETERMINISTIC
    for name, device in (("torch_native", "cpu"), ("triton", "cpu"), (None, "cuda"), ("cpu", "cuda")):
        with pytest.raises(ValueError, match="no deterministic mode"):
            choose(name, device, deterministic=True)
