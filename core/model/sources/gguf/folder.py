"""The folder that stands for a GGUF file: config, tokenizer and table, below the cache folder."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from trunkline.core.errors import ModelError
from trunkline.core.model.sources.catalogue import cache_folder, last_lines, locked, make_private, run
from trunkline.core.model.sources.progress import console_progress

from .table import identity_of

_FORMAT = 1  # version of the folders; increase it when what is written changes


def folder_of(file: Path) -> Path:
    """The folder of a GGUF file, which is made if it doesn't exist. ModelError for a file that can't be served."""
    file = file.resolve()
    home = cache_folder() / "gguf"
    identity = identity_of(file)
    key = repr((str(file), identity, _FORMAT))
    folder = home / f"{file.stem[:60]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    try:
        make_private(home)
        with locked(home / f".{folder.name}.lock"):
            if not folder.is_dir():
                _prepare(file, identity, folder, home / f".{folder.name}.partial")
    except OSError as error:
        raise ModelError(
            f"{file} can't be prepared in the cache folder {home}: {error}. Set TRUNKLINE_CACHE to a writable folder."
        ) from error
    return folder


def _prepare(file: Path, identity: tuple[int, int], folder: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process
    ready, alone = work / "ready", work / "alone"
    try:
        for made in (work, ready, alone):
            made.mkdir(mode=0o700)
        # Beside the link there are no files that transformers would read, too.
        (alone / "model.gguf").symlink_to(file)
        command = [
            sys.executable,
            "-m",
            "trunkline.core.model.sources.gguf.prepare",
            str(alone / "model.gguf"),
            str(ready),
        ]
        with console_progress(file.name) as report:
            status, errors = run(command, None, lambda: report("reading config and tokenizer", 0, 0))
        if status != 0:
            raise ModelError(f"{file} can't be served: {last_lines(errors, 1)}")
        if identity_of(file) != identity:
            raise ModelError(f"{file} changed while it was read. Try again when it is complete.")
        ready.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
