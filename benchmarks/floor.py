"""What the machine allows: copy bandwidth, matrix product rate, and a scenario's least possible time.

``python benchmarks/floor.py [FOLDER]`` prints the rates and, for a model folder, the floors.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from scenarios import Scenario, build

_COPY_BYTES = 256 << 20  # far beyond any cache
_GEMM_SIZE = (1024, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes per second of a copy (read and write both count), FLOP per second of a product by dtype."""

    bandwidth: float
    gemm: dict[str, float]


def _fastest(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call: what the machine can do when nothing disturbs it."""
    function()
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(repeats: int = 7) -> Machine:
    """Measure with as many threads as torch uses by default."""
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    bandwidth = 2 * _COPY_BYTES / _fastest(lambda: target.copy_(source), repeats)
    rows, inner, columns = _GEMM_SIZE
    gemm: dict[str, float] = {}
    for name in ("float32", "bfloat16"):
        left = torch.randn(rows, inner).to(getattr(torch, name))
        right = torch.randn(columns, inner).to(left.dtype)
        product = _fastest(lambda a=left, b=right: torch.nn.functional.linear(a, b), repeats)  # type: ignore[misc]
        gemm[name] = 2 * rows * inner * columns / product
    return Machine(bandwidth, gemm)


def best(machines: list[Machine]) -> Machine:
    """The best of several measurements: neighbours and clocks only ever take away."""
    return Machine(
        max(each.bandwidth for each in machines),
        {name: max(each.gemm[name] for each in machines) for name in machines[0].gemm},
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a decoder sets its cost. Parameters are counted in numbers, not bytes."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    body: int  # parameters of the layers
    head: int  # parameters of the LM head

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """From config.json, for the Llama family (gated MLP, grouped heads)."""
        config = json.loads((folder / "config.json").read_text())
        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        kv_heads, head_dim = config["num_key_value_heads"], config.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        return cls(
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            body=config["num_hidden_layers"] * (attention + 3 * hidden * inner),
            head=config["vocab_size"] * hidden,
        )


def floor(scenario: Scenario, shape: Shape, machine: Machine, dtype: str) -> float:
    """Seconds below which no implementation in ``dtype`` can go on this machine.

    Prefill is bound by FLOPs, with each shared token computed once. A decode pass is bound by the
    larger of its FLOPs and its bytes: all weights once, and the keys and values of every row.
    """
    size = 2 if dtype == "bfloat16" else 4
    rate, rows = machine.gemm[dtype], len(scenario.prompts)
    length = len(scenario.prompts[0])
    own = length - scenario.shared
    scores = rows * own * (scenario.shared + own / 2) + scenario.shared**2 / 2  # query-key pairs
    pair = 4 * shape.layers * shape.heads * shape.head_dim  # FLOP: q·k and p·v
    seconds = (2 * shape.body * scenario.distinct_prompt_tokens + 2 * shape.head * rows + pair * scores) / rate
    for step in range(1, scenario.new_tokens):
        context = rows * (length + step)
        flops = 2 * (shape.body + shape.head) * rows + pair * context
        cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * context
        seconds += max(flops / rate, size * (shape.body + shape.head + cache) / machine.bandwidth)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    options = parser.parse_args()
    machine = best([measure() for _ in range(3)])
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in machine.gemm.items())
    print(f"copy {machine.bandwidth / 1e9:.1f} GB/s; {rates}; {torch.get_num_threads()} threads")
    if options.folder is not None:
        shape = Shape.read(options.folder)
        for scenario in build(0):
            times = ", ".join(f"{name} {floor(scenario, shape, machine, name):.2f} s" for name in machine.gemm)
            print(f"{scenario.name:18s} {times}")


if __name__ == "__main__":
    main()
