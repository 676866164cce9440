"""Launches of sample_kernels.py for the compile gate, on tensors of the meta device: they have shapes and no memory."""

from __future__ import annotations

import sample_kernels
import torch
from gate import Expected, Launch
from gate.rows import TENSOR_CORES


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(rows: int, window: int, width: int) -> torch.Tensor:
    pool = tensor(4096, 2, width)
    table, lengths = tensor(rows, 1024, dtype=torch.int32), tensor(rows, dtype=torch.int32)
    return sample_kernels.gather_attention(tensor(rows, 8, width), pool, pool, table, lengths, window)


def launches(target: str) -> list[Launch]:
    """What serving would launch: other numbers of rows and other windows must not compile anew."""
    found = [
        Launch(
            f"attention, D={width}",
            tuple(
                lambda rows=rows, window=window, width=width: attention(rows, window, width)
                for rows in (1, 16)
                for window in (1, 7, 4096)
            ),
            {"_gather_attention": Expected(tensor_cores=TENSOR_CORES)},
        )
        for width in (64, 72)
    ]
    norm = tuple(lambda rows=rows: sample_kernels.row_norm(tensor(rows, 4096), tensor(4096)) for rows in (1, 2, 16))
    found.append(Launch("norm", norm, {"_row_norm": Expected()}))
    slots = tensor(5, dtype=torch.int32)
    scatter = (lambda: sample_kernels.scatter_rows(tensor(5, 4096), slots, tensor(100, 4096)),)
    found.append(Launch("scatter", scatter, {"_scatter_rows": Expected()}))
    return found
