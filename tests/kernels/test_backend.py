"""Attention of both backends against one naive float64 formula, and the choice of a backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.kernels import attention_extend
from trunkline.kernels import backend as backend_module
from trunkline.kernels.backend import Backend, choose
from trunkline.kernels.cpu.attention import paged
from trunkline.kernels.layout import Layout

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
WIDTHS = [(9, 3, 64, 64), (4, 4, 48, 32), (4, 2, 32, 40), (8, 1, 20, 20)]  # H, KV, D, Dv
RULES: list[dict[str, Any]] = [
    {},
    {"window": 8},
    {"softcap": 5.0},
    {"sinks": True},
    {"chunk": 8},
    {"window": 20, "sinks": True, "softcap": 3.0},
]


@dataclass
class Case:
    """Rows with ``news[r]`` new tokens of ``lens[r]``, their slots scattered over a pool."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    layout: Layout

    @classmethod
    def build(
        cls, widths: tuple[int, int, int, int], lens: list[int], news: list[int], dtype: torch.dtype, seed: int = 0
    ) -> Case:
        heads, groups, width, value_width = widths
        generator = torch.Generator().manual_seed(seed)
        order = np.random.default_rng(seed)
        rows, longest, tokens = len(lens), max(lens), sum(news)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        table = order.permutation(rows * longest).reshape(rows, longest).astype(np.int32)
        slots = np.concatenate([table[r, lens[r] - news[r] : lens[r]] for r in range(rows)])
        decodes = 0
        while decodes < rows and news[decodes] == 1:
            decodes += 1
        layout = Layout(
            q_start=np.cumsum([0, *news]).astype(np.int32),
            kv_len=np.array(lens, np.int32),
            table_row=np.arange(rows, dtype=np.int32),
            table=table,
            out_slots=torch.from_numpy(slots.astype(np.int64)),
            decodes=decodes,
        )
        pool = rows * longest
        # The queries come as the transposed view that transformers hands over.
        q = noise(heads, tokens, width).transpose(0, 1)
        k, v = noise(tokens, groups, width), noise(groups, tokens, value_width).transpose(0, 1)
        return cls(q, k, v, noise(pool, groups, width), noise(pool, groups, value_width), layout)

    def run(self, backend: Backend, *, pool: bool = True, **rules: Any) -> torch.Tensor:
        self.layout.split = None
        keys, values = (self.keys.clone(), self.values.clone()) if pool else (None, None)
        return backend.attention(self.q, self.k, self.v, keys, values, self.layout, scale=0.2, **rules)

    def naive(
        self,
        *,
        pool: bool = True,
        causal: bool = True,
        window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        chunk: int = 0,
    ) -> torch.Tensor:
        """Query by query, head by head, key by key, in float64."""
        q, k, v = self.q.double(), self.k.double(), self.v.double()
        keys, values = self.keys.double().clone(), self.values.double().clone()
        keys[self.layout.out_slots], values[self.layout.out_slots] = k, v
        out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
        share = q.shape[1] // k.shape[1]
        for r in range(self.layout.rows):
            begin, end = int(self.layout.q_start[r]), int(self.layout.q_start[r + 1])
            length = int(self.layout.kv_len[r])
            slots = torch.from_numpy(self.layout.table[r, :length].astype(np.int64))
            row_k, row_v = (keys[slots], values[slots]) if pool else (k[begin:end], v[begin:end])
            for t in range(begin, end):
                at = length - (end - begin) + t - begin
                seen = [
                    j
                    for j in range(length)
                    if (not causal or j <= at)
                    and (not window or abs(at - j) < window)
                    and (not chunk or at // chunk == j // chunk)
                ]
                for h in range(q.shape[1]):
                    scores = row_k[seen, h // share] @ q[t, h] * 0.2
                    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                    column = scores if sinks is None else torch.cat([scores, sinks[h : h + 1].double()])
                    out[t, h] = column.softmax(0)[: len(seen)] @ row_v[seen, h // share]
        return out


@pytest.fixture(params=["cpu", "torch_native"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return choose(request.param, "cpu")


def rules_for(rule: dict[str, Any], heads: int) -> dict[str, Any]:
    return rule | ({"sinks": torch.linspace(-1, 2, heads)} if rule.get("sinks") else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_mixed_batch_equals_naive(
    backend: Backend, dtype: torch.dtype, widths: tuple[int, int, int, int], rule: dict[str, Any]
) -> None:
    """Decode rows, a short and a long extension over a prefix, a whole prompt, in one batch."""
    case = Case.build(widths, [5, 41, 9, 30, 12], [1, 1, 3, 11, 12], dtype)
    rules = rules_for(rule, widths[0])
    torch.testing.assert_close(
        case.run(backend, **rules).double(), case.naive(**rules), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_without_pool(backend: Backend, causal: bool, rule: dict[str, Any]) -> None:
    case = Case.build((4, 2, 32, 32), [1, 5, 26], [1, 5, 26], torch.float32)
    rules = rules_for(rule, 4) | {"causal": causal}
    result = case.run(backend, pool=False, **rules)
    torch.testing.assert_close(result.double(), case.naive(pool=False, **rules), atol=2e-5, rtol=2e-5)


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four threads, for work of any size."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(attention_extend, "MIN_PARALLEL", 0)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rows_shared_by_threads(data: st.DataObject) -> None:
    """Whatever the split of rows over threads, the merged parts equal the whole."""
    lens = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=6))
    news = [1] * len(lens)
    rules = data.draw(st.sampled_from([{}, {"window": 33}, {"chunk": 50}, {"sinks": torch.linspace(-1, 2, 9)}]))
    case = Case.build((9, 3, 64, 64), lens, news, torch.float32)
    cpu, native = choose("cpu", "cpu"), choose("torch_native", "cpu")
    torch.testing.assert_close(case.run(cpu, **rules), case.run(native, **rules), atol=2e-5, rtol=2e-5)


@pytest.mark.usefixtures("four_threads")
def test_a_lost_merge_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: when the parts of a shared row aren't merged, the comparison above sees it."""
    run = paged.Kernel.run
    monkeypatch.setattr(paged.Kernel, "run", lambda self, team, alone=False, **given: alone or run(self, team, **given))
    case = Case.build((9, 3, 64, 64), [150], [1], torch.float32)
    difference = case.run(choose("cpu", "cpu")) - case.run(choose("torch_native", "cpu"))
    assert not difference.abs().max() < 2e-5


def test_a_row_does_not_depend_on_its_batch() -> None:
    cpu = choose("cpu", "cpu")
    case = Case.build((9, 3, 64, 64), [40, 30, 20], [1, 1, 1], torch.float32)
    whole = case.run(cpu)
    case.values[torch.from_numpy(case.layout.table[1, :29].astype(np.int64))] = torch.nan
    poisoned = case.run(cpu)
    assert torch.isnan(poisoned[1]).all()
    assert torch.equal(poisoned[[0, 2]], whole[[0, 2]])


def test_pool_receives_the_new_tokens(backend: Backend) -> None:
    case = Case.build((4, 2, 32, 40), [5, 9], [1, 4], torch.float32)
    keys, values = case.keys.clone(), case.values.clone()
    backend.attention(case.q, case.k, case.v, keys, values, case.layout, scale=0.2)
    slots = case.layout.out_slots
    assert torch.equal(keys[slots], case.k)
    assert torch.equal(values[slots], case.v)
    untouched = torch.ones(len(keys), dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(keys[untouched], case.keys[untouched])


def test_keys_and_values_that_are_written_already(backend: Backend) -> None:
    """Attention reads them from the pool, and stores none."""
    case = Case.build((4, 2, 32, 32), [5, 9, 3], [1, 4, 3], torch.float32)
    expected = case.run(backend)
    keys, values, slots = case.keys.clone(), case.values.clone(), case.layout.out_slots
    keys[slots], values[slots] = case.k, case.v
    refusing = replace(backend, write=lambda *_: pytest.fail("written twice"))
    result = refusing.attention(case.q, case.k, case.v, keys, values, case.layout, scale=0.2, written=True)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", [None, "auto", "cpu"])
def test_choose_default(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(name, "cpu").name == "cpu"
    monkeypatch.setattr(backend_module, "find_spec", lambda _: None)
    assert choose(None, "cuda").name == "torch_native"


def test_choose_replaces_what_the_device_cannot_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert choose("triton", "cpu").name == "cpu"
    assert len(caplog.records) == 1
    assert "'triton'" in caplog.text


def test_choose_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend_module, "find_spec", lambda _: None)
    assert choose("triton", "cuda").name == "torch_native"
    assert len(caplog.records) == 1


def test_choose_unknown() -> None:
    with pytest.raises(ValueError, match="choose auto, cpu, torch_native or triton"):
        choose("cuda", "cpu")
