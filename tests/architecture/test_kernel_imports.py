"""Outside of ``kernels/`` nothing calls a device's kernel by name: operations are those of the backend in use."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from .conftest import Source

KERNELS = "trunkline.kernels"
# What every module may import: no operation, and nothing that depends on the device.
ALLOWED = {
    "backend.Backend": "the operations",
    "backend.choose": "the engine chooses the backend by the user's settings",
    "backend.multiplies_bfloat16": "the default dtype depends on it",
    "grouped_linear.GroupedLinear": "the interface of layers for experts",
    "layout.KVSlots": "where a layer's new keys and values are written",
    "layout.Layout": "the rows of a pass",
    "layout.LayoutTensors": "the same on the device",
    "linear.LinearLayer": "the interface of the backend's linear layers",
    "quantized.cache.stored_width": "bytes of a key in the KV pool",
    "quantized.linear.QuantizedLinear": "what transforms may make of a weight",
    "quantized.weight.QuantizedWeight": "the weights that it stores",
    "quantized.weight.grouped": "the same",
    "quantized.weight.quantize_int4": "the same",
    "quantized.weight.quantize_int8": "the same",
    "quantized.weight.stacked": "the same",
    "logprobs.RowLogprobs": "the result of an operation",
    "activation.ACTIVATIONS": "names that two operations take",
}
# What single modules may import in addition.
EXCEPTIONS = {
    ("core.model.fusion.recorded", "cpu.launches.recording.Recording"): "launches, which only compiled code has",
    ("core.model.fusion.recorded", "cpu.launches.memory.keep_alive"): "the memory of these launches",
    ("core.model.fusion.row_parallel", "cpu.launches.row_blocks.CAPACITY"): "sizes of blocks of these launches",
    ("core.model.fusion.row_parallel", "cpu.launches.row_blocks.MIN_BLOCK"): "sizes of blocks of these launches",
    ("core.model.fusion.row_parallel", "cpu.launches.row_blocks.RowBlocks"): "launches, which only compiled code has",
    ("core.model.fusion.decoder_layer", "glu.COMPILED"): "the activations whose launches can be recorded",
    ("core.model.transforms.matrices", "linear.PlainLinear"): "the weight of a module that isn't ours, not copied",
    ("core.engine.control.pages", "cpu.threads.Kernel"): "compiled code isn't part of a model's memory",
    ("core.engine.startup", "compiled"): "sets the folder in which the process stores compiled code",
}


def imported_kernels(source: Source) -> Iterator[str]:
    """What a module imports of the kernels, without those for type checkers, as a name below ``kernels``.

    "" is the package itself, through which everything can be reached.
    """
    for name in source.imports():
        if name == KERNELS or name.startswith(f"{KERNELS}."):
            yield name.removeprefix(KERNELS).removeprefix(".")


def violations(sources: Iterable[Source]) -> list[str]:
    return [
        f"{source.name} imports kernels.{name}"
        for source in sources
        if source.name.split(".")[0] != "kernels"
        for name in imported_kernels(source)
        if name not in ALLOWED and (source.name, name) not in EXCEPTIONS
    ]


@pytest.fixture(scope="session")
def callers(repository: Path, sources: dict[str, Source]) -> list[Source]:
    """The modules of core and plugins, and the examples."""
    found = [source for source in sources.values() if not source.name.startswith("kernels")]
    for path in sorted((repository / "examples").rglob("*.py")):
        text = path.read_text()
        found.append(Source(path, f"examples.{path.stem}", text, ast.parse(text)))
    return found


def test_no_kernel_is_imported_by_name(callers: list[Source]) -> None:
    assert violations(callers) == []


def test_every_exception_is_needed(callers: list[Source]) -> None:
    used = {(source.name, name) for source in callers for name in imported_kernels(source)}
    assert set(EXCEPTIONS) - used == set()
    assert set(ALLOWED) - {name for _, name in used} == set()


@pytest.mark.parametrize(
    "line",
    [
        "from trunkline.kernels.cpu import gemm",
        "from trunkline.kernels.cpu.gemm import product",
        "import trunkline.kernels.cpu.pool",
        "from trunkline.kernels.pool import pool_cpu",
        "from trunkline.kernels.norm import rms_norm_reference",
        "from trunkline.kernels import norm",
        "import trunkline.kernels",
        "from trunkline import kernels",
        "from trunkline.kernels.backend import CPU",
        "from trunkline.kernels.backend import norm",
        "from trunkline.kernels.cpu.launches.recording import Recording",
        "def late():\n    from trunkline.kernels.rope import rope_cpu",
    ],
)
def test_a_kernel_that_is_imported_is_found(line: str) -> None:
    assert violations([Source(Path("x.py"), "trunkline.core.model.experts", line, ast.parse(line))]) != []


@pytest.mark.parametrize(
    "line",
    [
        "from trunkline.kernels.layout import Layout",
        "if TYPE_CHECKING:\n    from trunkline.kernels.linear import PackedLinear",
    ],
)
def test_types_may_be_imported(line: str) -> None:
    assert violations([Source(Path("x.py"), "trunkline.core.model.experts", line, ast.parse(line))]) == []
