"""Launches of the attention kernels for the compile gate, on tensors of the meta device: they have shapes, no memory.

Sizes are those of models: SmolLM2 (64, group of 3), Llama (128, 4), Phi-2 (80), Phi-3 (96), Gemma (256, soft cap),
gpt-oss (64, sinks), DeepSeek's MLA as plain attention (192 and 128), BERT (64, bidirectional, without a pool).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from gate import Expected, Launch
from gate.rows import TENSOR_CORES
from sample_launches import tensor

from trunkline.kernels.layout import Layout, LayoutTensors
from trunkline.kernels.triton.attention_decode import decode
from trunkline.kernels.triton.attention_extend import extend

ROWS = (1, 2, 16, 17, 64)
LIMITS = ((0, 0), (1, 0), (7, 0), (4096, 0), (0, 8192))  # (window, chunk)
LENGTHS = (100, 131072)  # keys per row: one split, and many
SLOTS = 1 << 18  # of a pool below 2 GiB, for which AMD's compiler uses other instructions than for a larger one
MANY_SLOTS = 1 << 26


@dataclass(frozen=True)
class Heads:
    """The attention of a model."""

    width: int
    group: int
    kv_heads: int = 8
    value_width: int = 0  # 0: as wide as keys
    dtype: torch.dtype = torch.bfloat16
    softcap: float = 0.0
    sinks: bool = False
    slots: int = SLOTS

    @property
    def name(self) -> str:
        widths = f"D={self.width}" + (f" and {self.value_width}" if self.value_width else "")
        options = (", soft cap" if self.softcap else "") + (", sinks" if self.sinks else "")
        options += ", pool over 2 GiB" if self.slots > SLOTS else ""
        return f"{widths}, group {self.group}{', fp32' if self.dtype == torch.float32 else ''}{options}"

    def qkv(self, tokens: int) -> tuple[torch.Tensor, ...]:
        """(q, k, v) as slices of the projection's output, if they are equally wide."""
        heads, value_width = self.group * self.kv_heads, self.value_width or self.width
        if self.value_width:
            shapes = ((heads, self.width), (self.kv_heads, self.width), (self.kv_heads, value_width))
            return tuple(tensor(tokens, *shape, dtype=self.dtype) for shape in shapes)
        packed = tensor(tokens, heads + 2 * self.kv_heads, self.width, dtype=self.dtype)
        return packed[:, :heads], packed[:, heads : -self.kv_heads], packed[:, -self.kv_heads :]

    def pool(self) -> tuple[torch.Tensor, ...]:
        widths = (self.width, self.value_width or self.width)
        return tuple(tensor(self.slots, self.kv_heads, width, dtype=self.dtype) for width in widths)

    def out(self, tokens: int) -> torch.Tensor:
        return tensor(tokens, self.group * self.kv_heads, self.value_width or self.width, dtype=self.dtype)

    def options(self) -> dict[str, object]:
        sinks = tensor(self.group * self.kv_heads) if self.sinks else None
        return {"scale": self.width**-0.5, "softcap": self.softcap, "sinks": sinks}


def layout(rows: int, tokens: int, length: int) -> Layout:
    """``rows`` rows of ``tokens`` new tokens each. Its tensors are parts of an array at any multiple of 4 bytes."""
    host = (np.arange(rows + 1) * tokens, np.full(rows, length), np.arange(rows))
    starts, lengths, table_rows = (array.astype(np.int32) for array in host)
    table = tensor(256, 131072, dtype=torch.int32)
    views = (tensor(rows + 2 + rows % 2, dtype=torch.int32)[rows % 2 :] for _ in range(3))
    q_start, kv_len, table_row = views
    tensors = LayoutTensors(q_start[: rows + 1], kv_len[:rows], table_row[:rows], table)
    return Layout(starts, lengths, table_rows, np.zeros((1, 1), np.int32), torch.zeros(0), rows, tensors)


