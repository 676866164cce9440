"""Triton's compiler: it keeps its results in a private folder, and each compilation is noted."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from triton import knobs

from trunkline.kernels import compiled

from .launch import interpreted

SUBFOLDER = "triton"


def prepare() -> None:
    """Use a folder below that of :mod:`trunkline.kernels.compiled`, or one that is removed when the process ends.

    Triton's own default is in the home folder, where its mode depends on the user's settings; what is in it is
    executed.
    """
    if interpreted():
        return
    kept = compiled.folder()
    if kept is None:
        path = Path(tempfile.mkdtemp(prefix="trunkline-kernels-"))
        atexit.register(shutil.rmtree, path, ignore_errors=True)
    else:
        path = kept / SUBFOLDER
        path.mkdir(mode=0o700, exist_ok=True)
    knobs.cache.dir = str(path)
    knobs.compilation.listener = _note


def _note(*, src: Any, times: Any, **_: Any) -> None:
    """Called by Triton's compiler, also for a kernel that it finds in the folder."""
    compiled.note(src.name, times.total / 1e6)
