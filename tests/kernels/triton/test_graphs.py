"""Decode passes on Triton kernels as graphs, in the interpreter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.core.engine.device.fake_graph import CaptureError
from tests.core.engine.device.test_graphs import LONGEST, ROWS, World
from trunkline.core import Engine
from trunkline.core.model.loaded import LoadedModel
from trunkline.kernels.layout import Layout
from trunkline.kernels.triton import attention_decode

from .variants import recorded

# A group of heads; windows and soft caps; sinks; chunks; widths that differ; experts.
NAMES = ["llama", "gemma2", "gpt-oss", "llama4", "deepseek-v3", "qwen3-moe"]
SUITE = {"gemma2", "gpt-oss", "llama4", "deepseek-v3"}


@pytest.fixture(scope="module")
def world_of(zoo: Callable[[str], Path]) -> Iterator[Callable[[str], World]]:
    engines: dict[str, Engine] = {}

    def load(name: str) -> World:
        if name not in engines:
            engines[name] = Engine(str(zoo(name)), dtype="float32", threads=1, attention_backend="triton")
        model: LoadedModel = engines[name].client.transport.loop.lanes[0].model
        assert model.backend.name == "triton"
        return World.of(model)

    yield load
    for engine in engines.values():
        engine.close()


def difference(world: World, model: LoadedModel, passes: list[list[int]]) -> float:
    """Of replays of graphs of ``model`` from eager passes of the world's model, the largest one; NaN if any is NaN."""
    graphs = replace(world, model=model).graphs()
    graphs.capture()
    found = [(world.run(lengths, graphs) - world.run(lengths, None)).abs().max() for lengths in passes]
    return float(torch.stack(found).max())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.interpreter if name in SUITE else []) for name in NAMES]
)
def test_replays_equal_eager_passes(name: str, world_of: Callable[[str], World]) -> None:
    """Captured with padding rows alone: their table row has no slots, and their slot has NaN."""
    dice = random.Random(name)
    passes = [[dice.randint(2, LONGEST) for _ in range(rows)] for rows in (1, 3, 5, ROWS)]
    world = world_of(name)
    assert difference(world, world.model, passes) < 1e-4


@pytest.mark.parametrize(("name", "writes"), [("llama", False), ("qwen3-moe", False), ("gpt-oss", True)])
def test_fused_layers_write_keys_and_values_with_the_rotation(
    name: str, writes: bool, world_of: Callable[[str], World]
) -> None:
    """Other layers do it in a launch of its own, before attention."""
    world = world_of(name)
    with recorded(run=True) as variants:
        world.run([5, 9], None)
    assert ("write_kernel" in variants, "rope_kernel" in variants) == (writes, not writes)
    assert all(len(found) == 1 for found in variants.values())


def lengths_of_the_host(*arguments: Any, **options: Any) -> None:
    """A launcher that makes a tensor of the layout's lengths."""
    layout: Layout = arguments[3]
    assert layout.tensors is not None
    lengths = torch.from_numpy(layout.kv_len)
    attention_decode.decode(
        *arguments[:3], replace(layout, tensors=layout.tensors._replace(kv_len=lengths)), *arguments[4:], **options
    )


def window_of_the_host(*arguments: Any, **options: Any) -> None:
    """A launcher that bounds the visible keys by a length on the host."""
    row_ids = np.asarray(arguments[4])
    options["window"] = max(1, int(arguments[3].kv_len[row_ids].max()) // 8)
    attention_decode.decode(*arguments, **options)


def test_a_launcher_that_copies_values_of_the_host_is_seen(world_of: Callable[[str], World]) -> None:
    world = world_of("llama")
    copies = replace(world.model, backend=replace(world.model.backend, decode=lengths_of_the_host))
    with pytest.raises(CaptureError):
        replace(world, model=copies).graphs().capture()


def test_numbers_of_the_host_in_a_graph_are_seen(world_of: Callable[[str], World]) -> None:
    world = world_of("llama")
    bounded = replace(world.model, backend=replace(world.model.backend, decode=window_of_the_host))
    assert not difference(world, bounded, [[30, 9]]) < 1e-3
