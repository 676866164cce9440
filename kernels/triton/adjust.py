"""Penalties and biases: a program changes one row of logits, at its ids only. Masks: it changes a block of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trunkline.kernels.cpu.sampling.adjust import LARGEST

from .launch import interpreted

FINITE = tl.constexpr(float(LARGEST))
MASK_BLOCK = 1024  # tokens of a program; several times as many in the interpreter
BLOCK = 256  # ids at a time; in the interpreter, where each step takes long, more


def adjust(
    logits: torch.Tensor,
    rows: torch.Tensor,
    penalties: torch.Tensor,
    starts: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    bias_starts: torch.Tensor,
    bias_ids: torch.Tensor,
    biases: torch.Tensor,
) -> None:
    """:func:`trunkline.kernels.adjust.adjust_reference` as a Triton kernel. Ids outside of [0, V) are left out."""
    if not len(rows):
        return
    block = 16 * BLOCK if interpreted() else BLOCK
    constants = {"ROW": logits.stride(0), "VOCABULARY": logits.shape[1], "BLOCK": block}
    penalise_kernel[(len(rows),)](logits, rows, penalties, starts, ids, counts, **constants)
    if len(bias_ids):  # a launch of its own: an id may be in both lists, for different threads
        bias_kernel[(len(rows),)](logits, rows, bias_starts, bias_ids, biases, **constants)


@triton.jit(do_not_specialize=("rows", "penalties", "starts", "ids", "counts"))
def penalise_kernel(
    logits: tl.tensor, rows: tl.tensor, penalties: tl.tensor, starts: tl.tensor, ids: tl.tensor, counts: tl.tensor,
    ROW: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (rows to change)."""
    item = tl.program_id(0).to(tl.int64)
    logits += tl.load(rows + item) * ROW
    frequency, presence = tl.load(penalties + item * 3), tl.load(penalties + item * 3 + 1)
    repetition, end = tl.load(penalties + item * 3 + 2), tl.load(starts + item + 1)
    for start in range(tl.load(starts + item), end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(ids + at, at < end, other=-1)
        present = (token >= 0) & (token < VOCABULARY)
        before = tl.load(logits + token, present, other=0.0).to(tl.float64)
        after = before - (frequency * tl.load(counts + at, present, other=0.0).to(tl.float64) + presence)
        after = tl.where(after < 0, after * repetition, after / repetition)
        bounded = tl.minimum(tl.maximum(after, -FINITE), FINITE)
        after = tl.where(tl.abs(before) < float("inf"), bounded, after)
        tl.store(logits + token, after.to(tl.float32), present)


@triton.jit(do_not_specialize=("rows", "starts", "ids", "biases"))
def bias_kernel(
    logits: tl.tensor, rows: tl.tensor, starts: tl.tensor, ids: tl.tensor, biases: tl.tensor, ROW: tl.constexpr,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (rows to change)."""
    item = tl.program_id(0).to(tl.int64)
    logits += tl.load(rows + item) * ROW
    end = tl.load(starts + item + 1)
    for start in range(tl.load(starts + item), end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(ids + at, at < end, other=-1)
        present = (token >= 0) & (token < VOCABULARY)
        x = tl.load(logits + token, present, other=0.0) + tl.load(biases + at, present, other=0.0)
        tl.store(logits + token, x, present)


def mask_tokens(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """:func:`trunkline.kernels.adjust.mask_tokens_reference` as a Triton kernel."""
    if not len(rows):
        return
    block = 16 * MASK_BLOCK if interpreted() else MASK_BLOCK
    constants = {"ROW": logits.stride(0), "WORDS": masks.stride(0), "VOCABULARY": logits.shape[1], "BLOCK": block}
    mask_kernel[(len(rows), triton.cdiv(logits.shape[1], block))](logits, rows, masks, **constants)


@triton.jit(do_not_specialize=("rows", "masks"))
def mask_kernel(
    logits: tl.tensor, rows: tl.tensor, masks: tl.tensor, ROW: tl.constexpr, WORDS: tl.constexpr,
    VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (rows to change, blocks of tokens). Only forbidden tokens are written."""
    item = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = token < VOCABULARY
    word = tl.load(masks + item * WORDS + token // 32, present, other=-1)
    forbidden = ((word >> (token % 32)) & 1) == 0
    tl.store(logits + tl.load(rows + item) * ROW + token, float("-inf"), present & forbidden)
