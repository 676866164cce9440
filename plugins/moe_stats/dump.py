"""Writes dump files. The server chooses folder and name, not the client (security rule R-9)."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from trunkline.core.errors import RequestError

from .settings import FOLDER_VARIABLE

log = logging.getLogger("trunkline.moe_stats")


def write(contents: dict[str, Any], folder: str, *, per_rank: bool) -> Path:
    """Write ``contents`` with ``torch.save`` to a new file in ``folder`` and return its path.

    The file is created atomically. RequestError 500 when it can't be written.
    """
    import torch

    try:
        where = folder_of(folder)
        name = f"expert_distribution_recorder_{time.time()}{'_0' if per_rank else ''}.pt"
        part = where / f"{name}.part"
        try:
            with open(part, "xb", opener=_for_us_alone) as file:
                torch.save(contents, file)
            part.replace(where / name)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        log.error("the expert dump can't be written: %s", error)
        raise RequestError(
            "The expert dump can't be written; nothing recorded is lost, and the server's log has the reason. "
            "--expert-dump-dir names another folder.",
            status=500,
        ) from error
    return where / name


def _for_us_alone(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # the file has the clients' texts, as token ids


def folder_of(setting: str) -> Path:
    """The folder of dumps, which is created if it doesn't exist."""
    chosen = setting or os.environ.get(FOLDER_VARIABLE)
    if not chosen:
        if not _private_folder().is_dir():  # the system may remove temporary folders
            _private_folder.cache_clear()
        return _private_folder()
    folder = Path(chosen)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@functools.cache
def _private_folder() -> Path:
    """A temporary folder that only this user can read; the same one for all dumps of the process."""
    folder = Path(tempfile.mkdtemp(prefix="trunkline-experts-"))
    log.info("expert dumps go to %s; --expert-dump-dir names another folder", folder)
    return folder
