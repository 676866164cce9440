"""The compiled attention over many queries against the plain one, whatever the rows, widths and rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.kernels import attention_extend
from trunkline.kernels.cpu.attention.flash_arguments import sizes
from trunkline.kernels.cpu.processor import has_bfloat16_pairs
from trunkline.kernels.cpu.threads import Kernel
from trunkline.kernels.layout import Layout

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SHAPES = [(64, 64), (192, 128), (6, 16), (40, 48)]


@dataclass
class Rows:
    """Rows of ``news`` new tokens over ``pasts`` cached ones, scattered over a pool (or none)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor | None
    values: torch.Tensor | None
    layout: Layout

    @classmethod
    def make(
        cls, heads: tuple[int, int], widths: tuple[int, int], news: list[int], pasts: list[int] | None,
        dtype: torch.dtype = torch.float32,
    ) -> Rows:  # fmt: skip
        generator = torch.Generator().manual_seed(sum(news))
        pooled, pasts = pasts is not None, pasts or [0] * len(news)
        tokens, longest = sum(news), max(new + past for new, past in zip(news, pasts, strict=True))
        table = np.random.default_rng(tokens).permutation(len(news) * longest).reshape(len(news), longest)
        spans = zip(table, pasts, news, strict=True)
        layout = Layout(
            q_start=np.cumsum([0, *news]).astype(np.int32),
            kv_len=np.add(news, pasts).astype(np.int32),
            table_row=np.arange(len(news), dtype=np.int32),
            table=table.astype(np.int32),
            out_slots=torch.from_numpy(np.concatenate([line[past : past + new] for line, past, new in spans])),
            decodes=0,
        )

        def noise(rows: int, *shape: int) -> torch.Tensor:
            return torch.randn(rows, *shape, generator=generator).to(dtype)

        if widths[0] == widths[1]:  # parts of one product, as fused layers have them
            parts = noise(tokens, heads[0] + 2 * heads[1], widths[0])
            q, k, v = torch.split(parts, [heads[0], heads[1], heads[1]], 1)
        else:  # transposed, as transformers hands them over
            q = noise(heads[0], tokens, widths[0]).transpose(0, 1)
            k, v = noise(tokens, heads[1], widths[0]), noise(heads[1], tokens, widths[1]).transpose(0, 1)
        keys = values = None
        if pooled:
            keys, values = noise(table.size, heads[1], widths[0]), noise(table.size, heads[1], widths[1])
            keys[layout.out_slots], values[layout.out_slots] = k, v
        return cls(q, k, v, keys, values, layout)

    def run(self, extend: Any = attention_extend.extend_cpu, which: Any = None, **rules: Any) -> torch.Tensor:
        out = self.q.new_zeros(self.q.shape[0], self.q.shape[1], self.v.shape[2])
        which = range(self.layout.rows) if which is None else which
        extend(self.q, self.k, self.v, self.keys, self.values, self.layout, which, out, scale=0.2, **rules)
        return out

    def error(self, **rules: Any) -> float:
        """How far compiled and plain are apart, at most; NaN anywhere counts."""
        return float((self.run(**rules) - self.run(attention_extend.extend_reference, **rules)).abs().max())


@pytest.fixture(autouse=True)
def _four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four threads, for work of any size."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(attention_extend, "MIN_PARALLEL", 0)
    yield
    torch.set_num_threads(before)


@settings(max_examples=150)
@given(data=st.data())
def test_equals_reference(data: st.DataObject) -> None:
    groups, share = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 3, 5, 8, 16, 20]))
    widths = data.draw(
        st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from([(64, 64), (192, 128), (6, 16), (40, 48)])
    )
    if data.draw(st.booleans()):
        widths = (widths[0], widths[0])
    news = data.draw(st.lists(st.integers(1, 70) | st.integers(120, 300), min_size=1, max_size=5))
    causal, pooled = data.draw(st.booleans()), data.draw(st.booleans())
    pasts = [data.draw(st.integers(0, 200) if causal else st.just(0)) for _ in news] if pooled else None
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    rules = {
        "causal": causal,
        "window": data.draw(st.just(0) | st.integers(1, 200)),
        "chunk": data.draw(st.just(0) | st.integers(1, 200)),
        "softcap": data.draw(st.sampled_from([0.0, 0.0, 0.5, 3.0, 50.0])),
        "sinks": torch.linspace(-3, 4, groups * share) if data.draw(st.booleans()) else None,
    }
    pairs = has_bfloat16_pairs() and data.draw(st.booleans())
    rows = Rows.make((groups * share, groups), widths, news, pasts, dtype)
    with patch.object(attention_extend, "has_bfloat16_pairs", lambda: pairs):
        assert rows.error(**rules) < TOLERANCE[dtype]


@pytest.mark.parametrize("wrong", [{"causal": 0}, {"window": 0}, {"prompts": -1}, {"block_keys": -16}], ids=str)
def test_a_wrong_argument_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, int]) -> None:
    """Seeded bugs: a rule forgotten, a row lost; but another size of blocks is no bug."""
    run = Kernel.run
    ((name, value),) = wrong.items()

    def changed(self: Kernel, team: int, **arguments: Any) -> None:
        run(self, team, **arguments | {name: arguments[name] + value if value else 0})

    rows = Rows.make((6, 2), (32, 32), [150, 20], [30, 100])
    assert rows.error(window=60) < 2e-5
    monkeypatch.setattr(Kernel, "run", changed)
    assert (rows.error(window=60) < 2e-5) == (name == "block_keys")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rules", [{}, {"window": 40}, {"window": 41}, {"chunk": 70}, {"chunk": 71}], ids=str)
def test_result_depends_on_neither_batch_nor_chunking_nor_threads(rules: dict[str, int], dtype: torch.dtype) -> None:
    """Bit for bit: alone or in company, whole or in two passes, on one thread or four."""
    rows = Rows.make((6, 2), (64, 64), [300, 20], [0, 150], dtype)
    assert rows.keys is not None
    whole = rows.run(**rules)
    assert torch.equal(rows.run(which=[0], **rules)[:300], whole[:300])
    assert torch.equal(rows.run(which=[1], **rules)[300:], whole[300:])
    torch.set_num_threads(1)
    assert torch.equal(rows.run(**rules), whole)
    later = replace(rows, q=rows.q[117:300], k=rows.k[117:300], v=rows.v[117:300])
    later.layout = replace(rows.layout, q_start=np.array([0, 183], np.int32), kv_len=np.array([300], np.int32))
    assert torch.equal(later.run(**rules), whole[117:300])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("place", ["q", "keys", "values"])
def test_nan_stays_in_its_row(place: str, dtype: torch.dtype) -> None:
    rows = Rows.make((3, 1), (16, 16), [40, 40], [100, 100], dtype)
    clean = rows.run()
    if place == "q":
        rows.q[7, 1, 3] = torch.nan
    else:
        getattr(rows, place)[rows.layout.table[0, 20]] = torch.nan
    result = rows.run()
    hurt = [slice(7, 8), 1] if place == "q" else [slice(0, 40)]
    assert torch.isnan(result[tuple(hurt)]).all()
    assert torch.equal(result[40:], clean[40:])


def test_scratch_does_not_grow_with_lengths_and_stays_small() -> None:
    for share, key_dim, value_dim in [(1, 32, 32), (3, 64, 64), (16, 128, 128), (64, 576, 512)]:
        for together in (1, 2):
            assert sizes(share, key_dim, value_dim, together).scratch_size < 1 << 20


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        Rows.make((2, 2), (8, 8), [9], None, torch.float16).run()
