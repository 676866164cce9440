"""Packages of npm for the tests, installed into the cache folder once."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

from trunkline.core.model.sources.catalogue import cache_folder

SECONDS = 120  # for npm


class Unavailable(Exception):
    """The packages can't be had; the message says why."""


def folder_of(*packages: str) -> Path:
    """A folder in which ``node`` finds these packages (``name@version``). Raises Unavailable."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise Unavailable("node and npm aren't installed")
    home = cache_folder() / "environments"
    folder = home / f"node-{hashlib.sha256(repr(packages).encode()).hexdigest()[:12]}"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / ".node.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / "package.json").write_text('{"private": true, "type": "module"}')
            command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", *packages]
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
            except subprocess.TimeoutExpired as exc:
                raise Unavailable(f"npm took longer than {SECONDS} s") from exc
            if done.returncode:
                raise Unavailable(f"npm install failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        (folder / "complete").touch()  # as old as the last use
    return folder
