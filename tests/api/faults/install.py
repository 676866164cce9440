"""Installs fault_plugin.py for a server's processes."""

from __future__ import annotations

import shutil
from pathlib import Path

METADATA = "Metadata-Version: 2.1\nName: fault-dist\nVersion: 1\n"


def install(folder: Path) -> Path:
    """Install the plugin into a folder for PYTHONPATH, which is returned."""
    shutil.copy(Path(__file__).parent / "fault_plugin.py", folder)
    info = folder / "fault_dist-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text("[trunkline]\nfaults = fault_plugin\n")
    return folder
