"""Decode passes as graphs: replays with other rows and lengths equal eager passes; what can't be captured is seen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trunkline.core import Engine
from trunkline.core.cache.pool import KVPool, SlotTable
from trunkline.core.engine import startup
from trunkline.core.engine.device.graphs import INPUTS, DecodeGraphs, capture_graphs, padded_sizes
from trunkline.core.engine.device.table import DeviceTable
from trunkline.core.engine.packing import pack
from trunkline.core.engine.scheduling.row import Row
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.types import Needs, Request
from trunkline.kernels import attention_decode
from trunkline.plugins.generation.schemas import GenerationParams

from .fake_graph import CaptureError
from .late import LateDevice

ROWS, LONGEST = 9, 40
# Windows and soft caps, sinks, chunks, a cap of logits, key and value widths that differ, biases, experts.
NAMES = ["llama", "gemma2", "gpt-oss", "llama4", "deepseek-v3", "qwen3-moe", "phi3", "gemma3"]


@dataclass
class World:
    """A model with a pool full of random keys and values, and a table of random slots."""

    model: LoadedModel
    pool: KVPool
    table: SlotTable
    device: LateDevice
    on_device: DeviceTable

    @classmethod
    def of(cls, model: LoadedModel) -> World:
        pool = KVPool(model.kv_shapes, ROWS * LONGEST, model.dtype, "cpu")
        noise = torch.Generator().manual_seed(1)
        for tensor in (*pool.keys, *pool.values):
            tensor[:-1].normal_(generator=noise)
            tensor[-1].fill_(torch.nan)  # the slot of rows that only pad, which no other row may see
        table, device = SlotTable(ROWS, LONGEST), LateDevice()
        slots = np.random.default_rng(1).permutation(ROWS * LONGEST).astype(np.int32).reshape(ROWS, LONGEST)
        on_device = DeviceTable(table, device, pool.slots)
        for row in range(ROWS):
            table.write(row, 0, slots[row])
        on_device.update(device.upload(on_device.changes()))
        return cls(model, pool, table, device, on_device)

    def graphs(self) -> DecodeGraphs:
        return DecodeGraphs(self.model, self.pool, self.on_device, self.device, self.model.expert_watch, rows=ROWS)

    def run(self, lengths: list[int], graphs: DecodeGraphs | None) -> torch.Tensor:
        """The hidden rows of rows that decode their last token; eagerly without graphs."""
        rows = [row_of(index, length) for index, length in enumerate(lengths)]
        packed = pack(rows, self.table, (), token_types=False)
        assert packed.decodes == len(rows)
        arrays = packed.arrays | packed.layout_arrays if graphs is None else graphs.inputs_for(packed)
        assert arrays is not None
        inputs = self.device.upload(arrays)
        if graphs is not None:
            return graphs.run(len(rows), inputs)
        return self.model.forward(
            inputs["ids"], inputs["positions"], packed.layout(inputs, self.on_device.tensor), self.pool
        )


def row_of(index: int, length: int) -> Row:
    tokens = [(7 * index + 3 * position) % 90 for position in range(length)]
    request = Request(key=index, rid="", task="t", params=None, tokens=tokens, prompt_len=length - 1)
    request.needs = Needs()
    return Row(request, length - 1, length, (2 * index) % ROWS, final=True)


@pytest.fixture(scope="module")
def model_of(zoo: Callable[[str], Path]) -> Iterator[Callable[[str], LoadedModel]]:
    engines: dict[str, Engine] = {}

    def load(name: str) -> LoadedModel:
        if name not in engines:
            engines[name] = Engine(str(zoo(name)), dtype="float32", threads=1, attention_backend="torch_native")
        model: LoadedModel = engines[name].client.transport.loop.lanes[0].model
        return model

    yield load
    for engine in engines.values():
        engine.close()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(passes=st.lists(st.lists(st.integers(2, LONGEST), min_size=1, max_size=ROWS), min_size=1, max_size=3))
def test_replays_equal_eager_passes(
    name: str, passes: list[list[int]], model_of: Callable[[str], LoadedModel], cache: dict[str, Any]
) -> None:
    world = cache.setdefault(name, World.of(model_of(name)))
    graphs = cache.setdefault(f"{name} graphs", world.graphs())
    if not graphs._captured:
        graphs.capture()
    captures = dict(graphs._captured)
    for lengths in passes:
        found = world.run(lengths, graphs)
        torch.testing.assert_close(found, world.run(lengths, None), atol=1e-4, rtol=1e-4)
    assert graphs._captured == captures, "a graph was captured while serving"


@pytest.fixture(scope="module")
def cache() -> dict[str, Any]:
    return {}


def largest_difference(world: World, model: Any) -> float:
    """Between replays of a graph of ``model`` and eager passes of the world's model."""
    graphs = DecodeGraphs(model, world.pool, world.on_device, world.device, rows=ROWS)
    graphs.capture()
    return max(
        float((world.run(lengths, graphs) - world.run(lengths, None)).abs().max())
        for lengths in ([5, 30, 12], [9], [40] * 9)
    )


