"""Checkpoints of one architecture with different numbers in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


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
