"""The machine of gpu_check.py: its name and versions, and the rates that all floors are computed from."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from gpu.context import Context

COPY_BYTES = 2 << 30
PRODUCT = 8192  # rows, columns and inner size


def run(context: Context) -> None:
    """Report what the GPU is; then measure its copy bandwidth (read and written bytes) and its product rate."""
    context.record({"facts": described(context)})
    bandwidth = copy_bandwidth(context, context.pick(COPY_BYTES, 1 << 20))
    context.record({"facts": {"measured copy bandwidth, GB/s": bandwidth / 1e9}, "bandwidth": bandwidth})
    flops = product_rate(context, context.pick(PRODUCT, 128))
    context.record({"facts": {"measured bfloat16 product, TFLOP/s": flops / 1e12}, "flops": flops})


def copy_bandwidth(context: Context, size: int) -> float:
    """Bytes per second, of ``size`` bytes that are read and written."""
    source = torch.zeros(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    return 2 * size / context.stopwatch.seconds(lambda: target.copy_(source))


def product_rate(context: Context, side: int) -> float:
    """FLOP per second of a product of square bfloat16 matrices."""
    left, right = torch.randn(2, side, side, device=context.device).bfloat16()
    return 2 * side**3 / context.stopwatch.seconds(lambda: left @ right)


def described(context: Context) -> dict[str, Any]:
    """Name, size and versions."""
    versions = {
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "CUDA": str(torch.version.cuda),
        "ROCm": str(torch.version.hip),
        "Python": platform.python_version(),
    }
    if context.dry:
        return {"GPU": "none", **versions}
    known = torch.cuda.get_device_properties(context.device)
    return {
        "GPU": torch.cuda.get_device_name(context.device),
        "architecture": getattr(known, "gcnArchName", "") if torch.version.hip else f"sm_{known.major}{known.minor}",
        "multiprocessors": known.multi_processor_count,
        "memory, GiB": round(known.total_memory / 2**30, 1),
        "L2 cache, MiB": round(known.L2_cache_size / 2**20),
        **versions,
    }
