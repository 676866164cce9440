"""Which bfloat16 instructions this CPU has."""

from __future__ import annotations

import platform

import torch


def has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices with instructions of this CPU (AVX512_BF16, AMX, Arm's BF16)."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    # oneDNN reports support on any AVX-512 CPU; without these instructions it emulates, slower than float32.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_bfloat16_pairs() -> bool:
    """Whether to use our own kernels on AVX512_BF16: the CPU has it, but not AMX, which is faster still (oneDNN)."""
    return bool(torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported())
