"""A fresh environment with a plugin from outside the project, built and installed as users do it."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def outside(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a virtual environment where ``examples/trunkline-surprise`` is installed.

    It sees this environment's packages, so that nothing is downloaded, but the plugin is in
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
    source = home / "source"
    shutil.copytree(repository / "examples" / "trunkline-surprise", source)
    command: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return binaries
