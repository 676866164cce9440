"""Matrix products of the ``cpu`` backend against oneDNN's with prepacked weights, by shape and number of rows.

``python benchmarks/products.py`` prints GFLOP/s and the ratio, ours ÷ oneDNN, in the dtype that serves on this CPU.
Weights are in rotation, so that each is read from memory as in a pass over all layers.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from trunkline.kernels.cpu.processor import has_bfloat16
from trunkline.kernels.linear import PackedLinear

SHAPES = [(576, 1536), (768, 3072), (2048, 8192), (8192, 2048), (4096, 4096), (4096, 14336)]  # K, N
ROWS = [1, 8, 32, 256, 1024]
_WEIGHT_BYTES = 96 << 20  # of the weights in rotation: beyond the caches


class OneDnn(nn.Module):
    """oneDNN's product with a weight in its own packed layout."""

    def __init__(self, weight: torch.Tensor, rows: int) -> None:
        """Pack ``weight`` [N, K] for ``rows`` rows, the number with which it will be used."""
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [M, K] -> [M, N]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, None, "none", [], "")
        return out


def seconds(layers: list[nn.Module], x: torch.Tensor, first: int, calls: int) -> float:
    """Seconds per call, over ``calls`` calls that begin with layer ``first``."""
    start = time.perf_counter()
    for i in range(calls):
        layers[(first + i) % len(layers)](x)
    return (time.perf_counter() - start) / calls


def measure(inputs: int, outputs: int, rows: int, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Median GFLOP/s of ours and of oneDNN's, in turns."""
    count = max(2, min(12, _WEIGHT_BYTES // (inputs * outputs * dtype.itemsize)))
    weights = [(torch.randn(outputs, inputs) / inputs**0.5).to(torch.bfloat16).to(dtype) for _ in range(count)]
    sides: list[list[nn.Module]] = [[PackedLinear(each) for each in weights], [OneDnn(each, rows) for each in weights]]
    del weights
    x = torch.randn(rows, inputs).to(dtype)
    calls = max(count, int(2e9 // (2 * inputs * outputs * rows)))
    times: list[list[float]] = [[], []]
    for side in sides:
        seconds(side, x, 0, count)
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            times[which].append(seconds(sides[which], x, turn, calls))
    ours, theirs = (2e-9 * inputs * outputs * rows / statistics.median(each) for each in times)
    return ours, theirs


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 where the CPU has it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype or ("bfloat16" if has_bfloat16() else "float32"))
    print(f"{dtype}, {options.threads} threads: ours ÷ oneDNN (GFLOP/s of ours), medians of {options.rounds} rounds\n")
    print("| K × N | " + " | ".join(f"{rows} rows" for rows in options.rows) + " |")
    print("| --- |" + " --- |" * len(options.rows))
    for inputs, outputs in SHAPES:
        cells: list[str] = []
        for rows in options.rows:
            ours, theirs = measure(inputs, outputs, rows, dtype, options.rounds)
            cells.append(f"{ours / theirs:.2f} ({ours:.0f})")
        print(f"| {inputs} × {outputs} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
