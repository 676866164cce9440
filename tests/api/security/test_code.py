"""No stranger's code runs: R-1 (pickles), R-2 (checkpoints), R-3 (code beside weights), R-12 (plugins)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from trunkline.core import Engine
from trunkline.core.errors import ModelError

TRAP = """
from pathlib import Path
Path({mark!r}).write_text("it ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class TrapConfig(LlamaConfig): pass
class TrapModel(LlamaForCausalLM): pass
class TrapTokenizer(PreTrainedTokenizerFast): pass
"""


class Detonator:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("process", ["front", "engine"])
def test_neither_process_unpickles_even_for_a_plugin(http: httpx.Client, fortress: object, process: str) -> None:
    answer = http.post(f"/intrude/{process}")
    assert answer.status_code == 500
    assert "Harmless" not in answer.text
    assert "refused to unpickle intruder.Harmless" in fortress.log.read_text()  # type: ignore[attr-defined]
    assert http.get("/health_generate").status_code == 200


def test_a_checkpoint_of_pickles_is_refused_unopened(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(zoo("llama"), folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Detonator(mark)))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        Engine(str(folder), threads=1)
    assert not mark.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes()).close()
    assert mark.exists(), "the trap must work, or this test says nothing"


def test_code_beside_the_weights_never_runs(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(zoo("llama"), folder)
    (folder / "trap.py").write_text(TRAP.format(mark=str(mark)))
    for name, auto_map in {
        "config.json": {"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.TrapModel"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "trap.TrapTokenizer"]},
    }.items():
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"auto_map": auto_map}))
    with Engine(str(folder), threads=1) as engine:
        assert engine.encode("one two")
    assert not mark.exists()
    script = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=tmp_path)
    assert mark.exists(), "the trap must work, or this test says nothing"


def test_a_broken_plugin_is_set_aside_and_named(
    http: httpx.Client, fortress: object, outsiders: dict[str, str]
) -> None:
    assert http.get("/health").status_code == 200
    assert "half installed" in fortress.log.read_text()  # type: ignore[attr-defined]
    script = "from trunkline.core.cli import main; main()"
    told = {
        arguments: subprocess.run(
            [sys.executable, "-c", script, "plugins", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | outsiders,
        ).stdout
        for arguments in (("list",), ("inspect", "intruder"))
    }
    assert all(word in told["list",] for word in ("broken", "half installed", "intruder", "1.0"))
    assert all(word in told["inspect", "intruder"] for word in ("/intrude/front", "infer", "controls"))
