"""Short passes are replayed: any mix of decoding rows and prompts gives what the layers give one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trunkline.core.cache.pool import KVPool
from trunkline.core.model import attention
from trunkline.core.model.attention import ForwardContext, paged_layout
from trunkline.core.model.fusion.find_decoder import fuse
from trunkline.core.model.fusion.recorded import CAPACITY, RecordedLayers
from trunkline.kernels.backend import choose
from trunkline.kernels.cpu.launches.recording import Recording
from trunkline.kernels.cpu.processor import has_bfloat16_pairs
from trunkline.kernels.quantized.cache import dequantize, quantize

BACKEND = choose("cpu", "cpu")
MAX_LEN, ROWS = 400, 8
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # relative: decode attention divides its keys in another way

Spans = list[tuple[int, int]]


class World:
    """A fused model with a pool full of noise."""

    def __init__(self, folder: Path, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention.NAME
        )
        self.model.eval().requires_grad_(False)
        fuse(self.model, BACKEND)
        self.forward = self.model.model.forward
        self.dtype, self.kv_dtype = dtype, kv_dtype or dtype
        call = self.forward.layers[0].call
        self.shapes = [(call.kv_heads, call.width, call.width)] * len(self.forward.layers)
        self.allocate()
        self.table = np.random.default_rng(0).permutation(MAX_LEN * ROWS).astype(np.int32).reshape(ROWS, -1)

    def allocate(self) -> None:
        self.pool = KVPool(self.shapes, MAX_LEN * ROWS, self.kv_dtype, torch.device("cpu"))

    def run(self, spans: Spans, wanted: list[int] | None, *, replay: bool) -> tuple[torch.Tensor, bool]:
        """The hidden rows, then the keys and values of the last layer, as one vector; and ``picked``."""
        noise = torch.Generator().manual_seed(1)
        for tensor in (*self.pool.keys, *self.pool.values):
            if self.kv_dtype == torch.int8:
                tensor.copy_(quantize(torch.randn(*tensor.shape[:2], self.shapes[0][1], generator=noise)))
            else:
                tensor.normal_(generator=noise)
        layout = paged_layout(self.table, spans)
        tokens = sum(end - start for start, end in spans)
        ids = (torch.arange(tokens) * 31 + 7) % self.model.config.vocab_size
        places = torch.cat([torch.arange(start, end) for start, end in spans])
        needed = None if wanted is None else torch.tensor(wanted, dtype=torch.int64)
        context = ForwardContext(layout, self.pool, BACKEND, needed)
        self.forward.replay = replay
        with torch.inference_mode():
            output = self.model.model(input_ids=ids[None], position_ids=places[None], use_cache=False, trunk=context)
        stored = [self.pool.keys[-1], self.pool.values[-1]]
        if self.kv_dtype == torch.int8:
            stored = [dequantize(tensor, self.shapes[0][1]) for tensor in stored]
        parts = output.last_hidden_state[0], *stored
        return torch.cat([part.flatten() for part in parts]).float(), output.picked


@pytest.fixture(scope="module")
def worlds(zoo: Callable[[str], Path]) -> Callable[..., World]:
    attention.register()
    made: dict[Any, World] = {}

    def get(name: str, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> World:
        key = name, dtype, kv_dtype or dtype
        if key not in made:
            made[key] = World(zoo(name), *key[1:])
        return made[key]

    return get


def assert_same(world: World, spans: Spans, wanted: list[int] | None) -> None:
    expected, _ = world.run(spans, wanted, replay=False)
    replayed, picked = world.run(spans, wanted, replay=True)
    assert picked == (wanted is not None and world.forward.layers[-1].mlp is None)
    torch.testing.assert_close(replayed, expected, rtol=0, atol=LIMITS[world.dtype] * float(expected.abs().max()))


KINDS = [
    *((name, torch.float32) for name in ("llama", "qwen2", "qwen3", "gemma2", "qwen3-moe")),
    pytest.param(
        "llama",
        torch.bfloat16,
        marks=pytest.mark.skipif(not has_bfloat16_pairs(), reason="bfloat16 is recorded with AVX512_BF16 only"),
    ),
]


@st.composite
def passes(draw: st.DrawFn) -> tuple[Spans, list[int] | None]:
    """Decoding rows, then prompts, with or without cached prefixes; and the tokens that are wanted."""
    spans = [(n, n + 1) for n in draw(st.lists(st.integers(1, MAX_LEN - 1), max_size=4))]
    for start in draw(st.lists(st.just(0) | st.integers(1, 60), min_size=not spans, max_size=ROWS - 4)):
        spans.append((start, start + draw(st.integers(1, 40) | st.integers(1, 200))))
    tokens = sum(end - start for start, end in spans)
    return spans, draw(st.none() | st.lists(st.integers(0, tokens - 1), unique=True).map(sorted))


@pytest.mark.parametrize(("name", "dtype"), KINDS)
@given(each=passes())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_replay_equals_the_layers_one_by_one(
    worlds: Callable[[str, torch.dtype], World], name: str, dtype: torch.dtype, each: tuple[Spans, list[int] | None]
) -> None:
    assert_same(worlds(name, dtype), *each)


@given(each=passes())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_replay_over_an_int8_pool(worlds: Callable[..., World], each: tuple[Spans, list[int] | None]) -> None:
    world = worlds("llama", torch.float32, torch.int8)
    expected, _ = world.run(*each, replay=False)
    replayed, _ = world.run(*each, replay=True)
    # A number that is nearly half-way between two integers may be rounded to either.
    bound = 0.01 * float(expected.abs().max())
    torch.testing.assert_close(replayed, expected, rtol=0, atol=bound)


MIXED: tuple[Spans, list[int]] = ([(70, 71), (9, 10), (0, 33), (20, 61), (0, 5)], [0, 1, 34, 75, 80])


def test_one_recording_for_all_sizes(
    worlds: Callable[[str, torch.dtype], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = worlds("llama", torch.float32)
    world.forward._recorded = None
    made = []
    init = RecordedLayers.__init__
    monkeypatch.setattr(RecordedLayers, "__init__", lambda self, *rest: made.append(self) or init(self, *rest))
    runs = []
    run = Recording.run
    monkeypatch.setattr(Recording, "run", lambda self, rows, *rest: runs.append(rows) or run(self, rows, *rest))
    for spans in ([(0, 9)], [(9, 10)], [(9, 10), (0, 200)], [(0, CAPACITY)], [(0, CAPACITY + 1)], [(3, 4), (4, 5)]):
        assert_same(world, spans, None)
    assert len(made) == 1
    assert runs == [9, 1, 201, CAPACITY, 2]  # a longer one isn't replayed


def test_another_pool_is_recorded_anew(worlds: Callable[[str, torch.dtype], World]) -> None:
    world = worlds("llama", torch.float32)
    assert_same(world, *MIXED)
    former = world.forward._recorded
    world.allocate()
    assert_same(world, *MIXED)
    assert world.forward._recorded is not former


def test_recorded_attention_runs_on_all_threads(worlds: Callable[[str, torch.dtype], World]) -> None:
    """Even if the first pass is short: with several threads, decode attention has a second launch, which merges."""
    world = worlds("llama", torch.float32)
    before, sizes = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            world.forward._recorded = None
            assert_same(world, [(1, 2)], None)
            sizes.append(len(world.forward._recorded._recordings[0][0]))
    finally:
        torch.set_num_threads(before)
        world.forward._recorded = None
    assert sizes[1] - sizes[0] == len(world.forward.layers)


def forget_decodes(self: Recording, rows: int, decodes: int, prompts: int, end: int | None, run: Any) -> None:
    run(self, rows, 0, prompts, end)


def forget_prompts(self: Recording, rows: int, decodes: int, prompts: int, end: int | None, run: Any) -> None:
    run(self, rows, decodes, 0, end)


def one_prompt_less(self: Recording, rows: int, decodes: int, prompts: int, end: int | None, run: Any) -> None:
    run(self, rows, decodes, prompts - 1, end)


def stop_too_early(self: Recording, rows: int, decodes: int, prompts: int, end: int | None, run: Any) -> None:
    run(self, rows, decodes, prompts, end and end - 1)


def keep_claims(self: Recording, rows: int, decodes: int, prompts: int, end: int | None, run: Any) -> None:
    self._claimed = self._claimed[:0]
    run(self, rows, decodes, prompts, end)
    run(self, rows, decodes, prompts, end)


@pytest.mark.parametrize("defect", [forget_decodes, forget_prompts, one_prompt_less, stop_too_early, keep_claims])
def test_a_defect_is_noticed(
    worlds: Callable[[str, torch.dtype], World],
    zoo: Callable[[str], Path],
    defect: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the comparison of these tests, and by the one at load."""
    world = worlds("llama", torch.float32)
    world.forward._recorded = None
    run = Recording.run
    monkeypatch.setattr(
        Recording,
        "run",
        lambda self, rows, decodes=0, prompts=0, end=None: defect(self, rows, decodes, prompts, end, run),
    )
    with pytest.raises(AssertionError):
        assert_same(world, *MIXED)
    world.forward._recorded = None
    assert not World(zoo("llama"), torch.float32).forward.replay or defect is keep_claims
