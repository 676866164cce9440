"""Products with the weights of quantised checkpoints, relative to those of ``--quantization int4``.

    python benchmarks/quantised_products.py [--threads N]

Random weights of 4 bits in groups of 128 inputs, as GPTQ and AWQ write them: symmetric, with a zero for each group, and
with inputs that GPTQ has sorted (``desc_act``). All run in turns; more than 1 is faster than int4.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from trunkline.kernels.quantized.linear import QuantizedLinear
from trunkline.kernels.quantized.weight import grouped, quantize_int4

SHAPES = ((3072, 512), (512, 1536), (8192, 2048), (2048, 8192))  # outputs, inputs
ROWS = (1, 32, 256)
GROUP, ROUNDS = 128, 40


def layers(outputs: int, inputs: int) -> dict[str, QuantizedLinear]:
    """The same codes and scales in each kind of weight."""
    count = inputs // GROUP
    codes, scales = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8), torch.rand(outputs, count)
    middle, zeros = torch.full((outputs, count), 8.0), torch.randint(0, 16, (outputs, count)).float()
    neighbours = torch.arange(inputs) // GROUP
    int4 = quantize_int4(torch.randn(outputs, inputs))
    assert int4 is not None
    made = {
        "int4": int4,
        "symmetric": grouped(4, codes, scales, middle, neighbours),
        "with zeros": grouped(4, codes, scales, zeros, neighbours),
        "sorted": grouped(4, codes, scales, middle, neighbours[torch.randperm(inputs)]),
    }
    return {name: QuantizedLinear(weight, torch.float32) for name, weight in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    print("| outputs × inputs | rows | int4 µs | symmetric | with zeros | sorted |\n|" + " --- |" * 6)
    for outputs, inputs in SHAPES:
        made = layers(outputs, inputs)
        for rows in ROWS:
            x, out = torch.randn(rows, inputs), torch.empty(rows, outputs)
            seconds: dict[str, list[float]] = {name: [] for name in made}
            for _ in range(ROUNDS):
                for name, layer in made.items():
                    began = time.perf_counter()
                    layer.forward_into(x, out)
                    seconds[name].append(time.perf_counter() - began)
            median = {name: statistics.median(found) for name, found in seconds.items()}
            ratios = " | ".join(f"{median['int4'] / median[name]:.2f}" for name in list(made)[1:])
            print(f"| {outputs} × {inputs} | {rows} | {median['int4'] * 1e6:.0f} | {ratios} |")


if __name__ == "__main__":
    main()
