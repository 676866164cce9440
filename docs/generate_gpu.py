"""Write gpu-predictions.md: what the cost model of the attention kernels predicts, from the committed compile tables.

``python docs/generate_gpu.py`` does this, where triton is installed; ``docs/generate.py`` does so, too. A test compares
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trunkline.kernels.triton import cost, plans

DOCS = Path(__file__).parent
COMPILED = DOCS.parent / "tests" / "kernels" / "triton" / "attention_launches.md"
NAMES = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200", "gfx942": "MI300X"}
HEADS, KV_HEADS, WIDTH, ITEMSIZE = 32, 8, 128, 2
ROWS, KEYS, TOKENS = (1, 8, 64, 256), (1024, 4096, 32768), (512, 4096, 16384)
CONTEXT = 131072  # keys for which the graphs of the table are captured

PAGE = """# Predicted times of the attention kernels

No figure on this page is measured. The page is computed from the cost model of `kernels/triton/cost.py` and from the
registers and shared memory of the compiled kernels (`tests/kernels/triton/attention_launches.md`) by
`python docs/generate_gpu.py`; a test compares them. All figures are for one layer with 32 query heads, 8 KV heads and a
head dim of 128 in bfloat16. *Share* is the floor divided by the predicted time.

## Assumptions

| GPU | multiprocessors | TB/s of copies | TFLOP/s of bf16 tensor cores | clock, GHz | latency, µs | launch, µs |
| --- | --- | --- | --- | --- | --- | --- |
{gpus}

* Multiprocessors, tensor cores and clocks are those of data sheets. The bandwidths of the A100, B200 and MI300X are
  estimates of what a copy reaches; latencies (from a request to its bytes, under load) and the time of a launch are
  assumptions.
* A program of decode attention needs at least {tile:.1f} µs per tile of keys for products and softmax: an assumption.
* A program begins with {start} reads that depend on one another (a length, slots, keys), of one latency each.
* A softmax takes {exponentials} exponentials per clock and multiprocessor, and {elementwise} other float32 operations
  per score. Products of a program are not computed during its own softmax, but during that of another program on the
  same multiprocessor.
* Equal programs share the bandwidth equally. Limits of caches, of clocks under load and of the memory's refresh are not
  in the model.

## Programs per multiprocessor

As compiled, with triton 3.6.0 / 3.9.0. `kernels/triton/plans.py` has the smallest number of programs over all kernels
with the same plan, by which splits are chosen.

| kernel | GPU | tile | warps | registers | shared KB | programs | programs in the plan |
| --- | --- | --- | --- | --- | --- | --- | --- |
{occupancy}

## Decode

Floor: the bytes of the keys and values that are read, divided by the bandwidth. *Waves*: programs divided by those that
the GPU holds at once. In a CUDA graph, splits are chosen when the graph is captured, here for up to {context} keys per
row; the share is that of the same work in such a graph.

| GPU | rows x keys | splits | programs | waves | predicted µs | floor µs | share | splits in graph | share in graph |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{decode}

## Extend

Causal attention over the tokens of one prompt, without a cached prefix. Floor: the FLOPs of the visible scores, divided
by the throughput of the tensor cores, or the bytes of queries, keys, values and results, divided by the bandwidth.

