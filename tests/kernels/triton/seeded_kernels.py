"""Launches of the project's own kernels, each changed by one defect, which the compile gate must find."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import attention_launches
import kernel_launches
from attention_launches import Heads
from gate import Expected, Launch
from gate.rows import TENSOR_CORES

from trunkline.kernels.triton import attention_decode, attention_extend, plans

FOLDER = tempfile.TemporaryDirectory()
KERNELS = Path(plans.__file__).parent
PACKAGE = "trunkline.kernels.triton"


def changed(name: str, *changes: tuple[str, str]) -> ModuleType:
    """The module ``name`` of the kernels after some replacements in its text. Each must change it."""
    text = (KERNELS / f"{name}.py").read_text()
    for old, new in changes:
        assert old in text, f"{name}.py has no {old!r} any more"
        text = text.replace(old, new)
    path = Path(FOLDER.name) / f"{name}_{len(sys.modules)}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # triton looks the module of a kernel up
    spec.loader.exec_module(module)
    return module


def planned(operation: str, plan: plans.Plan, model: Heads) -> None:
    """One launch of decode or extend attention with another plan."""
    module = {"decode": attention_decode, "extend": attention_extend}[operation]
    before, chosen = module.plans, ModuleType("plans")
    setattr(chosen, operation, lambda *_: plan)
    module.plans = chosen
    try:
        if operation == "decode":
            attention_launches.decode_once(model, 2, 100, 0, 0)
        else:
            attention_launches.extend_once(model, 2, 0, 0, causal=True, paged=True)
    finally:
        module.plans = before


def norms(module: ModuleType, width: int = 4096) -> None:
    """RMS norms of several numbers of rows, by a changed launcher."""
    before = kernel_launches.rms_norm
    kernel_launches.rms_norm = module.rms_norm
    try:
        for rows in kernel_launches.ROWS:
            kernel_launches.normalise(rows, width, kernel_launches.BF16, residual=False)
    finally:
        kernel_launches.rms_norm = before


def launches(target: str) -> list[Launch]:
    """All of them for sm_90; for AMD, the one that takes too much shared memory there."""
    gemma, llama = Heads(256, 4), Heads(128, 4)
    decode, extend, norm = ({name: Expected()} for name in ("split_kernel", "extend_kernel", "norm_kernel"))
    large = Launch("a plan too large", (lambda: planned("decode", plans.Plan(16, 128, stages=3), gemma),), decode)
    if target != "sm_90":
        return [large]
    specialised = changed("norm", ('@triton.jit(do_not_specialize=("count", "eps"))', "@triton.jit"))
    stride = changed(
        "norm",
        ('do_not_specialize=("count", "eps")', 'do_not_specialize=("count", "eps", "WIDTH")'),
        ("WIDTH: tl.constexpr", "WIDTH: tl.tensor"),
    )
    few = plans.Plan(32, 64, stages=2)
    return [
        large,
        Launch("too few warps", (lambda: planned("extend", plans.Plan(128, 64, stages=2), llama),), extend),
        Launch("deep pipeline", (lambda: planned("decode", plans.Plan(16, 128, warps=8, stages=6), gemma),), decode),
        Launch("a specialised argument", (lambda: norms(specialised),), norm),
        Launch("a stride as an argument", (lambda: norms(stride),), norm),
        Launch(
            "tiles too small for wgmma",
            (lambda: planned("extend", few, llama),),
            {"extend_kernel": Expected(tensor_cores="HGMMA")},
        ),
        Launch(
            "no tensor cores",
            (
                lambda: planned(
                    "decode", plans.Plan(16, 32, warps=8, stages=2), Heads(128, 4, dtype=kernel_launches.FP32)
                ),
            ),
            {"split_kernel": Expected(tensor_cores=TENSOR_CORES)},
        ),
    ]
