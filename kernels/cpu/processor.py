"""What this CPU multiplies."""

from __future__ import annotations

import platform

import torch


def has_bfloat16() -> bool:
    """Does this CPU multiply bfloat16, through oneDNN?"""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    # oneDNN says yes to any AVX-512 and then emulates, slower than float32
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_bfloat16_pairs() -> bool:
    """Does this CPU multiply vectors of pairs of bfloat16, and has no tiles, which are faster still?"""
    return bool(torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported())
