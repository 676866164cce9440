"""CPU cores and memory that this process may use, with regard to the limits of its control groups (cgroups)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

ROOT = Path("/")

# File names in cgroups v2, then v1: limit, use, and the field of memory.stat with the page cache that the kernel can
# reclaim (files that were read, such as model weights).
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def set_threads(asked: int | None) -> None:
    """Set the number of compute threads. None: torch's default ($OMP_NUM_THREADS), at most one per usable core."""
    torch.set_num_threads(asked or min(torch.get_num_threads(), cores()))


def cores(root: Path = ROOT) -> int:
    """Number of physical cores, or fewer if CPU affinity or a control group's quota limits them."""
    count = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    for group in _groups("cpu", root):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if not period:
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # "max" and -1 mean no limit
            count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


def available_bytes(root: Path = ROOT) -> int:
    """Memory that this process can still allocate: the machine's free memory, or less in a control group."""
    free = psutil.virtual_memory().available
    for group in _groups("memory", root):
        for limit_name, used_name, cache in _MEMORY:
            limit, used = _read(group / limit_name), _read(group / used_name)
            if limit.isdigit() and used.isdigit():
                fields = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines())
                free = min(free, int(limit) - int(used) + int(fields.get(cache, 0)))
    return max(free, 0)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's control group and of its parents, whose limits apply, too."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = top / name.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
