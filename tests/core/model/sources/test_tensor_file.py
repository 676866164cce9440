"""Safetensors files are read as safetensors reads them, and what happens to a file meanwhile is an error."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from trunkline.core.errors import ModelError
from trunkline.core.model import loader
from trunkline.core.model.sources import tensor_file, tokenizer
from trunkline.core.model.sources.info import read_info
from trunkline.core.model.sources.tensor_file import DTYPES, stored_tensors
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelSource
from trunkline.kernels.backend import choose

pytestmark = pytest.mark.field


def written(path: Path, entries: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 90).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_is_read_as_safetensors_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "scalar": values(dtype),
        "none": values(dtype, 3, 0),
        "row": values(dtype, 7),
        "cube": values(dtype, 5, 4, 3),
    }
    save_file(tensors, path, {"format": "pt"})
    expected, found = load_file(path), stored_tensors(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        read = found[name][...].to(device="cpu")
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape) == (found[name].dtype, found[name].shape)
        assert torch.equal(read.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_what_is_converted_in_pieces_is_what_torch_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, target: torch.dtype
) -> None:
    monkeypatch.setattr(tensor_file, "PIECE", 64)
    path = tmp_path / "model.safetensors"
    for shape in ((), (0,), (16,), (17,), (9, 31)):
        save_file({"a": values(dtype, *shape)}, path)
        read = stored_tensors(path)["a"][...].to("cpu", target)
        assert read.shape == shape
        assert torch.equal(read, load_file(path)["a"].to(target))


@pytest.mark.parametrize(
    ("entries", "data", "length", "words"),
    [
        (b"", b"", None, "damaged"),
        (entry(), bytes(8), 1 << 40, "its header has"),
        (entry(), b"", 200, "cut short"),
        (b"{", b"", None, "damaged"),
        (b"[]", b"", None, "damaged"),
        (b'{"a": 5}', b"", None, "damaged"),
        (entry(dtype="F4"), bytes(8), None, "it stores F4"),
        (entry(shape=(-2,)), bytes(8), None, "damaged"),
        (entry(shape=(3,)), bytes(8), None, "8 bytes are no F32 tensor"),
        (entry(shape=(1 << 40, 1 << 40)), bytes(8), None, "no F32 tensor"),
        (entry(offsets=(8, 0)), bytes(8), None, "no F32 tensor"),
        (entry(offsets=(-8, 0)), bytes(8), None, "damaged"),
        (entry(), bytes(7), None, "are needed"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, entries: Any, data: bytes, length: int | None, words: str) -> None:
    path = written(tmp_path / "model.safetensors", entries, data, length)
    with pytest.raises(ModelError, match=words):
        stored_tensors(path)


def replaced_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"x" * 100)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


CHANGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: os.truncate(path, path.stat().st_size // 2), "changed while it was read"),
    (overwritten, "changed while it was read"),
    (Path.unlink, "can't be read: No such file"),
    (replaced_by_a_pipe, "is not a regular file"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
@pytest.mark.parametrize("name", ["llama", "mixtral"])  # one tensor each, and several that are merged
def test_a_file_that_changes_while_it_is_read_is_an_error(
    zoo: Callable[[str], Path], tmp_path: Path, name: str, change: Callable[[Path], Any], words: str
) -> None:
    """With a mapped file, cutting it short would kill the process."""
    folder = tmp_path / "m"
    folder.mkdir()
    for path in zoo(name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings, source = ModelSettings(model_path=str(folder), dtype="float32"), ModelSource("m", str(folder))
    stored = stored_tensors(folder / "model.safetensors")
    change(folder / "model.safetensors")
    with pytest.raises(ModelError, match=words):
        loader.load(source, read_info_of(zoo(name)), settings, [], choose("cpu", "cpu"), weights=stored.items())


def read_info_of(folder: Path) -> Any:
    return read_info(ModelSource("m", str(folder)), ModelSettings(model_path=str(folder)))


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


SPECIAL: list[Callable[[Path], Any]] = [os.mkfifo, make_socket, lambda path: path.symlink_to("/dev/zero")]


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "1_Pooling/config.json"]
)
def test_pipes_sockets_and_devices_are_not_opened(
    zoo: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Any], name: str
) -> None:
    monkeypatch.chdir(tmp_path)  # socket names are short
    folder = Path("m")
    (folder / "1_Pooling").mkdir(parents=True)
    for path in zoo("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(ModelError, match=rf"{name} is a pipe, a socket or a device"):
        read_info_of(folder)
    with pytest.raises(ModelError, match=rf"{name} is a pipe, a socket or a device"):
        tokenizer.load(ModelSource("m", str(folder)))


def test_links_that_lead_nowhere_count_as_nothing(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for path in zoo("llama").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "preprocessor_config.json").symlink_to("nowhere")
    (folder / "self").symlink_to("self")
    assert read_info_of(folder) == msgspec.structs.replace(read_info_of(zoo("llama")), path=str(folder))
