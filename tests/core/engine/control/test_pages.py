"""Which pages tensors lie in, and that their contents come back."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from trunkline.core.engine.control import pages
from trunkline.core.engine.control.pages import SavedPages, disjoint, pages_of, release_pages, tensors_of, total_bytes
from trunkline.kernels.cpu import gelu, objects
from trunkline.kernels.linear import PackedLinear

PAGE = mmap.PAGESIZE
MIB = 1 << 20


def test_pages_are_whole_and_inside() -> None:
    tensor = torch.ones(64 * MIB // 4)
    (page,) = pages_of([tensor, tensor[5:], tensor.view(-1, 4)])  # views share a storage
    start, end = page
    assert start % PAGE == end % PAGE == 0
    assert tensor.data_ptr() <= start < end <= tensor.data_ptr() + tensor.nbytes
    assert end - start > tensor.nbytes - 2 * PAGE
    assert pages_of([torch.ones(3), torch.ones(0), torch.ones(9, device="meta")]) == []


def test_regions_without_others() -> None:
    regions = [(0, 10), (20, 30), (40, 50)]
    assert disjoint(regions, []) == regions
    assert disjoint(regions, [(9, 21)]) == [(40, 50)]
    assert disjoint(regions, [(10, 20), (49, 60)]) == [(0, 10), (20, 30)]
    assert total_bytes(regions) == 30


class Holder:
    __slots__ = ("inside",)

    def __init__(self, inside: Any) -> None:
        self.inside = inside


def test_tensors_are_found_wherever_they_are_held() -> None:
    tensors = [torch.full((2,), float(index)) for index in range(9)]
    closed, default = tensors[0], tensors[1]

    def function(x: torch.Tensor = default) -> torch.Tensor:
        return closed + x

    module = nn.Linear(2, 2)
    module.extra = Holder([{"a": (tensors[2],)}, {tensors[3]}])  # type: ignore[assignment]
    module.register_buffer("buffer", tensors[4])
    loop: list[Any] = [tensors[5]]
    loop.append(loop)
    root = SimpleNamespace(a=function, b=module, c=loop, d=iter([tensors[6]]), e=Holder(tensors[7]).__init__, f=torch)
    found = {id(tensor) for tensor in tensors_of(root)}
    assert {id(tensor) for tensor in (*tensors[:7], module.weight)} <= found
    assert id(tensors[8]) not in found  # in no module's globals, nor in the frame of this test


def test_kernels_do_not_lead_to_tensors_of_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that isn't from the cache on disk keeps its compiler's data, globals of modules among them."""
    monkeypatch.setattr(objects, "load", lambda identity: None)
    table, kernel, mine = gelu._table(), gelu._computed.__wrapped__("gelu", torch.float32), torch.zeros(3)
    assert [tensor for tensor in tensors_of([kernel, mine]) if tensor is table or tensor is mine] == [mine]
    monkeypatch.setattr(pages, "NOT_TRAVERSED", (type, ModuleType, str, bytes, int, float))
    assert any(tensor is table for tensor in tensors_of(kernel))


def test_contents_come_back_to_the_same_addresses(tmp_path: Path) -> None:
    dice = random.Random(1)
    tensors = [torch.randn(dice.randint(1, 3 * MIB)) for _ in range(20)]
    copies = [tensor.clone() for tensor in tensors]
    found = pages_of(tensors)
    before = psutil.Process().memory_info().rss
    saved = SavedPages(found, tmp_path)
    release_pages(found)
    released = before - psutil.Process().memory_info().rss
    assert released > 0.9 * total_bytes(found)
    assert not any(
        torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True) if tensor.nbytes > MIB
    )
    assert list(tmp_path.iterdir()) == []  # the file has no name
    saved.restore()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_a_disk_without_room_is_noticed_before_anything_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.ones(MIB)
    monkeypatch.setattr(pages.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="1000 are free"):
        SavedPages(pages_of([tensor]), tmp_path)
    assert tensor.sum() == MIB


def test_a_file_that_is_cut_short_is_noticed(tmp_path: Path) -> None:
    tensor = torch.ones(MIB)
    saved = SavedPages(pages_of([tensor]), tmp_path)
    os.ftruncate(saved._file.fileno(), PAGE)
    with pytest.raises(OSError, match="cut short"):
        saved.restore()


def test_memory_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(OSError):  # noqa: PT011 (the system's own words)
        release_pages([(PAGE * 16, PAGE * 17)])


@pytest.mark.parametrize("onednn", [False, True])
def test_packed_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    """Those of oneDNN have no storage, but an address and a size."""
    if onednn and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN packs no bfloat16 matrices on this CPU")
    monkeypatch.setattr("trunkline.kernels.linear.has_bfloat16_pairs", lambda: not onednn)
    monkeypatch.setattr("trunkline.kernels.linear.has_bfloat16", lambda: onednn)
    weight = torch.randn(1024, 1024).bfloat16()
    linear = PackedLinear(weight)
    assert linear.onednn == onednn
    found = pages_of(tensors_of(linear))
    assert total_bytes(found) > 0.9 * weight.nbytes
    saved = SavedPages(found, tmp_path)
    release_pages(found)
    assert not torch.equal(linear.weight(slice(0, 1024)), weight)
    saved.restore()
    assert torch.equal(linear.weight(slice(0, 1024)), weight)
