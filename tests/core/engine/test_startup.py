"""Start-up on a device that isn't the CPU; see remote_device.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trunkline.core.client.engine import configure
from trunkline.core.engine.startup import build
from trunkline.core.host import Host
from trunkline.core.testing import build_checkpoint

SCRIPT = Path(__file__).parent / "remote_device.py"


def start_remotely(folders: Sequence[Path]) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_everything_of_a_model_is_on_the_device(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    """Loading, verification and warm-up requests of all tasks; no operation mixes devices."""
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    scaled = build_checkpoint("llama", tmp_path / "dynamic", rope_parameters=dynamic)
    names = ("mixtral", "bert", "bert-score", "llama-score", "mistral-base", "deberta", "gemma3-bidirectional")
    report = start_remotely([scaled, *map(zoo, names)])
    assert report["devices"] == ["privateuseone:0"]
    assert {device for device, _ in report["served"]} == {"privateuseone:0"}
    served = {task for _, tasks in report["served"] for task in tasks}
    assert served == {"generation", "embedding", "rerank", "reward"}


def test_weights_go_to_the_device_as_they_are_read(zoo: Callable[[str], Path]) -> None:
    report = start_remotely([zoo("llama")])
    assert report["peak"] == report["largest"]  # one tensor at a time
    assert report["bytes"] > 4 * report["largest"]


def test_the_plan_is_announced_before_loading(zoo: Callable[[str], Path]) -> None:
    announced: list[str] = []
    folder = str(zoo("llama"))
    host = Host.load()
    config = configure(host, (folder,), {"dtype": "float32", "threads": 1})
    build(config, host, lambda phase: announced.append(phase.what))
    begun = [line.split()[0] for line in announced]
    assert begun == ["memory", "model", folder, "weights", "loading", "warming", "warming"]
