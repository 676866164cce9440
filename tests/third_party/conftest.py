"""A fresh environment with plugins from outside the project, built and installed as users do it."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

EXAMPLES = ("trunkline-surprise", "trunkline-no-digits", "trunkline-ternary")


@pytest.fixture(scope="session")
def outside(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a virtual environment where the packages of ``examples/`` are installed.

    It sees this environment's packages, so that nothing is downloaded, but the plugins are in
    the fresh one only.
    """
    home = tmp_path_factory.mktemp("outside")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    binaries = home / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    python = binaries / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    lines = [f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()]
    Path(purelib.strip(), "parent.pth").write_text("\n".join(lines) + "\n")
    sources = [home / name for name in EXAMPLES]
    for source in sources:
        shutil.copytree(repository / "examples" / source.name, source)
    command: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        *sources,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return binaries
