"""Virtual environments for packages that the tests' own has not, or in another version, kept in the cache folder.

They see the packages of the environment that runs the tests (torch and transformers among them, which are large and
must be the same for a comparison); pip adds what else is needed, under the project's own constraints. A package that
pip adds hides one of the same name. No other part of the tests asks a package index.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from trunkline.core.model.sources.catalogue import cache_folder

_SECONDS = 240  # for pip; the budgets of the suites that need one are about 10 minutes
_FORMAT = 1  # of the folders written below
_UNUSED = 30 * 86400.0  # seconds after which an unused environment is removed; each has half a GB
# From the environment that runs the tests, never from an index: a build for other devices is gigabytes large.
_INHERITED = ("torch", "transformers", "tokenizers", "numpy")


class Unavailable(Exception):
    """An environment can't be had; the message says why. The tests that need it are skipped with it."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What to install. ``bare`` requirements are installed without what they depend on."""

    name: str
    requirements: tuple[str, ...]
    bare: tuple[str, ...] = ()


def python_of(wanted: Environment) -> Path:
    """The interpreter of the environment, which is made now if it doesn't exist. Raises Unavailable.

    The folder's name has a digest of everything that its content depends on. The file ``complete`` in it is as old
    as its last use, and missing when it was never finished.
    """
    parents = [folder for folder in sys.path if folder.endswith("site-packages")]
    pins = [f"{name}=={version(name)}" for name in _INHERITED]
    content = repr((_FORMAT, sys.version, parents, pins, wanted))
    home = cache_folder() / "environments"
    folder = home / f"{wanted.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    complete = folder / "complete"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / f".{wanted.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for each in home.glob(f"{wanted.name}-*"):
            mark = each / "complete"
            if not mark.is_file() or (each != folder and time.time() - mark.stat().st_mtime > _UNUSED):
                shutil.rmtree(each)
        if not folder.is_dir():
            _make(folder, parents, pins, wanted)
        complete.touch()
    return python


def _make(folder: Path, parents: list[str], pins: list[str], wanted: Environment) -> None:
    """Make the environment in its place: scripts in it name its path."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # Plain paths, not site.addsitedir: these folders' own .pth files (editable installations) stay out.
    (packages / "parents.pth").write_text("\n".join(parents) + "\n")
    (folder / "constraints.txt").write_text("\n".join(pins) + "\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--prefer-binary", "--retries", "1", "--constraint", str(folder / "constraints.txt")]
    for extra, requirements in ((["--no-deps"], wanted.bare), ([], wanted.requirements)):
        if not requirements:
            continue
        try:
            done = subprocess.run(
                [*pip, *extra, *requirements], capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise Unavailable(f"installing {wanted.name} took longer than {_SECONDS} s") from exc
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise Unavailable(f"{wanted.name} can't be installed: {last}")
