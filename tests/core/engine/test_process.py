"""The engine process: what it says and how it exits when it can't start, breaks, or is left alone."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trunkline.core.engine.channel import read_frame
from trunkline.core.engine.messages import Failed, Ready, engine_decoder, frame

# A lane that breaks the loop as soon as it is looked at, which no request could.
BROKEN = """
import sys
from trunkline.core.engine import process, startup
from trunkline.core.engine.messages import Ready
from trunkline.core.engine.startup import LoadedEngine
from trunkline.core.types import ModelInfo, ServedModel

info = ModelInfo(path="", architecture="", model_type="", context_length=9, vocab_size=9, hidden_size=9, causal=True)
names = dict(name="m", model_path="m", tokenizer_path="m", dtype="", attention_backend="")

class Lane:
    paused = False
    served = ServedModel(info=info, tasks={}, max_total_tokens=9, max_running_requests=1, **names)

startup.build = lambda *args, **options: LoadedEngine([Lane()], {}, Ready([Lane.served], [], {}))
sys.exit(process.main())
"""


def run(config: dict[str, Any], *command: str) -> tuple[int, str, list[Any]]:
    """Exit status, stderr and messages of an engine process that gets ``config``."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = subprocess.Popen(
                [sys.executable, *command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
                text=True,
            )
        ours.sendall(frame({"config": config}))  # type: ignore[arg-type]
        messages: list[Any] = []
        while (body := read_frame(ours)) is not None:
            messages += engine_decoder.decode(body)
        _, errors = child.communicate(timeout=60)
    return child.returncode, errors, messages


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"models": [{"model_path": "{folder}"}]}, "has no config.json"),
        ({"plugins": {"only": ["absent"]}}, "There is no plugin 'absent'"),
        ({"settings": {"engine": {"threads": 0}}}, "threads"),
    ],
)
def test_what_keeps_it_from_starting_is_one_sentence(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    for model in config.get("models", []):
        model["model_path"] = str(tmp_path)
    status, errors, messages = run(config, "-m", "trunkline.core.engine.process")
    assert status == 1
    assert isinstance(messages[-1], Failed)
    assert words in messages[-1].message
    assert "Traceback" not in errors


def test_a_defect_of_the_loop_ends_the_process_with_status_1() -> None:
    status, errors, messages = run({}, "-c", BROKEN)
    assert isinstance(messages[0], Ready)
    assert status == 1
    assert "the engine broke" in errors
