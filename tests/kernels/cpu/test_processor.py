"""What a CPU is taken to multiply."""

from __future__ import annotations

import pytest
import torch

from trunkline.kernels.cpu import processor


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "expected", "pairs"),
    [
        ("x86_64", False, False, False, False),  # AVX-512 alone: oneDNN emulates
        ("x86_64", True, False, True, True),
        ("x86_64", False, True, True, False),
        ("aarch64", False, False, True, False),
    ],
)
def test_emulated_bfloat16_does_not_count(
    machine: str, avx512_bf16: bool, amx: bool, expected: bool, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert processor.has_bfloat16() is expected
    assert processor.has_bfloat16_pairs() is pairs
