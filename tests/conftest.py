"""What must be set before anything is imported, and what all tests share."""

# ruff: noqa: E402

from __future__ import annotations

import os

# Two spinning OpenMP pools on two busy cores are many times slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton kernels run on CPU tensors when this is set before they are defined.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests are offline: a test that would download fails at once instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
# The settings of whoever runs the tests are none of their business.
for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "GITHUB_ACTIONS"):
    os.environ.pop(name, None)
os.environ.update(NO_COLOR="1", TERM="dumb", COLUMNS="200")

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from safetensors.torch import load_file, save_file

pytest_plugins = ["trunkline.core.testing"]  # the fixture ``zoo``

hypothesis.settings.register_profile("trunkline", deadline=None, print_blob=True)
hypothesis.settings.load_profile("trunkline")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The project's root folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def other(zoo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a checkpoint's name to a copy with other numbers in every tensor."""
    root = tmp_path_factory.mktemp("other")

    def checkpoint(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            shutil.copytree(zoo(name), folder)
            tensors = load_file(folder / "model.safetensors")
            changed = {key: (tensor.roll(7, -1) * 0.9).contiguous() for key, tensor in tensors.items()}
            save_file(changed, folder / "model.safetensors", {"format": "pt"})
        return folder

    return checkpoint


@pytest.fixture(scope="session")
def load_script(repository: Path) -> Callable[[str], ModuleType]:
    """A function from a path in the project, of a file that is in no package, to its module."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(path).stem, repository / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
