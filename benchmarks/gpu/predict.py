"""What kernels/triton/cost.py predicts for the GPU at hand: the only module of gpu_check.py that knows the model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from gpu.cases import Case
from gpu.context import Context
from trunkline.kernels.triton import cost, launch, plans

DRY_ARCHITECTURE = "sm_90"  # in a dry run: the interpreter has no predictions


def architecture(context: Context) -> str:
    return DRY_ARCHITECTURE if context.dry else launch.architecture()


def multiprocessors(context: Context) -> int:
    """Of the GPU at hand; 0 in a dry run, for the architecture's own number."""
    return 0 if context.dry else torch.cuda.get_device_properties(context.device).multi_processor_count


def gpu(context: Context) -> cost.Gpu:
    """The GPU at hand, with its measured bandwidth."""
    name = architecture(context)
    if context.dry:
        return cost.GPUS[name]
    known = cost.gpu(name, multiprocessors(context))
    return known if math.isnan(context.bandwidth) else replace(known, bandwidth=context.bandwidth)


def decode(context: Context, case: Case) -> tuple[int, float]:
    """(splits that the launcher chooses, predicted seconds) of decode attention without a window."""
    heads, name = case.heads, architecture(context)
    plan = plans.decode(name, max(heads.width, heads.value_width), case.keys.itemsize)
    group = heads.queries // heads.kv
    programs = heads.kv * -(-group // min(plan.block_m, launch.dot_width(group)))
    key_bytes = heads.pair_bytes(case.keys.dtype) // heads.kv
    lengths: np.ndarray = case.layout.kv_len
    work = cost.DecodeWork.of(lengths, launch.LONGEST, heads.queries, programs, key_bytes, heads.value_width)
    splits = cost.splits(name, plan, work, multiprocessors=multiprocessors(context))
    return splits, cost.decode_seconds(gpu(context), plan, work, splits)


def extend(context: Context, case: Case) -> float | None:
    """Predicted seconds of extend attention; None for several rows, a cached prefix or float32, which have none."""
    heads, layout = case.heads, case.layout
    tokens = int(layout.q_start[-1])
    if layout.rows != 1 or tokens != int(layout.kv_len[0]) or case.keys.itemsize != torch.bfloat16.itemsize:
        return None
    width = max(heads.width, heads.value_width)
    plan = plans.extend(architecture(context), width, case.keys.itemsize)
    return cost.extend_seconds(gpu(context), plan, tokens, heads.queries, heads.kv, width)
