"""Limits of control groups, from made-up files of both versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from trunkline.core.engine import resources
from trunkline.core.engine.resources import available_bytes, cores, set_threads

GIB = 1 << 30
Files = Callable[[dict[str, str]], Path]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Write a tree like that of / ; the machine itself has 64 cores and 64 GiB."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 64)
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda pid: range(48))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))

    def write(contents: dict[str, str]) -> Path:
        for name, text in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return tmp_path

    return write


def test_without_limits_the_machine_counts(files: Files) -> None:
    root = files({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000", "sys/fs/cgroup/memory.max": "max"})
    assert cores(root) == 48  # as many as the scheduler lets it have
    assert available_bytes(root) == 64 * GIB


def test_limits_of_the_groups_above_hold_too(files: Files) -> None:
    root = files({
        "proc/self/cgroup": "0::/a/b",
        "sys/fs/cgroup/a/b/cpu.max": "800000 100000",
        "sys/fs/cgroup/a/cpu.max": "250000 100000",
        "sys/fs/cgroup/a/b/memory.max": "max",
        "sys/fs/cgroup/a/memory.max": str(8 * GIB),
        "sys/fs/cgroup/a/memory.current": str(7 * GIB),
        "sys/fs/cgroup/a/memory.stat": f"anon {3 * GIB}\ninactive_file {4 * GIB}",
    })  # fmt: skip
    assert cores(root) == 3
    assert available_bytes(root) == 5 * GIB  # files that were read don't count as used


def test_version_1(files: Files) -> None:
    root = files({
        "proc/self/cgroup": "4:memory:/not/mounted/here\n2:cpu,cpuacct:/\n0::/",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
    })  # fmt: skip
    assert cores(root) == 1
    assert available_bytes(root) == GIB


def test_this_machine_has_something() -> None:
    assert cores() >= 1
    assert 1 << 20 < available_bytes() < 1 << 50


def test_threads_are_those_asked_for_or_one_a_core_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(resources, "cores", lambda: 2)
    try:
        for asked, expected in ((3, 3), (None, 2), (1, 1), (None, 1)):
            set_threads(asked)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
