"""A plugin from outside stores weights in its own way."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

CODE = """
import sys
from trunkline.core import Engine
with Engine(sys.argv[1], dtype="float32", threads=1, ternary="mlp", quantization="int8") as engine:
    lane = engine.client.transport.loop.lanes[0]
    print(engine.client.models[0].stored_as)
    for name in ("mlp.down_proj", "self_attn.o_proj"):
        row = lane.model.tensor(f"model.layers.0.{name}.weight", 1)[0]
        print(len(row.unique()))
"""


def test_chosen_matrices_are_ternary_and_the_others_core_s(outside: Path, zoo: Callable[[str], Path]) -> None:
    done = subprocess.run([outside / "python", "-c", CODE, zoo("llama")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored, ternary, others = done.stdout.splitlines()
    assert sorted(stored.split(", ")) == ["4 of 8 matrices as int8", "4 of 8 matrices as ternary"]
    assert int(ternary) <= 3 < int(others)


def test_inspected_with_its_flag(outside: Path) -> None:
    code = "import sys; from trunkline.core.cli import run; sys.exit(run(['plugins', 'inspect', 'ternary']))"
    out = subprocess.run([outside / "python", "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--ternary" in out
    assert "transforms" in out