def test_numbers_of_the_host_in_a_graph_are_seen(model_of: Callable[[str], LoadedModel]) -> None:
    """A decode kernel that takes lengths from the layout's arrays has those of the capture in every replay."""
    world = World.of(model_of("llama"))
    assert largest_difference(world, world.model) < 1e-5
    by_host = replace(world.model.backend, decode=attention_decode.decode_reference)
    assert not largest_difference(world, replace(world.model, backend=by_host)) < 1e-3


def test_without_the_slot_of_its_own_padding_is_seen(model_of: Callable[[str], LoadedModel]) -> None:
    """Rows that pad must not write to a slot that a request has."""
    world = World.of(model_of("llama"))
    graphs = world.graphs()
    graphs._filler[2] = world.table.slots[0, 3]
    graphs.capture()
    expected = world.run([12, 5, 9], None)
    found = world.run([12, 5, 9], graphs)
    assert not float((world.run([12, 5, 9], graphs) - expected).abs().max()) < 1e-3
    assert found.shape == expected.shape


class Reads:
    """A model whose forward pass does what a graph can't have."""

    def __init__(self, model: LoadedModel, what: str) -> None:
        self.model, self.what = model, what

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, layout: Any, pool: Any, /) -> torch.Tensor:
        hidden = self.model.forward(ids, positions, layout, pool)
        if self.what == "value" and float(hidden[0, 0]) > 1e9:
            return hidden
        return hidden[hidden[:, 0].nonzero()[:, 0]] if self.what == "shape" else hidden


@pytest.mark.parametrize("what", ["value", "shape"])
def test_what_cannot_be_captured_runs_eagerly(
    what: str, model_of: Callable[[str], LoadedModel], caplog: pytest.LogCaptureFixture
) -> None:
    world = World.of(model_of("llama"))
    graphs = DecodeGraphs(Reads(world.model, what), world.pool, world.on_device, world.device, rows=ROWS)
    with pytest.raises(CaptureError):
        graphs.capture()
    with caplog.at_level(logging.WARNING):
        assert capture_graphs(graphs, "m") is None
    assert "m: no CUDA graphs, decoding is slower" in caplog.text


class Layouts:
    """A model that keeps the layouts of its passes."""

    def __init__(self, model: LoadedModel) -> None:
        self.model, self.found = model, []

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, layout: Any, pool: Any, /) -> torch.Tensor:
        self.found.append(layout)
        return self.model.forward(ids, positions, layout, pool)


def test_lengths_of_a_capture_are_bounds(model_of: Callable[[str], LoadedModel]) -> None:
    """By them kernels divide their work so that it fits shorter rows, too."""
    world = World.of(model_of("llama"))
    layouts = Layouts(world.model)
    DecodeGraphs(layouts, world.pool, world.on_device, world.device, rows=2).capture()
    assert layouts.found
    assert all(layout.bounds and set(layout.kv_len) == {LONGEST} for layout in layouts.found)


def test_which_passes_are_graphs(model_of: Callable[[str], LoadedModel]) -> None:
    world = World.of(model_of("llama"))
    graphs = world.graphs()
    decoding = pack([row_of(0, 5), row_of(1, 9), row_of(2, 3)], world.table, (), token_types=False)
    assert graphs.inputs_for(decoding) is None, "nothing is captured yet"
    graphs.capture()
    inputs = graphs.inputs_for(decoding)
    assert inputs is not None
    assert inputs[INPUTS].shape == (5, 4)
    assert inputs[INPUTS][:, 3].tolist() == [0, 0, world.pool.slots, 1, world.on_device.unused_row]
    prompt = row_of(3, 9)
    prompt.start = 2
    assert graphs.inputs_for(pack([row_of(0, 5), prompt], world.table, (), token_types=False)) is None
    long = pack([row_of(0, 5)], world.table, (3,), token_types=False)
    assert graphs.inputs_for(long) is None, "its rotary frequencies differ"
    many = pack([row_of(index % ROWS, 5) for index in range(17)], world.table, (), token_types=False)
    assert graphs.inputs_for(many) is None


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize(
    ("flags", "overlaps", "graphs"),
    [({}, True, True), ({"disable_cuda_graph": True}, True, False), ({"disable_overlap_schedule": True}, False, True)],
)
def test_start_up_captures(
    flags: dict[str, bool], overlaps: bool, graphs: bool, zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the flags forbid it; results are those of the CPU."""
    asked = [5, 9, 33], GenerationParams(max_new_tokens=8, ignore_eos=True)
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "attention_backend": "torch_native"}
    folder = str(zoo("llama"))
    with Engine(folder, **options) as engine:
        expected = engine.submit("generation", *asked).result(60).tokens
    monkeypatch.setattr(startup, "choose_device", lambda name, **given: LateDevice(**given))
    with Engine(folder, cuda_graph_max_bs=4, **options, **flags) as engine:
        (lane,) = engine.client.transport.loop.lanes
        assert engine.submit("generation", *asked).result(60).tokens == expected
        assert lane.overlaps is overlaps
        assert (lane.runner.device.replays > 5) is graphs
        assert not graphs or lane.runner._graphs.sizes == [1, 2, 4]


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1, [1]), (3, [1, 2, 4]), (9, [1, 2, 4, 8, 16]), (4000, [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)])],
)
def test_padded_sizes(rows: int, sizes: list[int]) -> None:
    assert padded_sizes(rows) == sizes
