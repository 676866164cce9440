"""Triton's compiler under the server: a private folder, and a note of every compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from gate.driver import compiling_for
from trunkline.kernels import backend, compiled
from trunkline.kernels.triton.norm import rms_norm
from triton import knobs

if sys.argv[1]:
    compiled.keep_in(Path(sys.argv[1]))
backend._triton()
names = []
with compiling_for("sm_90"), compiled.expected(lambda name, seconds: names.append(name)):
    for rows in (3, 16):
        rms_norm(torch.empty(rows, 64, device="meta"), torch.empty(64, device="meta"), 1e-6)
files = len(list(Path(knobs.cache.dir).rglob("*.cubin")))
print(json.dumps({"names": names, "folder": knobs.cache.dir, "files": files}))
"""


def compile_one(folder: Path | None, repository: Path) -> dict[str, Any]:
    """What a process that compiles a kernel for two sizes reports; nothing is launched."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTHON"))}
    paths = repository / ".typing", repository / "tests/kernels/triton"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder or "")],
        env={**kept, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_compiled_kernels_are_kept_in_a_private_folder(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "kernels"
    for _ in range(2):  # the second process reads what the first has compiled
        found = compile_one(folder, repository)
        assert found == {"names": ["norm_kernel"], "folder": str(folder / "triton"), "files": 1}
    assert (folder / "triton").stat().st_mode & 0o777 == 0o700


def test_without_a_folder_they_are_removed(repository: Path) -> None:
    found = compile_one(None, repository)
    assert found["files"] == 1
    assert not Path(found["folder"]).exists()