def decode_once(model: Heads, rows: int, length: int, window: int, chunk: int) -> None:
    q, _, _ = model.qkv(rows)
    passes = layout(rows, 1, length)
    out, options = model.out(rows), model.options()
    decode(q, *model.pool(), passes, np.arange(rows), out, window=window, chunk=chunk, **options)


def decode_all(model: Heads) -> None:
    """Passes as they occur while serving."""
    for rows, (window, chunk), length in product(ROWS, LIMITS, LENGTHS):
        decode_once(model, rows, length, window, chunk)


def extend_once(model: Heads, rows: int, window: int, chunk: int, causal: bool, paged: bool) -> None:
    """5 new tokens per row."""
    q, k, v = model.qkv(5 * rows)
    pool = model.pool() if paged else (None, None)
    passes, out, options = layout(rows, 5, 105 if paged else 5), model.out(5 * rows), model.options()
    extend(q, k, v, *pool, passes, range(rows), out, causal=causal, window=window, chunk=chunk, **options)


def extend_all(model: Heads, causal: bool, paged: bool) -> None:
    """As :func:`decode_all`."""
    for rows, (window, chunk) in product(ROWS, LIMITS):
        extend_once(model, rows, window, chunk, causal, paged)


DECODE = (
    Heads(64, 3, 3),
    Heads(64, 8, sinks=True),
    Heads(72, 1),
    Heads(80, 1),
    Heads(96, 4),
    Heads(128, 1),
    Heads(128, 4),
    Heads(128, 8),
    Heads(192, 1, value_width=128),
    Heads(256, 4, softcap=50.0),
    Heads(64, 3, 3, dtype=torch.float32),
    Heads(128, 4, dtype=torch.float32),
    Heads(256, 4, 2, dtype=torch.float32),
)
EXTEND = (
    (Heads(64, 3, 3), True, True),
    (Heads(64, 8, sinks=True), True, True),
    (Heads(64, 1, 12), False, False),
    (Heads(72, 1), False, False),
    (Heads(80, 1), True, True),
    (Heads(96, 4), True, True),
    (Heads(128, 1), True, True),
    (Heads(128, 4), True, True),
    (Heads(128, 8), True, True),
    (Heads(192, 1, value_width=128), True, True),
    (Heads(256, 4, softcap=50.0), True, True),
    (Heads(64, 1, 12, dtype=torch.float32), False, False),
    (Heads(128, 4, dtype=torch.float32), True, True),
    (Heads(256, 4, 2, dtype=torch.float32), True, True),
)
LARGE = Heads(128, 4, slots=MANY_SLOTS)
EXTEND_CORES = {"sm_90": "HGMMA", "sm_100": r"UTC\w*MMA"}  # tiles have 64 queries or more, as these need


def launches(target: str) -> list[Launch]:
    """Every plan of ``target``, and every option that compiles another kernel."""
    amd = target.startswith("gfx")
    found = []
    for model in (*DECODE, *([LARGE] if amd else [])):
        cores = "" if model.dtype == torch.float32 else TENSOR_CORES
        # With one split and with several; windows, chunks and numbers of rows are ordinary arguments.
        kernels = {"split_kernel": Expected(variants=2, tensor_cores=cores), "combine_kernel": Expected()}
        found.append(Launch(f"decode, {model.name}", (lambda model=model: decode_all(model),), kernels))
    for model, causal, paged in (*EXTEND, *([(LARGE, True, True)] if amd else [])):
        cores = "" if model.dtype == torch.float32 else EXTEND_CORES.get(target, TENSOR_CORES)
        calls = (lambda model=model, causal=causal, paged=paged: extend_all(model, causal, paged),)
        name = f"extend, {model.name}{'' if causal else ', bidirectional'}{'' if paged else ', no pool'}"
        found.append(Launch(name, calls, {"extend_kernel": Expected(tensor_cores=cores)}))
    return found
