"""Bugs in the real kernels: for each of them, a check of the interpreter or a comparison with the reference fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from . import test_attention_decode as decode
from . import test_attention_extend as extend
from . import test_attention_traps as traps
from . import test_expert_counts as counts
from . import test_glu as glu
from . import test_kv_write as kv_write
from . import test_large_tensors as large
from . import test_norm as norm
from . import test_rope as rope
from . import test_sample as sample
from .attention_cases import WIDTHS
from .checked import KernelBug, Session
from .mutations import mutated

USERS = (decode, extend, traps, counts, glu, kv_write, large, norm, rope, sample)
VALUES = "values"  # the kind of bug that no check of the interpreter finds, but a comparison with the reference


class Run:
    """Runs tests of the kernels, in which a bug is found."""

    def __init__(self, session: Session, patch: pytest.MonkeyPatch) -> None:
        self.session, self.patch = session, patch

    def decode(self) -> None:
        decode.test_equals_the_reference(WIDTHS[0], {})

    def decode_in_splits(self) -> None:
        self.patch.setattr(decode.attention_decode, "architecture", lambda: "sm_90")
        self.patch.setattr(decode.cost, "splits", lambda *_: 3)
        decode.test_splits_are_combined({}, 3, lambda count: None)

    def extend(self) -> None:
        extend.test_prefix_and_new_tokens(WIDTHS[0], {})

    def extend_odd_widths(self) -> None:
        extend.test_prefix_and_new_tokens(WIDTHS[4], {"window": 7})

    def windows(self) -> None:
        traps.test_a_window_is_a_number_of_keys_and_no_radius(7)
        traps.test_a_window_in_both_directions_has_the_same_edge_on_both_sides(7)

    def padding(self) -> None:
        traps.test_a_graph_of_padding_only("interpreter")

    def odd_head_dims(self) -> None:
        traps.test_head_dims_that_are_no_powers_of_two(80, torch.float32, "interpreter")

    def values_outside(self) -> None:
        traps.test_values_outside_of_the_window_may_be_nan(9, "interpreter")

    def write(self) -> None:
        kv_write.test_equals_the_reference(70, torch.float32, torch.float32)

    def write_odd_widths(self) -> None:
        x, pool = torch.randn(7, 1, 33).bfloat16(), torch.zeros(9, 1, 33).bfloat16()
        kv_write.write(x, x, pool, pool.clone(), torch.arange(7))

    def rope(self) -> None:
        rope.test_keys_and_values_are_written_to_their_slots(96, 24, True, torch.bfloat16)

    def rope_without_norms(self) -> None:
        rope.test_keys_and_values_are_written_to_their_slots(96, 24, False, torch.bfloat16)

    def norm(self) -> None:
        norm.test_equals_the_reference((70, 77), True, torch.bfloat16)

    def glu(self) -> None:
        glu.test_glu_equals_the_reference("silu", (5, 64), torch.bfloat16)

    def count(self) -> None:
        counts.test_equals_the_reference((1025, 5), 60)

    def sample(self) -> None:
        sample.test_long_vocabularies_in_a_strided_view(torch.float32)

    def noise(self) -> None:
        sample.test_noise_is_the_same_on_the_cpu_bit_by_bit(0, 77)

    def large_slots(self) -> None:
        for news in (1, 5):
            large.test_slots_of_decode_extend_and_write(news)

    def large_tables(self) -> None:
        large.test_rows_of_the_slot_table()

    def large_tokens(self) -> None:
        large.test_tokens_of_extend_and_write()

    def large_norms(self) -> None:
        large.test_rows_of_norms(self.session)

    def large_activations(self) -> None:
        large.test_rows_of_activations(self.session)

    def large_heads(self) -> None:
        large.test_tokens_of_rope(self.session)

    def large_rope_slots(self) -> None:
        large.test_slots_and_tokens_of_rope()

    def large_logits(self) -> None:
        large.test_rows_of_logits(self.session)

    def large_sequences(self) -> None:
        large.test_rows_of_pooling(self.session)

    def large_ids(self) -> None:
        large.test_expert_ids(self.session)


WIDE, PROGRAM = ".to(tl.int64)", "tl.program_id(0)"
KEY_HEAD, VALUE_HEAD = "(slot * K_HEADS + head - Q_HEADS)", "(slot * HEADS + head)"
KEY = "tl.load(k + token[:, None] * K_TOKEN + column[None], in_k, other=0.0)"
KEY_AS_WORDS = (
    "tl.load((k + token[:, None] * K_TOKEN + column[None]).to(tl.pointer_type(tl.int32), bitcast=True),"
    " in_k & (column < K_WIDTH - 1)[None], other=0)"
)
ADD = 'tl.atomic_add(counts + expert, found, (expert < EXPERTS) & (found > 0), sem="relaxed")'
ADD_WITHOUT_ATOMICS = (
    "tl.store(counts + expert, tl.load(counts + expert, expert < EXPERTS, other=0) + found, expert < EXPERTS)"
)
SEQUENCE = "tl.load(starts + row), tl.load(starts + row + 1)"
SHORT_SEQUENCE = "tl.load(starts + row).to(tl.int32), tl.load(starts + row + 1).to(tl.int32)"
SEVERAL_KEYS = "tl.device_assert(n < 64, 'few keys')\n    "

# (kind, what runs, module, old, new): ``old`` becomes ``new`` in the module.
MUTATIONS = [
    ("bounds", Run.glu, "glu", "tl.store(out + row[:, None]", "tl.store(out + 1 + row[:, None]"),
    ("bounds", Run.glu, "glu", "(row < rows)[:, None]", "(row <= rows)[:, None]"),
    ("bounds", Run.write, "kv_write", "present = token < tokens", "present = token <= tokens"),
    ("bounds", Run.write, "kv_write", "(column < K_WIDTH)", "(column < K_WIDTH + 1)"),
    ("bounds", Run.decode, "tiles", "(j >= low) & (j < high)", "(j >= low)"),
    ("bounds", Run.extend, "attention_extend", "(ahead < stop - start) & ", ""),
    ("bounds", Run.padding, "attention_decode", "visible(n, window, chunk), n\n", "0, tl.maximum(n, 2)\n"),
    ("bounds", Run.rope, "rope", "item < count, tl.arange(0, BLOCK_D)", "item <= count, tl.arange(0, BLOCK_D)"),
    ("bounds", Run.rope, "rope", KEY_HEAD, "(slot * K_HEADS + head)"),
    ("bounds", Run.rope_without_norms, "rope", "inside & ~is_query[:, None])", "inside)"),
    ("alignment", Run.write_odd_widths, "kv_write", KEY, KEY_AS_WORDS),
    ("overflow", Run.large_slots, "tiles", "tl.load(slots + j)).to(tl.int64)", "tl.load(slots + j))"),
    ("overflow", Run.large_slots, "kv_write", "present, other=0)", "present, other=0).to(tl.int32)"),
    ("overflow", Run.large_tables, "attention_decode", "(table_row + row).to(tl.int64)", "(table_row + row)"),
    ("overflow", Run.large_tables, "attention_extend", "(table_row + row).to(tl.int64)", "(table_row + row)"),
    ("overflow", Run.large_tokens, "attention_extend", "(start + ahead).to(tl.int64)", "start + ahead"),
    ("overflow", Run.large_tokens, "attention_extend", "start.to(tl.int64) * K_SLOT", "start * K_SLOT"),
    ("overflow", Run.large_tokens, "kv_write", PROGRAM + WIDE, PROGRAM),
    ("overflow", Run.large_norms, "norm", PROGRAM + WIDE, PROGRAM),
    ("overflow", Run.large_norms, "layer_norm", PROGRAM + WIDE, PROGRAM),
    ("overflow", Run.large_activations, "glu", PROGRAM + WIDE, PROGRAM),
    ("overflow", Run.large_activations, "activation", PROGRAM + WIDE, PROGRAM),
    ("overflow", Run.large_heads, "rope", PROGRAM + WIDE, PROGRAM),
    ("overflow", Run.large_rope_slots, "rope", KEY_HEAD, KEY_HEAD + ".to(tl.int32)"),
    ("overflow", Run.large_rope_slots, "rope", VALUE_HEAD, VALUE_HEAD + ".to(tl.int32)"),
    ("overflow", Run.large_rope_slots, "rope", "token * TOKEN + (FIRST", "token.to(tl.int32) * TOKEN + (FIRST"),
    ("overflow", Run.large_logits, "sample", PROGRAM + WIDE, PROGRAM),
    ("overflow", Run.large_logits, "logprobs", "tl.load(rows + item)", "tl.load(rows + item).to(tl.int32)"),
    ("overflow", Run.large_sequences, "pool", SEQUENCE, SHORT_SEQUENCE),
    ("overflow", Run.large_ids, "expert_counts", PROGRAM + WIDE, PROGRAM),
    ("poison", Run.norm, "norm", "(x + at, present, other=0.0)", "(x + at, present)"),
    ("poison", Run.rope, "rope", "in_rest, other=0.0)", "in_rest)"),
    ("poison", Run.decode, "tiles", "present[:, None] & in_e[None], other=0.0)", "present[:, None] & in_e[None])"),
    ("poison", Run.extend_odd_widths, "attention_extend", "(d < D)[None], other=0.0", "(d < D)[None]"),
    ("poison", Run.decode_in_splits, "attention_decode", "+ 1, written, other=0.0)", "+ 1, written)"),
    ("poison", Run.count, "expert_counts", "at < total, other=-1)", "at < total)"),
    ("race", Run.extend, "attention_extend", " & (m < QUERIES * BLOCK_HEADS)", ""),
    ("race", Run.decode, "attention_decode", "kv_head * GROUP + in_g", "kv_head * (GROUP - 1) + in_g"),
    ("race", Run.decode_in_splits, "attention_decode", "* splits + split\n", "* splits + split // 2\n"),
    ("race", Run.write, "kv_write", "keys + slot[:, None] * K_WIDTH", "keys + slot[:, None] * (K_WIDTH - 1)"),
    ("race", Run.rope, "rope", VALUE_HEAD, "(slot * (HEADS - 1) + head)"),
    ("race", Run.rope, "rope", KEY_HEAD, "(slot * (K_HEADS - 1) + head - Q_HEADS)"),
    ("race", Run.rope, "rope", "(FIRST_HEAD + head) * HEAD", "head * HEAD"),
    ("race", Run.sample, "sample", "tl.store(result + row, winner)", "tl.store(result + row // 2, winner)"),
    ("race", Run.count, "expert_counts", ADD, ADD_WITHOUT_ATOMICS),
    ("claim", Run.decode, "tiles", "keys + slot[None]", "keys + tl.multiple_of(slot, 16)[None]"),
    ("claim", Run.decode, "tiles", "values + slot[:, None]", "values + tl.max_contiguous(slot, 64)[:, None]"),
    ("assert", Run.decode, "attention_decode", "begin, end = visible(", SEVERAL_KEYS + "begin, end = visible("),
    (VALUES, Run.norm, "norm", "(x + at, present, other=0.0).to(tl.float32)", "(x + at, present, other=0.0)"),
    (VALUES, Run.rope, "rope", "(FIRST_HEAD + head) * HEAD", "(FIRST_HEAD + head - 1) * HEAD"),
    (VALUES, Run.rope_without_norms, "rope", "width - 2 * half", "0"),
    (VALUES, Run.rope, "rope", "in_rest, qkv, start, keys", "in_rest, qkv, start, None"),
    (VALUES, Run.windows, "tiles", "(distance < window)", "(distance <= window)"),
    (VALUES, Run.windows, "tiles", "(distance > -window)", "(distance >= -window)"),
    (VALUES, Run.windows, "attention_decode", "first, n - window", "first, n - window - 1"),
    (VALUES, Run.windows, "attention_extend", "low, first - window + 1", "low, first - window + 2"),
    (VALUES, Run.values_outside, "attention_extend", "low, first - window + 1", "low, first - window"),
    (VALUES, Run.values_outside, "tiles", "(j >= low) & (j < high)", "(j < high)"),
    ("bounds", Run.odd_head_dims, "tiles", "present[None] & in_d[:, None]", "present[None]"),
    (VALUES, Run.noise, "sample", "0x21F0AAAD", "0x21F0AAAF"),
]


@pytest.mark.parametrize(("kind", "run", "module", "old", "new"), MUTATIONS)
def test_a_bug_is_found(
    kind: str, run: Callable[[Run], None], module: str, old: str, new: str, session: Session, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with mutated(module, old, new, tmp_path, USERS), pytest.raises(AssertionError) as caught:
        run(Run(session, monkeypatch))
    assert (caught.value.kind if isinstance(caught.value, KernelBug) else VALUES) == kind


@pytest.mark.parametrize("run", dict.fromkeys(run for _, run, *_ in MUTATIONS), ids=lambda run: run.__name__)
def test_the_kernel_without_a_bug_passes(
    run: Callable[[Run], None], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Run(session, monkeypatch))
