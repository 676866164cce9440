"""Plugins look alike: who knows one finds the way in the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = {"__init__.py", "settings.py", "schemas.py", "routes.py", "service.py", "stage.py", "offline.py"}


def plugins(repository: Path) -> list[Path]:
    return [folder for folder in sorted((repository / "plugins").iterdir()) if (folder / "__init__.py").is_file()]


def test_every_task_has_the_same_rooms(repository: Path) -> None:
    found = plugins(repository)
    assert len(found) >= 4
    for folder in found:
        assert {file.name for file in folder.glob("*.py")} >= ROOMS, folder.name


def test_a_missing_room_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "plugins" / "odd"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    with pytest.raises(AssertionError):
        assert {file.name for file in plugins(tmp_path)[0].glob("*.py")} >= ROOMS


def test_stages_need_no_http(repository: Path) -> None:
    """What the engine imports of a plugin brings no web framework into its process."""
    names = [f"trunkline.plugins.{folder.name}.stage" for folder in plugins(repository)]
    script = f"import sys, {', '.join(names)}; sys.exit('litestar' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
