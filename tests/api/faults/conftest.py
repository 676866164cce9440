"""The servers of the fault matrix, checkpoints that can't be loaded, and the file with the counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from . import runs
from .install import install
from .table import FAULTS

FILE = "model.safetensors"
TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def repetitions(suite: Any) -> int:
    """How often each fault is caused."""
    return runs.repetitions(suite)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH where the plugin is installed."""
    return install(tmp_path_factory.mktemp("packages"))


@pytest.fixture
def start(shared_server: Callable[..., Any], checkpoint: Path, packages: Path) -> Callable[..., Any]:
    """``start(flags)``: the server with these flags, a new one if it has ended."""
    environment = {"PYTHONPATH": str(packages)}
    return lambda flags: shared_server(str(checkpoint), *flags, environment=environment)


@pytest.fixture(scope="session")
def checkpoints(other: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound checkpoint of the served model with other weights, and its damaged copies by fault."""
    sound = other("llama")
    tensors = load_file(sound / FILE)
    contents = {
        "a tensor is missing": {name: one for name, one in tensors.items() if name != TENSOR},
        "an unknown tensor": tensors | {"model.layers.1.mlp.surplus.weight": tensors[TENSOR].clone()},
        "a wrong shape": tensors | {TENSOR: tensors[TENSOR][1:].contiguous()},
        "a wrong dtype": tensors | {TENSOR: tensors[TENSOR].int()},
    }
    found = {"sound": sound}
    for name in (*contents, "another config", "a cut file", "a damaged header"):
        folder = found[f"update: {name}"] = tmp_path_factory.mktemp("damaged") / "model"
        shutil.copytree(sound, folder)
        if name in contents:
            save_file(contents[name], folder / FILE, {"format": "pt"})
    config = found["update: another config"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 2}))
    data = (sound / FILE).read_bytes()
    (found["update: a cut file"] / FILE).write_bytes(data[: len(data) // 2])
    (found["update: a damaged header"] / FILE).write_bytes(data[:8] + b"\xff" * 64 + data[72:])
    return found


@pytest.fixture(scope="module")
def counts(repository: Path) -> Iterator[dict[str, Any]]:
    """Counts by fault, which are written below benchmarks/results."""
    with runs.recorded(repository / "benchmarks" / "results", "reliability", FAULTS) as counts:
        yield counts
