"""Compiled kernels kept on disk: found again, told apart, and never trusted blindly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trunkline.kernels import compiled
from trunkline.kernels.cpu import objects
from trunkline.kernels.cpu.attention import paged
from trunkline.kernels.cpu.threads import Kernel, float32s


class Arguments:
    x: int
    n: int


def scaling(factor: float) -> Callable[[], torch.Tensor]:
    """A small kernel; each call makes its task anew, as a new process would, and runs it."""

    def body(a: object) -> None:
        x = float32s(a.x)  # type: ignore[attr-defined]
        for i in range(a.n):  # type: ignore[attr-defined]
            x[i] = x[i] * factor

    def run() -> torch.Tensor:
        x = torch.arange(4, dtype=torch.float32)
        Kernel(body, Arguments).run(1, x=x.data_ptr(), n=4)
        return x

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "kernels"
    compiled.keep_in(path)
    yield path
    compiled.keep_in(None)


def test_kept_code_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scaling(2.0)()
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(Kernel, "_compile", None)  # any compilation now fails
    assert torch.equal(scaling(2.0)(), first)
    assert first.tolist() == [0, 2, 4, 6]


def test_constants_tell_kernels_apart(folder: Path) -> None:
    assert scaling(2.0)().tolist() == [0, 2, 4, 6]
    assert scaling(3.0)().tolist() == [0, 3, 6, 9]
    assert len(list(folder.iterdir())) == 2


def test_damaged_file_is_replaced(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling(2.0)()
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    assert scaling(2.0)().tolist() == [0, 2, 4, 6]
    assert "damaged" in caplog.text
    monkeypatch.setattr(Kernel, "_compile", None)
    assert scaling(2.0)().tolist() == [0, 2, 4, 6]


def test_nothing_is_kept_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert scaling(2.0)().tolist() == [0, 2, 4, 6]
    assert list(tmp_path.iterdir()) == []


def test_folder_of_others_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chmod(shared, 0o777)
    compiled.keep_in(shared)
    scaling(2.0)()
    assert "chmod 700" in caplog.text
    assert list(shared.iterdir()) == []
    compiled.keep_in(None)


def test_fingerprint_reaches_nested_constants() -> None:
    prints = {objects.fingerprint(paged._segment(64, width, False, False)) for width in (32, 48)}
    assert len(prints) == 2
    assert "" not in prints
    assert objects.fingerprint(object()) == ""


def test_every_kernel_source_is_part_of_the_name(repository: Path) -> None:
    assert objects._sources() == sorted((repository / "kernels").rglob("*.py"))