| GPU | tokens | programs | waves | predicted µs | floor µs | share |
| --- | --- | --- | --- | --- | --- | --- |
{extend}
"""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A row of the compile table."""

    launch: str
    kernel: str
    target: str
    warps: int
    registers: int
    shared: int  # bytes

    @property
    def width(self) -> int:
        """The wider one of a key and a value."""
        found = re.search(r"D=(\d+)", self.launch)
        assert found is not None
        return int(found[1])  # no value is wider than a key

    @property
    def itemsize(self) -> int:
        return 4 if "fp32" in self.launch else 2

    @property
    def resident(self) -> int:
        """Programs that fit on a multiprocessor at the same time.

        NVIDIA: 65,536 registers, given to warps in units of 256, and to four warps at a time; 64 warps (of 32 threads),
        32 programs; each program takes 1 KiB of shared memory more than it asks for. AMD: 4 SIMDs per compute unit with
        512 registers per lane, given in units of 8, and 8 wavefronts.
        """
        if self.target.startswith("gfx"):
            wavefronts = 4 * min(8, 512 // (-(-self.registers // 8) * 8))
            return min(wavefronts // self.warps, (64 << 10) // max(1, self.shared))
        warps = (1 << 16) // (-(-self.registers * 32 // 256) * 256) // 4 * 4
        shared = (164 if self.target == "sm_80" else 228) << 10
        return min(min(warps, 64) // self.warps, 32, shared // (self.shared + 1024))


def compiled() -> Iterator[Compiled]:
    """The rows of the attention kernels themselves."""
    for line in COMPILED.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[1:] and cells[1] in ("split_kernel", "extend_kernel"):
            launch, kernel, target, _, _, warps, registers, _, shared = cells[:9]
            yield Compiled(launch, kernel, target, int(warps), int(registers), round(float(shared) * 1024))


def plan_of(row: Compiled) -> plans.Plan:
    """The plan with which a row was compiled."""
    choose = plans.decode if row.kernel == "split_kernel" else plans.extend
    return choose(row.target, row.width, row.itemsize)


@dataclass(frozen=True, slots=True)
class Decode:
    """The prediction for ``rows`` rows of ``keys`` keys each. ``bound``: keys for which splits are chosen, 0: these."""

    target: str
    rows: int
    keys: int
    bound: int = 0

    def work(self, keys: int) -> cost.DecodeWork:
        lengths, key_bytes = np.full(self.rows, keys, np.int32), 2 * WIDTH * ITEMSIZE
        return cost.DecodeWork.of(lengths, keys, HEADS, KV_HEADS, key_bytes, WIDTH)

    @property
    def plan(self) -> plans.Plan:
        return plans.decode(self.target, WIDTH, ITEMSIZE)

    @property
    def splits(self) -> int:
        """Per row, at most."""
        return cost.splits(self.target, self.plan, self.work(self.bound or self.keys), self.bound > 0)

    @property
    def programs(self) -> int:
        return self.rows * KV_HEADS * self.splits

    @property
    def waves(self) -> float:
        return self.programs / (cost.GPUS[self.target].multiprocessors * self.plan.resident)

    @property
    def seconds(self) -> float:
        return cost.decode_seconds(cost.GPUS[self.target], self.plan, self.work(self.keys), self.splits)

    @property
    def floor(self) -> float:
        """Seconds."""
        return self.rows * self.keys * KV_HEADS * 2 * WIDTH * ITEMSIZE / cost.GPUS[self.target].bandwidth

    @property
    def share(self) -> float:
        return self.floor / self.seconds


@dataclass(frozen=True, slots=True)
class Extend:
    """The prediction for one row of ``tokens`` new tokens."""

    target: str
    tokens: int

    @property
    def plan(self) -> plans.Plan:
        return plans.extend(self.target, WIDTH, ITEMSIZE)

    @property
    def programs(self) -> int:
        return -(-self.tokens // (self.plan.block_m // (HEADS // KV_HEADS))) * KV_HEADS

    @property
    def waves(self) -> float:
        return self.programs / (cost.GPUS[self.target].multiprocessors * self.plan.resident)

    @property
    def seconds(self) -> float:
        return cost.extend_seconds(cost.GPUS[self.target], self.plan, self.tokens, HEADS, KV_HEADS, WIDTH)

    @property
    def floor(self) -> float:
        """Seconds."""
        gpu, scores = cost.GPUS[self.target], self.tokens * (self.tokens + 1) // 2
        numbers = self.tokens * 2 * (HEADS + KV_HEADS) * WIDTH
        return max(4 * HEADS * WIDTH * scores / gpu.flops, numbers * ITEMSIZE / gpu.bandwidth)

    @property
    def share(self) -> float:
        return self.floor / self.seconds


def predictions() -> str:
    """The text of gpu-predictions.md."""
    gpus = [_gpu_cells(target) for target in NAMES]
    decode = [_decode_cells(Decode(target, rows, keys)) for target in NAMES for rows in ROWS for keys in KEYS]
    extend = [_extend_cells(Extend(target, tokens)) for target in NAMES for tokens in TOKENS]
    return PAGE.format(
        gpus=_lines(gpus),
        tile=cost.GPUS["sm_90"].tile * 1e6,
        start=cost.START,
        exponentials=cost.EXPONENTIALS,
        elementwise=cost.ELEMENTWISE,
        occupancy=_lines(_occupancy()),
        context=CONTEXT,
        decode=_lines(decode),
        extend=_lines(extend),
    )


def _gpu_cells(target: str) -> tuple[object, ...]:
    gpu = cost.GPUS[target]
    rates = (f"{gpu.bandwidth / 1e12:.1f}", f"{gpu.flops / 1e12:.0f}", f"{gpu.clock / 1e9:.2f}")
    return (NAMES[target], gpu.multiprocessors, *rates, f"{gpu.latency * 1e6:.1f}", f"{gpu.launch * 1e6:.0f}")


def _decode_cells(one: Decode) -> tuple[object, ...]:
    graph = Decode(one.target, one.rows, one.keys, CONTEXT)
    times = (f"{one.seconds * 1e6:.1f}", f"{one.floor * 1e6:.1f}", f"{one.share:.0%}")
    sizes = (NAMES[one.target], f"{one.rows} x {one.keys}", one.splits, one.programs, f"{one.waves:.2f}")
    return (*sizes, *times, graph.splits, f"{graph.share:.0%}")


def _extend_cells(one: Extend) -> tuple[object, ...]:
    times = (f"{one.seconds * 1e6:.1f}", f"{one.floor * 1e6:.1f}", f"{one.share:.0%}")
    return (NAMES[one.target], one.tokens, one.programs, f"{one.waves:.2f}", *times)


def _occupancy() -> Iterator[tuple[object, ...]]:
    rows = list(compiled())
    for kernel in ("decode", "extend"):
        for target, name in NAMES.items():
            same = [row for row in rows if row.launch == f"{kernel}, D=128, group 4" and row.target == target]
            plan = plan_of(same[0])
            registers, shared, programs = (
                " / ".join(str(value) for value in values)
                for values in zip(
                    *((row.registers, f"{row.shared / 1024:.1f}", row.resident) for row in same), strict=True
                )
            )
            tile = f"{plan.block_m} x {plan.block_n}"
            yield (kernel, name, tile, plan.warps, registers, shared, programs, plan.resident)


def _lines(rows: Iterable[tuple[object, ...]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def write() -> None:
    """Rewrite the page."""
    (DOCS / "gpu-predictions.md").write_text(predictions())


if __name__ == "__main__":
    write()
