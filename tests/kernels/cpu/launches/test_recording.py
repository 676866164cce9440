"""Recorded launches against the same launches run one by one."""

from __future__ import annotations

import pytest
import torch

from trunkline.kernels.cpu.launches.memory import keep_alive
from trunkline.kernels.cpu.launches.recording import Recording
from trunkline.kernels.glu import glu_cpu
from trunkline.kernels.linear import PackedLinear
from trunkline.kernels.norm import rms_norm_cpu


@pytest.mark.parametrize("threads", [1, 2])
def test_plays_over_any_number_of_rows(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        up, down = PackedLinear(torch.randn(64, 48)), PackedLinear(torch.randn(48, 32))
        weight = torch.rand(48)
        x, normed, wide, gated = (torch.zeros(9, width) for width in (48, 48, 64, 32))
        with Recording() as recording:
            for _ in range(3):
                up.forward_into(rms_norm_cpu(x, weight, 1e-6, out=normed), wide)
                down.forward_into(glu_cpu(wide, "silu", gated), x, x)
        assert not x.any()  # noted, not run
        for rows in (9, 1, 4, 9):
            given = torch.randn(rows, 48)
            expected = given
            for _ in range(3):
                expected = down(glu_cpu(up(rms_norm_cpu(expected, weight, 1e-6)), "silu"), expected)
            x[:] = torch.nan
            x[:rows] = given
            recording.run(rows)
            torch.testing.assert_close(x[:rows], expected, rtol=0, atol=0)
            assert x[rows:].isnan().all()  # rows beyond aren't touched
    finally:
        torch.set_num_threads(before)


def test_launches_run_again_once_the_recording_ends() -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ZeroDivisionError), Recording():
        raise ZeroDivisionError
    assert rms_norm_cpu(x, weight, 1e-6).abs().max() > 0


def test_scratch_lives_as_long_as_the_recording() -> None:
    scratch = torch.zeros(3)
    assert keep_alive(scratch) is scratch
    with Recording() as recording:
        keep_alive(scratch)
        rms_norm_cpu(torch.zeros(1, 8), torch.ones(8), 1e-6)
    assert recording.memory.tensors == [scratch]
