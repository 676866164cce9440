"""Offsets beyond 2**31, in every kernel. The tensors are virtual memory, of which only what is used takes any."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.activation import activate_reference
from trunkline.kernels.adjust import adjust_reference, mask_tokens_reference
from trunkline.kernels.attention_decode import decode_reference
from trunkline.kernels.attention_extend import extend_reference
from trunkline.kernels.glu import glu_reference
from trunkline.kernels.layer_norm import layer_norm_reference
from trunkline.kernels.layout import Layout
from trunkline.kernels.logprobs import logprobs_reference
from trunkline.kernels.norm import rms_norm_reference
from trunkline.kernels.rope import rope_reference
from trunkline.kernels.sample import sample_reference
from trunkline.kernels.triton.activation import activate
from trunkline.kernels.triton.adjust import adjust, mask_tokens
from trunkline.kernels.triton.attention_decode import decode
from trunkline.kernels.triton.attention_extend import extend
from trunkline.kernels.triton.expert_counts import BLOCK, expert_counts
from trunkline.kernels.triton.glu import glu
from trunkline.kernels.triton.kv_write import write
from trunkline.kernels.triton.layer_norm import layer_norm
from trunkline.kernels.triton.logprobs import logprobs
from trunkline.kernels.triton.norm import rms_norm
from trunkline.kernels.triton.pool import pool
from trunkline.kernels.triton.rope import rope
from trunkline.kernels.triton.sample import sample

from .attention_cases import assert_close
from .checked import Session, virtual_tensor
from .tolerances import assert_rounded_once

LARGE = 2**31  # numbers
SLOTS, WIDTH = LARGE // 256 + 16, 256
VOCABULARY = 1 << 17


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).half()


def last_rows(width: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of more than 2**31 numbers in rows of ``width``, and its last rows, which aren't zero."""
    x = virtual_tensor((LARGE // width + rows, width), torch.float16)
    x[-rows:] = noise(rows, width)
    return x, x[-rows:]


def row_of_last_slots(length: int, news: int) -> Layout:
    """A row whose keys are in the last slots."""
    table = np.arange(SLOTS - length, SLOTS, dtype=np.int32)[None]
    starts, slots = np.array([0, news], np.int32), torch.from_numpy(table[0, -news:].astype(np.int64))
    return Layout(starts, np.array([length], np.int32), np.zeros(1, np.int32), table, slots, 0)


@pytest.mark.parametrize("news", [1, 5])
def test_slots_of_decode_extend_and_write(news: int) -> None:
    """Keys and values in the last slots of a pool of 8 GiB."""
    keys, values = (virtual_tensor((SLOTS, 1, WIDTH), torch.float16) for _ in range(2))
    keys[-12:], values[-12:] = noise(12, 1, WIDTH), -noise(12, 1, WIDTH)
    q, k, v = noise(news, 2, WIDTH), noise(news, 1, WIDTH) / 2, noise(news, 1, WIDTH) / 3
    layout = row_of_last_slots(12, news)
    write(k, v, keys, values, layout.out_slots)
    assert torch.equal(keys[-news:], k)
    assert torch.equal(values[-news:], v)
    out, expected = torch.empty(news, 2, WIDTH, dtype=torch.float16), torch.empty(news, 2, WIDTH, dtype=torch.float64)
    if news == 1:
        decode(q, keys, values, layout, np.array([0]), out, scale=0.1)
        decode_reference(q.double(), keys, values, layout, np.array([0]), expected, scale=0.1)
    else:
        extend(q, k, v, keys, values, layout, [0], out, scale=0.1)
        extend_reference(q.double(), k, v, keys, values, layout, [0], expected, scale=0.1)
    assert_close(out, expected)


def far_apart(tokens: int, heads: int, width: int) -> torch.Tensor:
    """[tokens, heads, width], in which tokens are 2**30 numbers apart."""
    x = virtual_tensor((tokens, LARGE // 2), torch.float16)[:, : heads * width].view(tokens, heads, width)
    return x.copy_(noise(tokens, heads, width))


def test_tokens_of_extend_and_write() -> None:
    """Without a pool: the second row's tokens begin beyond 2**31."""
    q, k, v = far_apart(5, 2, 16), far_apart(5, 1, 16), far_apart(5, 1, 16)
    layout = Layout(
        np.array([0, 2, 5], np.int32), np.array([2, 3], np.int32), np.zeros(2, np.int32), np.zeros((1, 3), np.int32),
        torch.arange(5), 0,
    )  # fmt: skip
    out, expected = torch.empty(5, 2, 16, dtype=torch.float16), torch.empty(5, 2, 16, dtype=torch.float64)
    extend(q, k, v, None, None, layout, range(2), out, scale=0.1)
    extend_reference(q.double(), k, v, None, None, layout, range(2), expected, scale=0.1)
    assert_close(out, expected)
    keys, values = torch.zeros(5, 1, 16).half(), torch.zeros(5, 1, 16).half()
    write(k, v, keys, values, layout.out_slots)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


def test_rows_of_the_slot_table() -> None:
    """The last row of a table of 2**31 entries."""
    longest = 1 << 16
    table = virtual_tensor((LARGE // longest + 2, longest), torch.int32)
    table[-1, :7] = torch.arange(7)
    keys, values, last = noise(7, 1, 16), noise(7, 1, 24), np.array([len(table) - 1], np.int32)
    for news in (1, 3):
        layout = Layout(np.array([0, news], np.int32), np.array([7], np.int32), last, table.numpy(), torch.arange(7), 0)
        q, out = noise(news, 2, 16), torch.empty(news, 2, 24, dtype=torch.float16)
        expected = torch.empty(news, 2, 24, dtype=torch.float64)
        extend_reference(q.double(), keys, values, keys, values, layout, [0], expected, scale=0.1)
        if news == 1:
            decode(q, keys, values, layout, np.array([0]), out, scale=0.1)
        else:
            extend(q, keys[:news], values[:news], keys, values, layout, [0], out, scale=0.1)
        assert_close(out, expected)


def test_rows_of_norms(session: Session) -> None:
    session.last = 2
    (x, last), weight = last_rows(96), torch.rand(96)
    out = virtual_tensor((len(x), 96), torch.float16)
    rms_norm(x, weight, 1e-5, None, out)
    assert_rounded_once(out[-3:], rms_norm_reference(last.double(), weight, 1e-5))
    rms_norm(x, weight, 1e-5, x, out)
    assert_rounded_once(out[-3:], rms_norm_reference(last.double(), weight, 1e-5, last.double()))
    layer_norm(x, weight, weight / 2, 1e-5, x, out)
    expected = layer_norm_reference(last.double(), weight, weight / 2, 1e-5, last.double())
    assert_rounded_once(out[-3:], expected)


def test_rows_of_activations(session: Session) -> None:
    session.last = 2
    x, last = last_rows(96)
    out = virtual_tensor((len(x), 48), torch.float16)
    assert_rounded_once(glu(x, "silu", out)[-3:], glu_reference(last.double(), "silu"))
    assert_rounded_once(activate(x, "gelu")[-3:], activate_reference(last.double(), "gelu"))


def test_tokens_of_rope(session: Session) -> None:
    session.last = 2
    qkv, last = last_rows(4 * 256)
    cos, sin = noise(len(qkv), 2), noise(len(qkv), 2) / 2
    expected = last.double().view(3, 4, 256)
    rope_reference(expected, cos[-3:].double(), sin[-3:].double(), 2, 1)
    rope(qkv.view(-1, 4, 256), cos, sin, 2, 1)
    assert_rounded_once(last.view(3, 4, 256), expected)


def test_rows_of_pooling(session: Session) -> None:
    session.last = 1
    hidden, last = last_rows(256)
    pooled = pool(hidden, torch.tensor([0, len(hidden) - 3, len(hidden)]), "mean")
    assert_rounded_once(pooled[1], last.double().mean(0))


def test_rows_of_logits(session: Session) -> None:
    session.last = 1
    logits, last = last_rows(VOCABULARY, 1)
    rows, one, none = len(logits), torch.ones(1), torch.zeros(1)
    options = [
        value.expand(rows).contiguous() for value in (one, none.long(), one * 0.9, none, none.long(), one.long())
    ]
    drawn = sample(logits, *options)
    assert drawn[-1:].tolist() == sample_reference(last, *(value[-1:] for value in options)).tolist()
    asked = (one, drawn[-1:], 2, torch.tensor([[0, 7, VOCABULARY - 1]]))
    for own, wanted in zip(
        logprobs(logits, torch.tensor([rows - 1]), *asked),
        logprobs_reference(last, torch.tensor([0]), *asked),
        strict=True,
    ):
        torch.testing.assert_close(own, wanted)


def test_rows_of_logits_that_are_adjusted() -> None:
    logits = virtual_tensor((LARGE // VOCABULARY + 1, VOCABULARY), torch.float32)
    ids, starts = torch.tensor([0, 5, VOCABULARY - 1]), torch.tensor([0, 3])
    lists = (
        torch.tensor([[0.5, 0.25, 1.5]], dtype=torch.float64),
        starts,
        ids,
        torch.arange(3.0),
        starts,
        ids,
        torch.ones(3),
    )
    expected = torch.zeros(1, VOCABULARY)
    adjust_reference(expected, torch.tensor([0]), *lists)
    adjust(logits, torch.tensor([len(logits) - 1]), *lists)
    assert torch.equal(logits[-1:], expected)


def test_rows_of_logits_that_are_masked() -> None:
    logits = virtual_tensor((LARGE // VOCABULARY + 1, VOCABULARY), torch.float32)
    masks = torch.full((1, (VOCABULARY + 31) // 32), 5, dtype=torch.int32)
    expected = torch.zeros(1, VOCABULARY)
    mask_tokens_reference(expected, torch.tensor([0]), masks)
    mask_tokens(logits, torch.tensor([len(logits) - 1]), masks)
    assert torch.equal(logits[-1:], expected)


def test_expert_ids(session: Session) -> None:
    session.last = 2
    ids = virtual_tensor((LARGE // 4 + 1, 4), torch.int64)
    ids[-1] = torch.tensor([3, 1, 3, 8])
    assert expert_counts(ids, 8).tolist() == [BLOCK, 1, 0, 2, 0, 0, 0, 0]
